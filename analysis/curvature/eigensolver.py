"""Eigenvalues of a symmetric operator: Lanczos with thick restarts (Wu and Simon 2000)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from analysis.curvature.krylov import norm_of, orthogonalise
from analysis.saving import Saver, filled
from models.distributed import ALONE, Team
from models.errors import InputError

Which = Literal["LM", "LA", "SA", "BE"]


# Below this tolerance, copies of repeated eigenvalues are looked for.
STRICT = 1e-6
# A Ritz vector may be a mixture of two eigenvectors whose eigenvalues are as close as its residual,
# and the second of them be missing. So residuals have to be small as well, which costs one product
# or two: at most this multiple of sqrt(tol) of the eigenvalue.
RESOLUTION = 0.1


class MatrixLike(Protocol):
    """What Lanczos has to know of a matrix, besides its products."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


class SymmetricOperator(MatrixLike, Protocol):
    """A symmetric matrix known by its products; a square tensor is one."""

    def __matmul__(self, vector: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues and eigenvectors, the most wanted first, and what they are worth."""

    eigenvalues: Tensor  # (k,) float64
    eigenvectors: Tensor  # (P, k), orthonormal columns
    residuals: Tensor  # (k,) float64, ‖A x - λ x‖: an eigenvalue is at most so far away
    errors: Tensor  # (k,) float64, residual² / gap where that is smaller, else the residual
    converged: Tensor  # (k,) bool
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
    vectors. An eigenvalue has converged when its error, ``residual² / gap`` where the gap to the
    other Ritz values exceeds the residual and ``residual`` otherwise, is at most `tol` times its
    magnitude, and the residual at most ``0.1 sqrt(tol)`` times (or both at the level of rounding).
    Nor has any while another Ritz value could still, within its error, be wanted more.

    From one vector, exact arithmetic finds one copy of a repeated eigenvalue. With a `tol` below
    1e-6 all copies are looked for: what has converged is set aside, and the search begins again
    with a random vector orthogonal to it, until that brings nothing better. With a larger `tol`, a
    second copy is found if rounding brings it up in time, as in other Lanczos codes.

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
        Number of basis vectors, of which (P, ncv + 1) numbers are kept; default max(2k + 1, 20).
    v0
        Where to start: a vector (P,), or approximate eigenvectors (P, m). Default: random.
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
        In the order of `which` ("BE": descending). What has not converged within `maxiter` says so
        in ``converged``; an operator that returns NaN or infinity gives NaN.

    Raises
    ------
    InputError
        `k`, `which`, `ncv` or `v0` out of range, `resume` of another call, or an `A` that is not
        symmetric.
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
    if not (k < ncv <= P or k == ncv == P):
        raise InputError(f"ncv: {ncv}, expected more than k = {k} and at most P = {P}")
    maxiter = 50 * ncv if maxiter is None else maxiter

    if (resume or save) and getattr(A, "team", ALONE).size > 1:
        raise InputError("save: not possible where processes share the operator")
    krylov = _KrylovSpace(A, ncv, v0, seed)
    if resume:
        krylov.restore(resume)
    saver = Saver(None if save is None else lambda space: save(space.state()), krylov)
    while True:
        if krylov.matvecs:
            saver.now_and_then()  # here, for until its product is there the next vector is no part
        product = yield krylov.extend()
        if not krylov.expand(product):
            return _nothing(A, k, krylov.matvecs)
        if krylov.size < k:
            continue
        values, vectors, residuals = krylov.ritz()
        errors = _error_bounds(values, residuals)
        allowed = np.maximum([[tol], [RESOLUTION * tol**0.5]] * np.abs(values), krylov.rounding)
        converged = (errors <= allowed[0]) & (residuals <= allowed[1])
        order = _by_preference(values, which)
        wanted = order[:k]
        # Whatever is missing has a part in the newest sequence, and would be its best.
        newest = krylov.newest(vectors)[order]
        best = order[newest][0]
        known = residuals[best] <= max(0.01 * abs(values[best]), krylov.rounding)
        settled = converged[wanted].all() and known
        if settled and tol >= STRICT and _overtaken(values, errors, wanted, which, slack=tol):
            settled = False
        if settled:
            before = order[~newest][:k]
            nothing_new = len(before) == k and np.all(
                np.abs(values[before] - values[wanted]) <= allowed[0][wanted]
            )
            if nothing_new or krylov.size == P or not (krylov.exhausted or tol < STRICT):
                break
        if krylov.matvecs >= maxiter:
            break
        if settled:
            krylov.set_aside(vectors[:, wanted])
        elif krylov.size == ncv:
            krylov.compress(vectors[:, order[: min((k + ncv) // 2, ncv - 1)]])

    return Eigenpairs(
        eigenvalues=torch.from_numpy(values[wanted]),
        eigenvectors=krylov.whole(vectors[:, wanted]),
        residuals=torch.from_numpy(residuals[wanted]),
        errors=torch.from_numpy(errors[wanted]),
        converged=torch.from_numpy(converged[wanted]),
        matvecs=krylov.matvecs,
    )


def default_ncv(P: int, k: int) -> int:
    """Basis vectors for `k` eigenvalues of a (P, P) matrix."""
    return min(P, max(2 * k + 1, 20))


class _KrylovSpace:
    """``A Q = Q T + q cᵀ``: an orthonormal basis `Q`, a unit vector `q` orthogonal to it, and `c`.

    After every `expand`, `T` is exact up to rounding. The columns of `Q` are rows in memory, and of
    their entries each process of A's team holds its shard.
    """

    def __init__(self, A: MatrixLike, ncv: int, v0: Tensor | None, seed: int) -> None:
        self.size = 0
        self.matvecs = 0
        self.rounding = 0.0  # error of T
        self.exhausted = True  # c = 0: the space is invariant
        self._P, self._dtype, self._device = A.shape[0], A.dtype, A.device
        self._team: Team = getattr(A, "team", ALONE)
        self._shard = self._team.shard(self._P)
        self._generator = torch.Generator().manual_seed(seed)
        self._rows = torch.empty(
            min(ncv + 1, self._P),
            self._shard.stop - self._shard.start,
            dtype=A.dtype,
            device=A.device,
        )
        self._T = np.zeros((ncv, ncv))
        self._start = None if v0 is None else _start(v0, A)
        self._coupling = np.zeros(0)  # c
        self._next = torch.empty(0)  # q, not yet of unit length
        self._dropped = np.zeros(0)  # norms of the parts of A Q that were set aside
        self._newest: np.ndarray = np.zeros(
            0, dtype=bool
        )  # rows of the sequence that was begun last

    def extend(self) -> Tensor:
        """Append the direction that the space lacks to the basis; a random one if it lacks none.

        Returns it, (P,).
        """
        if self.exhausted:
            self._newest[:] = False
            start = self._random_vector() if self._start is None else self._start
            self._next, self._start = start[self._shard].clone(), None
            orthogonalise(self._next, self._rows[: self.size], self._team)
        self._T[self.size, : self.size] = self._coupling
        self._newest = np.append(self._newest, True)
        self._dropped = np.append(self._dropped, 0.0)
        row = self._rows[self.size]
        torch.div(self._next, norm_of(self._next, self._team), out=row)
        return self._team.collect(row, self._P)

    def expand(self, product: Tensor) -> bool:
        """Take in the `product` of A and the last basis vector; False if it is not finite."""
        w = product[self._shard]
        self.matvecs += 1
        removed, norm = orthogonalise(w, self._rows[: self.size + 1], self._team)
        coefficients, beta = removed.cpu().numpy(), float(norm)
        if not (math.isfinite(beta) and np.isfinite(coefficients).all()):
            return False
        scale = max(np.abs(self._T).max(), np.abs(coefficients).max(), beta)
        defect = np.abs(coefficients[:-1] - self._T[self.size, : self.size]) - self._dropped[:-1]
        _require_symmetry(defect, scale, self._dtype)
        self._T[: self.size + 1, self.size] = self._T[self.size, : self.size + 1] = coefficients
        self.size += 1
        self.rounding = 10 * torch.finfo(self._dtype).eps * scale
        self.exhausted = beta <= self.rounding or self.size == self._P
        self._coupling = np.zeros(self.size)
        self._coupling[-1] = 0.0 if self.exhausted else beta
        self._next = w
        return True

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` takes, between an `expand` and the next `extend`."""
        counters = [self.matvecs, self.rounding, self.exhausted]
        return {
            "basis": self._rows[: self.size].cpu().numpy(),
            "next": self._next.cpu().numpy(),
            "T": self._T[: self.size, : self.size],
            "coupling": self._coupling,
            "dropped": self._dropped,
            "newest": self._newest,
            "counters": np.array(counters, dtype=np.float64),
            "generator": self._generator.get_state().numpy(),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Be as the space was whose `state` this is."""
        self.size = min(len(state.get("coupling", ())), len(self._T))
        numbers, (_, entries) = np.zeros(self.size), self._rows.shape
        blank = {
            "basis": np.zeros((self.size, entries)),
            "next": np.zeros(entries),
            "T": np.zeros((self.size, self.size)),
            "coupling": numbers,
            "dropped": numbers,
            "newest": numbers.astype(bool),
            "counters": np.zeros(3),
            "generator": self._generator.get_state().numpy(),
        }
        state = filled(blank, state)
        matvecs, self.rounding, exhausted = state["counters"].tolist()
        self.matvecs, self.exhausted, self._start = int(matvecs), bool(exhausted), None
        self._rows[: self.size] = torch.from_numpy(state["basis"])
        self._next = torch.from_numpy(state["next"]).to(self._rows)
        self._T[: self.size, : self.size] = state["T"]
        self._coupling, self._dropped = state["coupling"], state["dropped"]
        self._newest = state["newest"]
        self._generator.set_state(torch.from_numpy(state["generator"]))

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ascending Ritz values, their vectors in the basis (as columns), and residual norms."""
        values = np.empty(self.size)
        vectors = np.zeros((self.size, self.size))
        # An earlier sequence ended in an invariant space, and equal eigenvalues must not mix it
        # with the newest.
        for rows in map(np.flatnonzero, (~self._newest, self._newest)):
            values[rows], vectors[np.ix_(rows, rows)] = np.linalg.eigh(self._T[np.ix_(rows, rows)])
        order = np.argsort(values, kind="stable")
        return values[order], vectors[:, order], self._residuals(vectors[:, order])

    def compress(self, vectors: np.ndarray) -> None:
        """Keep the space of some Ritz vectors only."""
        kept = vectors.shape[1]
        values = np.diag(vectors.T @ self._T[: self.size, : self.size] @ vectors)
        self._rows[:kept] = self.combine(vectors)
        self._T[:] = 0.0
        self._T[range(kept), range(kept)] = values
        self._newest = self.newest(vectors)
        self._dropped = np.linalg.norm(self._dropped[:, None] * vectors, axis=0)
        self._coupling = self._coupling @ vectors
        self.size = kept

    def combine(self, vectors: np.ndarray) -> Tensor:
        """Rows of the linear combinations of the basis given by the columns of `vectors`."""
        rotation = torch.as_tensor(vectors.T, dtype=self._dtype, device=self._device)
        return rotation @ self._rows[: self.size]

    def whole(self, vectors: np.ndarray) -> Tensor:
        """The same as columns (P, n), of which each process holds all entries."""
        rows = self.combine(vectors)
        return torch.stack([self._team.collect(row, self._P) for row in rows], dim=1)

    def set_aside(self, vectors: np.ndarray) -> None:
        """Keep the space of some Ritz vectors as if it were invariant, and begin a new sequence."""
        self.compress(vectors)
        self._dropped = np.hypot(self._dropped, self._coupling)
        self._coupling = np.zeros(self.size)
        self.exhausted = True

    def newest(self, vectors: np.ndarray) -> np.ndarray:
        """Which Ritz vectors, as columns, belong to the newest sequence."""
        return vectors[self._newest].any(0)

    def _residuals(self, vectors: np.ndarray) -> np.ndarray:
        return np.hypot(
            self._coupling @ vectors, np.linalg.norm(self._dropped[:, None] * vectors, axis=0)
        )

    def _random_vector(self) -> Tensor:
        vector = torch.randn(self._P, generator=self._generator, dtype=torch.float64)
        return vector.to(self._device, self._dtype)


def _error_bounds(values: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Distance of each Ritz value to an eigenvalue: min(residual, residual² / gap)."""
    distances = np.abs(values[:, None] - values[None, :]) - residuals[None, :]
    np.fill_diagonal(distances, np.inf)
    gaps = distances.min(1)
    known = (gaps > residuals) & (gaps < np.inf)
    return np.where(known, residuals**2 / np.where(known, gaps, 1.0), residuals)


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


def _overtaken(
    values: np.ndarray, errors: np.ndarray, wanted: np.ndarray, which: Which, slack: float
) -> bool:
    """Whether another value, once exact, may be preferred to one of `wanted`, by more than `slack`.

    `wanted` is in the order of preference; `slack` is relative.
    """
    others = np.setdiff1d(np.arange(len(values)), wanted)
    if which == "LM":
        values = np.abs(values)
    upper = {"SA": wanted[:0], "BE": wanted[::2]}.get(which, wanted)
    lower = {"SA": wanted, "BE": wanted[1::2]}.get(which, wanted[:0])
    for sign, end in ((1, upper), (-1, lower)):
        if len(end):
            least = sign * values[end[-1]]
            reach = sign * values[others] + errors[others]
            if (reach > least + slack * abs(least)).any():
                return True
    return False


def _start(v0: Tensor, A: MatrixLike) -> Tensor:
    if v0.ndim not in (1, 2) or v0.shape[0] != A.shape[0]:
        raise InputError(
            f"v0: shape {tuple(v0.shape)}, expected ({A.shape[0]},) or ({A.shape[0]}, m)"
        )
    start = v0.reshape(A.shape[0], -1).to(A.device, A.dtype).sum(1)
    if not 0 < float(torch.linalg.vector_norm(start)) < math.inf:
        raise InputError("v0: it sums to zero or is not finite, expected a direction to start from")
    return start


def _validate(A: MatrixLike, k: int, which: str, tol: float) -> None:
    if len(A.shape) != 2 or A.shape[0] != A.shape[1]:
        raise InputError(f"A: shape {tuple(A.shape)}, expected (P, P)")
    if not 1 <= k <= A.shape[0]:
        raise InputError(f"k: {k}, expected 1 to {A.shape[0]}")
    if which not in get_args(Which):
        raise InputError(f"which: {which!r}, expected one of {', '.join(get_args(Which))}")
    if not 0 <= tol < math.inf:
        raise InputError(f"tol: {tol}, expected a relative error of at least 0")


def _require_symmetry(defect: np.ndarray, scale: float, dtype: torch.dtype) -> None:
    """Refuse T ≠ Tᵀ beyond what rounding in the products with A explains.

    Which is more than sqrt(eps): in float32, a ResNet-18 was seen to reach 6e-4.
    """
    worst, allowed = float(defect.max(initial=0.0)), torch.finfo(dtype).eps ** (1 / 3)
    if worst > allowed * scale:
        raise InputError(
            f"A: not symmetric: q·Ap and p·Aq differ by {worst / scale:.1e} of the norm of A "
            f"for two vectors p and q, expected at most {allowed:.1e}"
        )


def _nothing(A: MatrixLike, k: int, matvecs: int) -> Eigenpairs:
    nan = torch.full((k,), math.nan, dtype=torch.float64)
    vectors = torch.full((A.shape[0], k), math.nan, dtype=A.dtype, device=A.device)
    return Eigenpairs(nan, vectors, nan, nan, torch.zeros(k, dtype=torch.bool), matvecs)
