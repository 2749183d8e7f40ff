"""Eigenvalues of a symmetric operator: Lanczos with thick restarts (Wu and Simon 2000)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from lossgeometry.algorithms.krylov import KrylovSpace, MatrixLike
from lossgeometry.errors import InputError
from lossgeometry.running.distributed import ALONE
from lossgeometry.running.saving import Saver

Which = Literal["LM", "LA", "SA", "BE"]


# Below this tolerance, copies of repeated eigenvalues are looked for.
STRICT = 1e-6
# Basis vectors beside those of the eigenvalues: with fewer, restarts forget what was on its way.
ROOM = 4
# How many eigenvalues, about, may be missing because the start was orthogonal to their vectors.
OVERLOOKED = 0.01
POINTS = 16  # between two Ritz values at which that is asked


class SymmetricOperator(MatrixLike, Protocol):
    """A symmetric matrix known by its products; a square tensor is one."""

    def __matmul__(self, vector: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues and eigenvectors, the most wanted first, and what they are worth."""

    eigenvalues: Tensor  # (k,) float64
    eigenvectors: Tensor  # (P, k), orthonormal columns
    residuals: Tensor  # (k,) float64, ‖A x - λ x‖
    errors: Tensor  # (k,) float64, residual and rounding: an eigenvalue is at most so far away
    converged: Tensor  # (k,) bool, whether that is within the tolerance
    matvecs: int  # products with A


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
    vectors. An eigenvalue has converged when its error, which is the norm of its residual and the
    rounding of the products with `A`, is at most `tol` times its magnitude. Nothing has while
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
        default max(2k + 1, 20).
    v0
        Where to start: a vector (P,), or approximate eigenvectors (P, m). A random vector is added
        to their sum, for what is orthogonal to all of them. Default: that alone.
    seed
        Of the random vectors.
    resume
        What `save` received from the same call before it was interrupted: it goes on from there,
        to the same result. Not for a team, whose processes would not stop at the same product.
    save
        Called with arrays to store, the basis among them, after about every ten seconds. They
        change afterwards.

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
    sum of these chances over all places that would be preferred is below 1 %. That supposes exact
    arithmetic, and one eigenvalue in every gap between Ritz values.

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
    solve = lanczos(
        A,
        k,
        which=which,
        tol=tol,
        maxiter=maxiter,
        ncv=ncv,
        v0=v0,
        seed=seed,
        resume=resume,
        save=save,
    )
    vector = next(solve)
    while True:
        try:
            vector = solve.send(A @ vector)
        except StopIteration as end:
            return end.value


def lanczos(
    A: MatrixLike,
    k: int,
    *,
    which: Which = "LM",
    tol: float = 1e-3,
    maxiter: int | None = None,
    ncv: int | None = None,
    v0: Tensor | None = None,
    seed: int = 0,
    resume: Mapping[str, np.ndarray] | None = None,
    save: Callable[[dict[str, np.ndarray]], object] | None = None,
) -> Generator[Tensor, Tensor, Eigenpairs]:
    """The algorithm of `eigsh`, which yields vectors (P,) and is sent their products with `A`.

    Whoever drives it decides how products are made; `A` is not multiplied with here.
    """
    P = A.shape[0]
    _validate(A, k, which, tol)
    ncv = default_ncv(P, k) if ncv is None else ncv
    least = min(k + ROOM, P)
    if not least <= ncv <= P:
        raise InputError(f"ncv: {ncv}, expected {least} to {P} for k = {k} of {P} eigenvalues")
    maxiter = 50 * ncv if maxiter is None else maxiter
    if maxiter < k:
        raise InputError(f"maxiter: {maxiter}, expected at least k = {k} products")

    if (resume or save) and getattr(A, "team", ALONE).size > 1:
        raise InputError("save: not possible where processes share the operator")
    krylov = KrylovSpace(A, ncv, v0, seed)
    if resume:
        krylov.restore(resume)
    saver = Saver(None if save is None else lambda space: save(space.state()), krylov)

    def best(values: np.ndarray) -> np.ndarray:
        # A third of the room beside those wanted: with fewer kept, what was on its way is
        # forgotten; with more, restarts come so often that polynomials are of too low a degree.
        return _by_preference(values, which)[: min((2 * k + ncv) // 3, ncv - 1)]

    while True:
        if krylov.matvecs:
            saver.now_and_then()  # here, for until its product is there the next vector is no part
        product = yield krylov.extend()
        if not krylov.expand(product):
            return _nothing(A, k, krylov.matvecs)
        if krylov.size < k:
            continue
        values, vectors, residuals = krylov.ritz()
        order = _by_preference(values, which)
        wanted, others = order[:k], order[k:]
        errors = residuals + krylov.drift + krylov.rounding
        converged = errors <= tol * np.abs(values)
        # What the precision cannot resolve gets no better once there has been a whole basis.
        settled = converged | ((residuals <= krylov.rounding) & (krylov.matvecs >= ncv))
        ends = _ends(values[wanted], which)
        reach = residuals[others] - krylov.rounding
        lock: bool | None = False
        if settled[wanted].all() and not _overtaken(values[others], reach, ends, tol):
            sure = _overlooked(krylov, values, ends, tol) <= OVERLOOKED
            copies = krylov.exhausted or krylov.searching or tol < STRICT
            if krylov.size == P or (sure and not copies):
                break
            news = _news(krylov, values[wanted], which, tol, sure) if krylov.searching else sure
            if krylov.searching and news is False:
                break
            # What is locked gets no better, and others get no better than what they are coupled to;
            # in a cluster, what converged first may be neither its end nor well apart from that.
            enough = max(0.3 * tol * np.abs(values[wanted]).min(), krylov.rounding)
            lock = news and residuals[wanted].max() <= enough
        if krylov.matvecs >= maxiter:
            break
        if lock:
            krylov.lock(vectors[:, wanted], residuals[wanted])
        elif krylov.size == ncv:
            krylov.compress(best)

    if which == "BE":
        wanted = np.sort(wanted)[::-1].copy()
    return Eigenpairs(
        eigenvalues=torch.from_numpy(values[wanted]),
        eigenvectors=krylov.whole(vectors[:, wanted]),
        residuals=torch.from_numpy(residuals[wanted] + krylov.drift),
        errors=torch.from_numpy(errors[wanted]),
        converged=torch.from_numpy(converged[wanted]),
        matvecs=krylov.matvecs,
    )


def default_ncv(P: int, k: int) -> int:
    """Basis vectors for `k` eigenvalues of a (P, P) matrix."""
    return min(P, max(2 * k + 1, 20))


def _by_preference(values: np.ndarray, which: Which) -> np.ndarray:
    """Indices of ascending `values`, the most wanted first."""
    if which == "LM":
        return np.argsort(-np.abs(values), kind="stable")
    if which == "LA":
        return np.arange(len(values))[::-1]
    if which == "SA":
        return np.arange(len(values))
    ends = np.arange(len(values))
    return np.stack([ends[::-1], ends], axis=1).reshape(-1)[: len(values)]


def _ends(wanted: np.ndarray, which: Which) -> list[tuple[int, float]]:
    """Pairs of a sign and a bound: what is more, times the sign, is preferred to the last of these.

    `wanted` are values in the order of preference.
    """
    if which == "LM":
        return [(1, abs(wanted[-1])), (-1, abs(wanted[-1]))]
    upper = {"SA": wanted[:0], "BE": wanted[::2]}.get(which, wanted)
    lower = {"SA": wanted, "BE": wanted[1::2]}.get(which, wanted[:0])
    return [(sign, sign * end[-1]) for sign, end in ((1, upper), (-1, lower)) if len(end)]


def _overtaken(
    others: np.ndarray, errors: np.ndarray, ends: list[tuple[int, float]], tol: float
) -> bool:
    """Whether other values, once exact, may be preferred, by more than the relative `tol`."""
    return any(
        bool((sign * others + errors > bound + tol * abs(bound)).any()) for sign, bound in ends
    )


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
        places = lower + widths * (np.arange(POINTS)[:, None] + 0.5) / POINTS
        chances = krylov.overlooked(sign * places.reshape(-1)).reshape(places.shape).mean(0)
        shares = np.divide(widths, np.diff(edges), out=np.zeros_like(widths), where=widths > 0)
        expected += float(shares @ chances)
    return expected


def _news(
    krylov: KrylovSpace, found: np.ndarray, which: Which, tol: float, sure: bool
) -> bool | None:
    """Whether the newest sequence has a part in the values `found`; None where that is not known.

    Whatever has been missing has a part in its random start, and would be its best: which is known
    once that has converged, or where it is `sure` that it can be no better than those found.
    """
    before, newest, residuals = krylov.before_and_newest()
    best = _by_preference(newest, which)[0]
    if not sure and residuals[best] > max(0.01 * abs(newest[best]), krylov.rounding):
        return None
    if len(before) < len(found):
        return True
    before = before[_by_preference(before, which)[: len(found)]]
    if which == "LM":  # 2 and -2 are equally wanted
        before, found = np.abs(before), np.abs(found)
    return bool((np.abs(before - found) > tol * np.abs(found) + krylov.rounding).any())


def _validate(A: MatrixLike, k: int, which: str, tol: float) -> None:
    if len(A.shape) != 2 or A.shape[0] != A.shape[1]:
        raise InputError(f"A: shape {tuple(A.shape)}, expected (P, P)")
    if not 1 <= k <= A.shape[0]:
        raise InputError(f"k: {k}, expected 1 to {A.shape[0]}")
    if which not in get_args(Which):
        raise InputError(f"which: {which!r}, expected one of {', '.join(get_args(Which))}")
    if not 0 <= tol < math.inf:
        raise InputError(f"tol: {tol}, expected a relative error of at least 0")


def _nothing(A: MatrixLike, k: int, matvecs: int) -> Eigenpairs:
    nan = torch.full((k,), math.nan, dtype=torch.float64)
    vectors = torch.full((A.shape[0], k), math.nan, dtype=A.dtype, device=A.device)
    return Eigenpairs(nan, vectors, nan, nan, torch.zeros(k, dtype=torch.bool), matvecs)
