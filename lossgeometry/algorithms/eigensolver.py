"""Eigenvalues of a symmetric operator: Lanczos with thick restarts (Wu and Simon 2000)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from lossgeometry.algorithms.krylov import KrylovSpace, MatrixLike
from lossgeometry.errors import InputError
from lossgeometry.running.distributed import ALONE
from lossgeometry.running.saving import Saver, filled
from lossgeometry.storing import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Which = Literal["LM", "LA", "SA", "BE"]


class SymmetricOperator(MatrixLike, Protocol):
    """A symmetric matrix known by its products; a square tensor is one.

    See Also
    --------
    CurvatureOperator : those of a network.
    eigsh : takes any, as do `trace`, `spectral_density` and their like.

    Examples
    --------
    >>> import torch
    >>> from lossgeometry import eigsh
    >>> class AllOnes:
    ...     shape, dtype, device = (100, 100), torch.float32, torch.device("cpu")
    ...
    ...     def __matmul__(self, vectors):
    ...         return vectors.sum(0).expand(vectors.shape).clone()
    >>> eigsh(AllOnes(), k=1).eigenvalues.round(decimals=2)
    tensor([100.], dtype=torch.float64)
    """

    def __matmul__(self, vector: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, repr=False)
class Eigenpairs(Result):
    """Eigenvalues and eigenvectors, in the order that was asked for, and their errors.

    See Also
    --------
    eigsh : computes them.
    eigenvector_directions : makes directions in weight space of the eigenvectors.

    Examples
    --------
    >>> import torch
    >>> from lossgeometry import eigsh
    >>> top = eigsh(torch.diag(torch.tensor([3.0, -2.0, 1.0, 0.5])), k=2)
    >>> top.eigenvectors.shape, top.converged.tolist(), bool((top.errors < 0.01).all())
    (torch.Size([4, 2]), [True, True], True)
    """

    eigenvalues: Tensor  # (k,) float64
    eigenvectors: Tensor  # (P, k), orthonormal columns
    residuals: Tensor  # (k,) float64, ‖A x - λ x‖
    errors: Tensor  # (k,) float64, an eigenvalue of A is at most so far away
    converged: Tensor  # (k,) bool, whether the error is within the tolerance
    matvecs: int  # products with A

    def plot(self, ax: Axes | None = None) -> Axes:
        """The eigenvalues by their rank, with bars of their errors."""
        from lossgeometry.plots import plot_points

        values, errors = (tensor.cpu().numpy() for tensor in (self.eigenvalues, self.errors))
        ranks, texts = np.arange(1, len(values) + 1), dict(xlabel="rank", ylabel="eigenvalue")
        return plot_points(ranks, values, errors, line="", ax=ax, **texts)


def eigsh(
    A: SymmetricOperator,
    k: int = 6,
    *,
    which: Which = "LM",
    tol: float = 1e-3,
    maxiter: int | None = None,
    ncv: int | None = None,
    v0: Tensor | None = None,
    seed: int = 0,
    resume: Mapping[str, np.ndarray] | None = None,
    save: Callable[[dict[str, np.ndarray]], object] | None = None,
) -> Eigenpairs:
    """Extreme eigenvalues of a symmetric operator, after `scipy.sparse.linalg.eigsh`.

    Lanczos with full reorthogonalisation; when the basis is full, it goes on from the best Ritz
    vectors [2]_. An eigenvalue has converged when its error, which is the norm of its residual and
    the rounding of the products with `A`, is at most `tol` times its magnitude. Nothing has while
    another Ritz value could still, within its residual, be wanted more, or while there may be a
    more wanted eigenvalue of which the basis does not know (see Notes).

    From one vector, exact arithmetic finds one copy of a repeated eigenvalue. With a `tol` below
    1e-6 all copies are looked for: what has converged is locked, and the search begins again with a
    random vector orthogonal to it, until that brings nothing better. With a larger `tol`, a second
    copy is found if rounding brings it up in time, as in other Lanczos codes.

    Parameters
    ----------
    A
        Any object with ``shape``, ``dtype``, ``device`` and ``A @ v`` for (P,) tensors. If it has
        a ``team``, its processes divide the basis among them.
    k
        How many, from 1 to P.
    which
        "LM": largest magnitude, "LA": largest, "SA": smallest, "BE": half of them from each end,
        the odd one from the upper.
    tol
        Relative error of the eigenvalues.
    maxiter
        Largest number of products with `A`; default 50 `ncv`.
    ncv
        Number of basis vectors, of which (P, ncv + 1) numbers are kept, k + 4 (or P) or more;
        default max(2k + 1, 24).
    v0
        Where to start: a vector (P,), or approximate eigenvectors (P, m). A random vector is added
        to their sum, for what is orthogonal to all of them. Default: that alone.
    seed
        Of the random vectors.
    resume
        What `save` received from the same call before it was interrupted: it goes on from there,
        to the same result. Not for a team, whose processes would not stop at the same product.
    save
        Called with arrays to store, the basis among them, after about every ten seconds. The solve
        goes on to change them after the call.

    Returns
    -------
    Eigenpairs
        In the order of `which` ("BE": descending). What has not converged within `maxiter`, or is
        too small for the precision of `A`, says so in ``converged``, and ``errors`` cover the truth
        all the same; an operator that returns NaN or infinity gives NaN.

    Raises
    ------
    InputError
        `k`, `which`, `ncv`, `maxiter` or `v0` out of range, `resume` of another call, or an `A`
        that is not symmetric.

    See Also
    --------
    spectral_density : all eigenvalues, roughly.
    max_eigenvalue_spectrum : those of many mini-batches.
    eigenvector_directions : the eigenvectors, to cut the loss along.

    Notes
    -----
    A symmetric matrix has an eigenvalue within the norm of the residual ``A x - θ x`` of every `θ`
    and unit vector `x` [1]_. The bound ``residual² / gap``, often far smaller, holds only if no
    other eigenvalue is near, which Ritz values cannot tell.

    Rounding is taken to be 10 machine epsilons of the norm of `A`, or as much as ``x·(A y)`` and
    ``y·(A x)`` were seen to disagree by, if that is more; residuals gain as much with each restart,
    in quadrature, and a tenth of it that adds up. An eigenvalue that is smaller than
    ``rounding / tol`` cannot converge.

    An eigenvalue is overlooked if its eigenvector is nearly orthogonal to the random start. How
    nearly it would have to be follows from the Lanczos recurrence, at any place that the eigenvalue
    might have; and how probable that is, from the start's being random. The solve goes on until the
    sum of these chances over all places that would be preferred is below 0.2 %. That supposes exact
    arithmetic, and one eigenvalue in every gap between Ritz values. Of a matrix that fits into the
    basis, of at most `ncv` rows, all eigenvalues are found, and none can be overlooked.

    References
    ----------
    .. [1] B. N. Parlett, The Symmetric Eigenvalue Problem, SIAM 1998, theorem 4.5.1.
    .. [2] K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems,
       SIAM J. Matrix Anal. Appl. 22 (2000).

    Examples
    --------
    >>> import torch
    >>> A = torch.diag(torch.tensor([3.0, -2.0, 1.0, 0.5]))
    >>> eigsh(A, k=2).eigenvalues.round(decimals=3)
    tensor([ 3., -2.], dtype=torch.float64)
    """
    search = plan(A, k, which=which, tol=tol, maxiter=maxiter, ncv=ncv)
    solve = lanczos(A, search, v0=v0, seed=seed, resume=resume, save=save)
    vector = next(solve)
    while True:
        try:
            vector = solve.send(A @ vector)
        except StopIteration as end:
            return end.value


# Below this tolerance, copies of repeated eigenvalues are looked for.
_STRICT = 1e-6


@dataclass(frozen=True)
class Search:
    """What `eigsh` was asked for, with all defaults filled in: see its parameters."""

    k: int
    which: Which
    tol: float
    maxiter: int
    ncv: int

    def by_preference(self, values: np.ndarray) -> np.ndarray:
        """Indices of ascending `values`, the most wanted first."""
        ascending = np.arange(len(values))
        match self.which:
            case "LM":
                return np.argsort(-np.abs(values), kind="stable")
            case "LA":
                return ascending[::-1]
            case "SA":
                return ascending
        return np.stack([ascending[::-1], ascending], axis=1).reshape(-1)[: len(values)]

    def kept(self, values: np.ndarray) -> np.ndarray:
        """Indices of those of the ascending `values` from which a restart goes on.

        They are two fifths of the room beside the wanted: with fewer kept, what was on its way is
        forgotten; with more, restarts come so often that polynomials are of too low a degree.
        """
        room = self.ncv - self.k
        # Where copies are looked for, what has been locked takes places of what is on its way.
        more = room // 2 if self.tol < _STRICT else 2 * room // 5
        return self.by_preference(values)[: min(self.k + more, self.ncv - 1)]

    def ends(self, wanted: np.ndarray) -> list[tuple[int, float]]:
        """Pairs of a sign and a bound: what is more, times the sign, is preferred to the last.

        `wanted` are values in the order of preference.
        """
        if self.which == "LM":
            return [(1, abs(wanted[-1])), (-1, abs(wanted[-1]))]
        upper = {"SA": wanted[:0], "BE": wanted[::2]}.get(self.which, wanted)
        lower = {"SA": wanted, "BE": wanted[1::2]}.get(self.which, wanted[:0])
        return [(sign, sign * end[-1]) for sign, end in ((1, upper), (-1, lower)) if len(end)]


# Basis vectors beside those of the eigenvalues: with fewer, restarts forget what was on its way.
_ROOM = 4


def plan(
    A: MatrixLike,
    k: int,
    *,
    which: Which = "LM",
    tol: float = 1e-3,
    maxiter: int | None = None,
    ncv: int | None = None,
) -> Search:
    """The search that these parameters of `eigsh` ask for; raises `InputError` if none can."""
    if len(A.shape) != 2 or A.shape[0] != A.shape[1]:
        raise InputError(f"A: shape {tuple(A.shape)}, expected (P, P)")
    P = A.shape[0]
    if not 1 <= k <= P:
        raise InputError(f"k: {k}, expected 1 to {P}")
    if which not in get_args(Which):
        raise InputError(f"which: {which!r}, expected one of {', '.join(get_args(Which))}")
    if not 0 <= tol < math.inf:
        raise InputError(f"tol: {tol}, expected a relative error of at least 0")
    ncv = default_ncv(P, k) if ncv is None else ncv
    least = min(k + _ROOM, P)
    if not least <= ncv <= P:
        raise InputError(f"ncv: {ncv}, expected {least} to {P} for k = {k} of {P} eigenvalues")
    maxiter = 50 * ncv if maxiter is None else maxiter
    if maxiter < k:
        raise InputError(f"maxiter: {maxiter}, expected at least k = {k} products")
    return Search(k, which, tol, maxiter, ncv)


def default_ncv(P: int, k: int) -> int:
    """Basis vectors for `k` eigenvalues of a (P, P) matrix."""
    return min(P, max(2 * k + 1, 24))


def lanczos(
    A: MatrixLike,
    search: Search,
    *,
    v0: Tensor | None = None,
    seed: int = 0,
    resume: Mapping[str, np.ndarray] | None = None,
    save: Callable[[dict[str, np.ndarray]], object] | None = None,
) -> Generator[Tensor, Tensor, Eigenpairs]:
    """The algorithm of `eigsh`, which yields vectors (P,) and is sent their products with `A`.

    Whoever drives it decides how products are made; `A` is not multiplied with here.
    """
    if (resume or save) and getattr(A, "team", ALONE).size > 1:
        raise InputError("save: not possible where processes share the operator")
    krylov, cleared = KrylovSpace(A, search.ncv, v0, seed), np.full(2, np.nan)
    if resume:
        krylov.restore(resume)
        cleared = filled({"cleared": cleared}, resume)["cleared"]
    keep = None if save is None else lambda space: save(space.state() | {"cleared": cleared})
    saver = Saver(keep, krylov)

    while True:
        if krylov.matvecs:
            saver.now_and_then()  # here, for until its product is there the next vector is no part
        product = yield krylov.extend()
        if not krylov.expand(product):
            return _nothing(A, search.k, krylov.matvecs)
        if krylov.size < search.k:
            continue
        found = _found(krylov, search)
        step = _next_step(krylov, search, found, cleared)
        if step == "stop" or krylov.matvecs >= search.maxiter:
            return _eigenpairs(krylov, search, found)
        if step == "lock":
            krylov.lock(found.vectors[:, found.wanted], found.residuals[found.wanted])
            cleared[:] = np.nan
        elif krylov.size == krylov.ncv:
            krylov.compress(search.kept)


@dataclass(frozen=True)
class _Found:
    """Ascending Ritz values, and what they are worth."""

    values: np.ndarray
    vectors: np.ndarray  # columns, in the basis
    residuals: np.ndarray  # but for the drift of restarts
    errors: np.ndarray
    converged: np.ndarray
    wanted: np.ndarray  # (k,) indices, the most wanted first
    others: np.ndarray  # the other indices


def _found(krylov: KrylovSpace, search: Search) -> _Found:
    values, vectors, residuals = krylov.projection.ritz()
    order = search.by_preference(values)
    errors = residuals + krylov.drift + krylov.rounding
    converged = errors <= search.tol * np.abs(values)
    wanted, others = order[: search.k], order[search.k :]
    return _Found(values, vectors, residuals, errors, converged, wanted, others)


# How many eigenvalues, about, may be missing because the start was orthogonal to their vectors.
_OVERLOOKED = 0.002


def _next_step(
    krylov: KrylovSpace, search: Search, found: _Found, cleared: np.ndarray
) -> Literal["extend", "lock", "stop"]:
    """Whether to go on with the newest sequence, to begin one beside what is found, or to stop.

    `cleared` (2,) remembers, for each end, the bound that no other value was seen to overtake.
    """
    if search.ncv == krylov.basis.P:  # the basis will hold all there is
        return "stop" if krylov.size == krylov.basis.P else "extend"
    tol, values, residuals = search.tol, found.values[found.wanted], found.residuals[found.wanted]
    # What the precision cannot resolve gets no better once there has been a whole basis.
    unresolvable = (residuals <= krylov.rounding) & (krylov.matvecs >= search.ncv)
    ends = search.ends(values)
    if not (found.converged[found.wanted] | unresolvable).all():
        return "extend"
    # Of two ends, the other counts as it was when it was clear: in a cluster, each value that
    # converges is followed by one that has not, and both take turns at that.
    bounds, remembered = np.array([bound for _, bound in ends]), cleared[: len(ends)]
    clear = np.array([not _overtaken(found, krylov.rounding, end, tol) for end in ends])
    remembered[clear] = bounds[clear]
    if not (clear.any() and (np.abs(remembered - bounds) <= tol * np.abs(bounds)).all()):
        return "extend"
    sure = _overlooked(krylov, found.values, ends, tol) <= _OVERLOOKED
    if krylov.projection.searching:
        # Whatever has been missing has a part in the random start of the newest sequence, and would
        # be its best: which is known once that has converged, or where it can be no better.
        if not (sure or _newest_is_known(krylov, search)):
            return "extend"
        if not _newest_is_new(krylov, search, values):
            return "stop"
    elif not sure:
        return "extend"
    elif not (krylov.exhausted or tol < _STRICT):
        return "stop"
    # What is locked gets no better, and others get no better than what they are coupled to;
    # in a cluster, what converged first may be neither its end nor well apart from that.
    enough = max(0.3 * tol * np.abs(values).min(), krylov.rounding)
    return "lock" if residuals.max() <= enough else "extend"


def _overtaken(found: _Found, rounding: float, end: tuple[int, float], tol: float) -> bool:
    """Whether other values, once exact, may be preferred, by more than the relative `tol`."""
    values, reach = found.values[found.others], found.residuals[found.others] - rounding
    sign, bound = end
    return bool((sign * values + reach > bound + tol * abs(bound)).any())


_POINTS = 16  # between two Ritz values, at which it is asked what was overlooked


def _overlooked(
    krylov: KrylovSpace, values: np.ndarray, ends: list[tuple[int, float]], tol: float
) -> float:
    """About how many eigenvalues may be preferred to those found, and not be known to the space.

    Between any two Ritz values one is supposed, anywhere but where it counts as one of these.
    """
    spacing, expected = np.ptp(values) / len(values), 0.0
    for sign, bound in ends:
        edges = np.append(bound, np.sort(sign * values[sign * values > bound]))
        edges = np.append(edges, edges[-1] + spacing)
        lower, upper = edges[:-1] + tol * np.abs(edges[:-1]), edges[1:] - tol * np.abs(edges[1:])
        widths = np.maximum(upper - lower, 0.0)
        places = lower + widths * (np.arange(_POINTS)[:, None] + 0.5) / _POINTS
        chances = krylov.projection.overlooked(sign * places.reshape(-1), krylov.basis.P)
        shares = np.divide(widths, np.diff(edges), out=np.zeros_like(widths), where=widths > 0)
        expected += float(shares @ chances.reshape(places.shape).mean(0))
    return expected


def _newest_is_known(krylov: KrylovSpace, search: Search) -> bool:
    """Whether the best of the newest sequence has converged, to a per cent; "BE": of each end."""
    _, newest, residuals = krylov.projection.before_and_newest()
    best = search.by_preference(newest)[: min(search.k, 2) if search.which == "BE" else 1]
    enough = np.maximum(0.01 * np.abs(newest[best]), krylov.rounding)
    return bool((residuals[best] <= enough).all())


def _newest_is_new(krylov: KrylovSpace, search: Search, found: np.ndarray) -> bool:
    """Whether the newest sequence has a part in the values `found`, in order of preference."""
    before, *_ = krylov.projection.before_and_newest()
    if len(before) < len(found):
        return True
    before = before[search.by_preference(before)[: len(found)]]
    if search.which == "LM":  # 2 and -2 are equally wanted
        before, found = np.abs(before), np.abs(found)
    return bool((np.abs(before - found) > search.tol * np.abs(found) + krylov.rounding).any())


def _eigenpairs(krylov: KrylovSpace, search: Search, found: _Found) -> Eigenpairs:
    best = found.wanted
    if search.which == "BE":
        best = np.sort(best)[::-1].copy()
    return Eigenpairs(
        eigenvalues=torch.from_numpy(found.values[best]),
        eigenvectors=krylov.basis.whole(found.vectors[:, best]),
        residuals=torch.from_numpy(found.residuals[best] + krylov.drift),
        errors=torch.from_numpy(found.errors[best]),
        converged=torch.from_numpy(found.converged[best]),
        matvecs=krylov.matvecs,
    )


def _nothing(A: MatrixLike, k: int, matvecs: int) -> Eigenpairs:
    nan = torch.full((k,), math.nan, dtype=torch.float64)
    vectors = torch.full((A.shape[0], k), math.nan, dtype=A.dtype, device=A.device)
    return Eigenpairs(nan, vectors, nan, nan, torch.zeros(k, dtype=torch.bool), matvecs)
