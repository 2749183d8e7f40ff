"""Krylov spaces: an orthonormal basis that grows by products, and orthogonalisation against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lossgeometry.algorithms.symmetry import require_small_asymmetry
from lossgeometry.errors import InputError
from lossgeometry.running.distributed import ALONE, Team
from lossgeometry.running.saving import filled


class MatrixLike(Protocol):
    """What Lanczos has to know of a matrix, besides its products."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


LOCKED, BEFORE, NEWEST = range(3)  # parts of a Krylov space


class KrylovSpace:
    """``A Q = Q T + q cᵀ``: an orthonormal basis `Q`, a vector `q` orthogonal to it, and `c`.

    After every `expand`, ``T = Qᵀ A Q`` up to rounding. The columns of `Q` are rows in memory, and
    of their entries each process of A's team holds its shard. There are up to three kinds of them:
    Ritz vectors that were locked, for which the equation does not hold but whose residuals are
    known; the invariant space of sequences that came to an end; and the newest sequence.
    """

    def __init__(self, A: MatrixLike, ncv: int, v0: Tensor | None, seed: int) -> None:
        self.size = 0
        self.matvecs = 0
        self.rounding = 0.0  # of a product, as a norm
        self._scale = 0.0  # of A, as large as it was ever seen
        self.exhausted = False  # the space is invariant, up to rounding
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
        self._coupling = np.zeros(0)  # c
        # q, not yet of unit length
        self._next = self._random()
        if v0 is not None:
            start, columns = _start(v0, A)[self._shard], v0[..., None].shape[1]
            share = norm_of(start, self._team) / norm_of(self._next, self._team)
            self._next = start + self._next * (share / columns**0.5).to(start)
        self._part = np.zeros(0, dtype=int)
        self._residuals = np.zeros(0)  # of what is locked
        self._combined = 0  # how often the basis was combined anew
        self._first = 0  # row of the first vector of the newest sequence since its last restart
        self._restarts: list[np.ndarray] = []  # of the newest sequence, for `overlooked`

    @property
    def searching(self) -> bool:
        """Whether the newest sequence was begun beside what had been found."""
        return bool((self._part < NEWEST).any())

    @property
    def drift(self) -> float:
        """What residuals have gained each time that the basis was combined anew, and rounded.

        Most of it is random; about one machine epsilon each time, of lost length, adds up.
        """
        return self.rounding * (math.sqrt(self._combined) + self._combined / 10)

    def extend(self) -> Tensor:
        """Append the direction that the space lacks to the basis; a random one if it lacks none.

        Returns it, (P,).
        """
        if self.exhausted:
            start = self._random()
            # What is left of the last product may be more than rounding, and is not to be lost.
            left, length = norm_of(self._next, self._team), norm_of(start, self._team)
            self._begin(start.add_(self._next * (length / left).nan_to_num(posinf=0.0).to(start)))
        self._T[self.size, : self.size] = self._coupling
        self._part = np.append(self._part, NEWEST)
        self._residuals = np.append(self._residuals, 0.0)
        row = self._rows[self.size]
        torch.div(self._next, norm_of(self._next, self._team), out=row)
        return self._team.collect(row, self._P)

    def expand(self, product: Tensor) -> bool:
        """Take in the `product` of A and the last basis vector; False if it is not finite."""
        w = product[self._shard].clone()
        self.matvecs += 1
        removed, norm = orthogonalise(w, self._rows[: self.size + 1], self._team)
        coefficients, beta = removed.cpu().numpy(), float(norm)
        if not (math.isfinite(beta) and np.isfinite(coefficients).all()):
            return False
        scale = max(self._scale, np.abs(self._T).max(), np.abs(coefficients).max(), beta)
        self._scale = scale
        differences = np.abs(coefficients[:-1] - self._T[self.size, : self.size])
        defect = float((differences - self._residuals[:-1]).max(initial=0.0))
        require_small_asymmetry(defect, scale, self._dtype)
        self._T[: self.size + 1, self.size] = self._T[self.size, : self.size + 1] = coefficients
        self.size += 1
        # What the products of two vectors disagree by is rounding that was seen.
        self.rounding = max(self.rounding, 10 * torch.finfo(self._dtype).eps * scale, defect)
        self.exhausted = beta <= self.rounding or self.size == self._P
        self._coupling = np.zeros(self.size)
        self._coupling[-1] = beta
        self._next = w
        return True

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` takes, between an `expand` and the next `extend`."""
        counters = [self.matvecs, self.rounding, self._scale, self.exhausted]
        counters += [self._combined, self._first]
        return {
            "basis": self._rows[: self.size].cpu().numpy(),
            "next": self._next.cpu().numpy(),
            "T": self._T[: self.size, : self.size],
            "coupling": self._coupling,
            "part": self._part,
            "residuals": self._residuals,
            "restarts": np.reshape(self._restarts, (-1, 2, len(self._T))),
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
            "part": numbers.astype(int),
            "residuals": numbers,
            "restarts": np.zeros((len(state.get("restarts", ())), 2, len(self._T))),
            "counters": np.zeros(6),
            "generator": self._generator.get_state().numpy(),
        }
        state = filled(blank, state)
        matvecs, self.rounding, self._scale, *others = state["counters"].tolist()
        self.matvecs, (exhausted, self._combined, self._first) = int(matvecs), map(int, others)
        self.exhausted = bool(exhausted)
        self._rows[: self.size] = torch.from_numpy(state["basis"])
        self._next = torch.from_numpy(state["next"]).to(self._rows)
        self._T[: self.size, : self.size] = state["T"]
        self._coupling, self._residuals = state["coupling"], state["residuals"]
        self._part, self._restarts = state["part"], list(state["restarts"])
        self._generator.set_state(torch.from_numpy(state["generator"]))

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ascending Ritz values, their vectors in the basis (as columns), and residual norms."""
        T, locked = self._T[: self.size, : self.size], self._part == LOCKED
        values, vectors = self._ritz(~locked)
        # Of a product with one of the others, what lies in the space of the locked ones.
        across = np.linalg.norm(T[locked] @ (vectors * ~locked[:, None]), axis=0)
        known = self._residuals @ np.abs(vectors)
        residuals = np.sqrt((self._coupling @ vectors) ** 2 + across**2 + known**2)
        return values, vectors, residuals

    def before_and_newest(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values of what was before the newest sequence, those of that, and their residuals.

        Each by itself: of two copies of an eigenvalue, the newest sequence has one of its own.
        """
        values, vectors = self._ritz(self._part == BEFORE, self._part == NEWEST)
        newest = vectors[self._part == NEWEST].any(0)
        return values[~newest], values[newest], np.abs(self._coupling @ vectors)[newest]

    def overlooked(self, points: np.ndarray) -> np.ndarray:
        """Chance that A has an eigenvalue at `points` (m,), each, of which the space does not know.

        Of an eigenvector `u` with eigenvalue `λ`, ``uᵀ A Q = uᵀ (Q T + q cᵀ)`` gives
        ``u·q_0 = (u·q) e_0ᵀ (λ - T)⁻¹ c``. The second factor is the largest part of the start `q_0`
        that `u` can be, and restarts multiply such factors. Of a random unit vector it is at most
        `ε` with a probability of at most ``ε sqrt(2P/π)``.
        """
        part = np.ones(len(points))
        for values, weights in (*self._restarts, self._start_in_ritz_vectors()):
            with np.errstate(divide="ignore", invalid="ignore"):
                factors = np.abs((weights / (points[:, None] - values)).sum(1))
            part *= np.where(np.isnan(factors), 1.0, factors)
        return np.minimum(1.0, part * math.sqrt(2 * self._P / math.pi))

    def compress(self, choose: Callable[[np.ndarray], np.ndarray]) -> None:
        """Keep as many Ritz vectors as `choose` takes indices of the ascending values.

        They are the first of those chosen, after all that are locked, to which others are coupled
        otherwise than by `c`. Those of the newest sequence are not mixed with what was before it.
        """
        values, vectors = self._ritz(self._part == BEFORE, self._part == NEWEST)
        chosen, locked = choose(values), np.flatnonzero(vectors[self._part == LOCKED].any(0))
        others = np.setdiff1d(chosen, locked, assume_unique=True)
        self._restarts.append(self._start_in_ritz_vectors())
        self._keep(vectors[:, np.append(locked, others)[: len(chosen)]])

    def lock(self, vectors: np.ndarray, residuals: np.ndarray) -> None:
        """Keep some Ritz vectors only, given as columns, and begin a new sequence beside them."""
        start = self._random()
        # Orthogonal to all that was found, it has more of what was not.
        orthogonalise(start, self._rows[: self.size], self._team)
        self._keep(vectors)
        self._part[:], self._residuals = LOCKED, residuals
        self._begin(start)

    def combine(self, vectors: np.ndarray) -> Tensor:
        """Rows of the linear combinations of the basis given by the columns of `vectors`."""
        rotation = torch.as_tensor(vectors.T, dtype=self._dtype, device=self._device)
        return rotation @ self._rows[: self.size]

    def whole(self, vectors: np.ndarray) -> Tensor:
        """The same as columns (P, n), of which each process holds all entries."""
        rows = self.combine(vectors)
        return torch.stack([self._team.collect(row, self._P) for row in rows], dim=1)

    def _ritz(self, *parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ascending Ritz values and vectors of what is locked, and of each of some other parts."""
        T = self._T[: self.size, : self.size]
        values, vectors = np.diag(T).copy(), np.eye(self.size)
        for rows in map(np.flatnonzero, parts):
            values[rows], vectors[np.ix_(rows, rows)] = np.linalg.eigh(T[np.ix_(rows, rows)])
        order = np.argsort(values, kind="stable")
        return values[order], vectors[:, order]

    def _begin(self, start: Tensor) -> None:
        """Begin a sequence beside what there is, which is taken for invariant from now on."""
        self._coupling = np.zeros(self.size)
        self._part = np.minimum(self._part, BEFORE)
        self._first, self._restarts = self.size, []
        self._next, self.exhausted = start, False
        orthogonalise(self._next, self._rows[: self.size], self._team)

    def _keep(self, vectors: np.ndarray) -> None:
        """Make some linear combinations of the basis, orthonormal columns, the whole basis."""
        kept = vectors.shape[1]
        T = vectors.T @ self._T[: self.size, : self.size] @ vectors
        self._rows[:kept] = self.combine(vectors)
        self._T[:] = 0.0
        self._T[:kept, :kept] = (T + T.T) / 2
        self._part = self._part[np.abs(vectors).argmax(0)]
        self._residuals = self._residuals @ np.abs(vectors)
        self._coupling = self._coupling @ vectors
        self._combined += 1
        self.size = self._first = kept

    def _start_in_ritz_vectors(self) -> np.ndarray:
        """Ritz values, and coupling times part in the start of each vector: (2, ncv)."""
        values, vectors = np.linalg.eigh(self._T[: self.size, : self.size])
        found = np.stack([np.full(len(self._T), np.inf), np.zeros(len(self._T))])
        found[:, : self.size] = values, vectors[self._first] * (self._coupling @ vectors)
        return found

    def _random(self) -> Tensor:
        """A random vector, of which this process has its shard."""
        vector = torch.randn(self._P, generator=self._generator, dtype=torch.float64)
        return vector.to(self._device, self._dtype)[self._shard].clone()


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
