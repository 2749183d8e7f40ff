"""Eigenvalues of a symmetric operator: Lanczos with thick restarts (Wu and Simon 2000)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from analysis.curvature.krylov import KrylovSpace, MatrixLike
from analysis.saving import Saver
from models.distributed import ALONE
from models.errors import InputError

Which = Literal["LM", "LA", "SA", "BE"]


# Below this tolerance, copies of repeated eigenvalues are looked for.
STRICT = 1e-6
# A Ritz vector may be a mixture of two eigenvectors whose eigenvalues are as close as its residual,
# and the second of them be missing. So residuals have to be small as well, which costs one product
# or two: at most this multiple of sqrt(tol) of the eigenvalue.
RESOLUTION = 0.1


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
    krylov = KrylovSpace(A, ncv, v0, seed)
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
