"""Krylov spaces: an orthonormal basis that grows by products, and orthogonalisation against it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from analysis.saving import filled
from models.distributed import ALONE, Team
from models.errors import InputError


class MatrixLike(Protocol):
    """What Lanczos has to know of a matrix, besides its products."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


class KrylovSpace:
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


def orthogonalise(w: Tensor, basis: Tensor, team: Team = ALONE) -> tuple[Tensor, Tensor]:
    """Remove from vectors, in place, their components along orthonormal rows.

    The last two rows go first: but for rounding, and after a restart, they are all there is. Each
    pass corrects the rounding of the one before, so that the sum of their coefficients is exact to
    the rounding of what is left of `w`. Twice is enough (Giraud, Langou and Rozložník 2005).

    Parameters
    ----------
    w : (..., P) tensor
    basis : (..., j, P) tensor
    team : Team
        Processes that hold different entries of all these vectors, `P` each.

    Returns
    -------
    Coefficients (..., j) of the removed components and norms (...) of what is left, in float64.
    """
    total = torch.zeros(basis.shape[:-1], dtype=torch.float64, device=w.device)
    norm = torch.full(w.shape[:-1], torch.inf, dtype=torch.float64, device=w.device)
    for first in (max(0, basis.shape[-2] - 2), 0, 0):
        rows = basis[..., first:, :]
        # Several times faster than rows @ w on a CPU.
        coefficients = team.sum_(w[..., None, :] @ rows.mT)
        w -= (coefficients @ rows).squeeze(-2)
        total[..., first:] += coefficients.squeeze(-2)
        before, norm = norm, norm_of(w, team)
        if first == 0 and (norm > 0.5 * before).all():
            break
    return total, norm


def norm_of(w: Tensor, team: Team = ALONE) -> Tensor:
    """Norms (...) of vectors (..., P), in float64; see `orthogonalise`."""
    return team.sum_(torch.linalg.vector_norm(w, dim=-1, dtype=torch.float64).square()).sqrt()


def _start(v0: Tensor, A: MatrixLike) -> Tensor:
    if v0.ndim not in (1, 2) or v0.shape[0] != A.shape[0]:
        raise InputError(
            f"v0: shape {tuple(v0.shape)}, expected ({A.shape[0]},) or ({A.shape[0]}, m)"
        )
    start = v0.reshape(A.shape[0], -1).to(A.device, A.dtype).sum(1)
    if not 0 < float(torch.linalg.vector_norm(start)) < math.inf:
        raise InputError("v0: it sums to zero or is not finite, expected a direction to start from")
    return start


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
