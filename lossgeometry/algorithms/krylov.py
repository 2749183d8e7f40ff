"""Krylov spaces: an orthonormal basis that grows by products, and orthogonalisation against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lossgeometry.errors import InputError
from lossgeometry.running.distributed import ALONE, Team
from lossgeometry.running.saving import filled
from lossgeometry.symmetry import require_small_asymmetry


class MatrixLike(Protocol):
    """What Lanczos has to know of a matrix, besides its products."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


class Basis:
    """Orthonormal vectors (P,), at most so many, and random ones of which more can be made.

    They are rows in memory, and of their entries each process of A's team holds its shard.
    """

    def __init__(self, A: MatrixLike, most: int, seed: int) -> None:
        self.size = 0
        self.P, self.team = A.shape[0], getattr(A, "team", ALONE)
        self.shard: slice = self.team.shard(self.P)
        self.room = torch.empty(
            most, self.shard.stop - self.shard.start, dtype=A.dtype, device=A.device
        )
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def rows(self) -> Tensor:
        """The vectors, a row each, of which this process has its shard."""
        return self.room[: self.size]

    def random(self) -> Tensor:
        """A random vector, of which this process has its shard."""
        vector = torch.randn(self.P, generator=self.generator, dtype=torch.float64)
        return vector.to(self.room)[self.shard].clone()

    def norm(self, w: Tensor) -> Tensor:
        """Norm of a vector of which this process has its shard."""
        return norm_of(w, self.team)

    def orthogonalise(self, w: Tensor) -> tuple[np.ndarray, float]:
        """See the function of this name."""
        removed, norm = orthogonalise(w, self.rows, self.team)
        return removed.cpu().numpy(), float(norm)

    def append(self, w: Tensor) -> Tensor:
        """Append a vector that is orthogonal to all, once it has unit length; returns it, (P,)."""
        row = self.room[self.size]
        torch.div(w, self.norm(w), out=row)
        self.size += 1
        return self.team.collect(row, self.P)

    def combine(self, vectors: np.ndarray) -> Tensor:
        """Rows of the linear combinations of the basis given by the columns of `vectors`."""
        return torch.as_tensor(vectors.T).to(self.room) @ self.rows

    def whole(self, vectors: np.ndarray) -> Tensor:
        """The same as columns (P, n), of which each process holds all entries."""
        rows = self.combine(vectors)
        return torch.stack([self.team.collect(row, self.P) for row in rows], dim=1)

    def replace(self, rows: Tensor) -> None:
        """Have other rows, orthonormal ones."""
        self.size = len(rows)
        self.room[: self.size] = rows


LOCKED, BEFORE, NEWEST = range(3)  # parts of a Krylov space


@dataclass
class Projection:
    """What is known of A in an orthonormal basis: ``A Q = Q T + q cᵀ``, ``T = Qᵀ A Q``.

    There are up to three kinds of basis vectors: Ritz vectors that were locked, for which the
    equation does not hold but whose residuals are known; the invariant space of sequences that came
    to an end; and the newest sequence.
    """

    T: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    coupling: np.ndarray = field(default_factory=lambda: np.zeros(0))  # c
    part: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))  # LOCKED, ...
    residuals: np.ndarray = field(default_factory=lambda: np.zeros(0))  # norms, of what is locked
    first: int = 0  # of the vectors of the newest sequence since its last restart
    restarts: list[np.ndarray] = field(default_factory=list)  # of that sequence, for `overlooked`

    @property
    def size(self) -> int:
        """Number of basis vectors."""
        return len(self.coupling)

    @property
    def searching(self) -> bool:
        """Whether the newest sequence was begun beside what had been found."""
        return bool((self.part < NEWEST).any())

    def begin(self) -> None:
        """Begin a sequence beside what there is, which is taken for invariant from now on."""
        self.coupling = np.zeros(self.size)
        self.part = np.minimum(self.part, BEFORE)
        self.first, self.restarts = self.size, []

    def grow(self, coefficients: np.ndarray, beta: float) -> None:
        """Take in the last column of T, and the norm of what the basis lacks of its product."""
        T = np.empty((self.size + 1, self.size + 1))
        T[:-1, :-1] = self.T
        T[-1] = T[:, -1] = coefficients
        self.T, self.coupling = T, np.append(np.zeros(self.size), beta)
        self.part = np.append(self.part, NEWEST)
        self.residuals = np.append(self.residuals, 0.0)

    def keep(self, vectors: np.ndarray) -> None:
        """Make some linear combinations of the basis, orthonormal columns, the whole basis."""
        T = vectors.T @ self.T @ vectors
        self.T = (T + T.T) / 2
        self.part = self.part[np.abs(vectors).argmax(0)]
        self.residuals = self.residuals @ np.abs(vectors)
        self.coupling = self.coupling @ vectors
        self.first = self.size

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ascending Ritz values, their vectors in the basis (as columns), and residual norms."""
        locked = self.part == LOCKED
        values, vectors = self._ritz(~locked)
        # Of a product with one of the others, what lies in the space of the locked ones.
        across = np.linalg.norm(self.T[locked] @ (vectors * ~locked[:, None]), axis=0)
        known = self.residuals @ np.abs(vectors)
        residuals = np.sqrt((self.coupling @ vectors) ** 2 + across**2 + known**2)
        return values, vectors, residuals

    def before_and_newest(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values of what was before the newest sequence, those of that, and their residuals.

        Each by itself: of two copies of an eigenvalue, the newest sequence has one of its own.
        """
        values, vectors = self._ritz(self.part == BEFORE, self.part == NEWEST)
        newest = vectors[self.part == NEWEST].any(0)
        return values[~newest], values[newest], np.abs(self.coupling @ vectors)[newest]

    def restart(self, choose: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Vectors, as columns, from which to go on: see `KrylovSpace.compress`."""
        self.restarts.append(self._start_in_ritz_vectors())
        values, vectors = self._ritz(self.part == BEFORE, self.part == NEWEST)
        chosen, locked = choose(values), np.flatnonzero(vectors[self.part == LOCKED].any(0))
        others = np.setdiff1d(chosen, locked, assume_unique=True)
        return vectors[:, np.append(locked, others)[: len(chosen)]]

    def overlooked(self, points: np.ndarray, P: int) -> np.ndarray:
        """Chance that A has an eigenvalue at `points` (m,), each, of which the space does not know.

        Of an eigenvector `u` with eigenvalue `λ`, ``uᵀ A Q = uᵀ (Q T + q cᵀ)`` gives
        ``u·q_0 = (u·q) e_0ᵀ (λ - T)⁻¹ c``. The second factor is the largest part of the start `q_0`
        that `u` can be, and restarts multiply such factors. Of a random unit vector (P,) it is at
        most `ε` with a probability of at most ``ε sqrt(2P/π)``.
        """
        share = np.ones(len(points))
        for values, weights in (*self.restarts, self._start_in_ritz_vectors()):
            with np.errstate(divide="ignore", invalid="ignore"):
                factors = np.abs((weights / (points[:, None] - values)).sum(1))
            share *= np.where(np.isnan(factors), 1.0, factors)
        return np.minimum(1.0, share * math.sqrt(2 * P / math.pi))

    def _ritz(self, *parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ascending Ritz values and vectors of what is locked, and of each of some other parts."""
        values, vectors = np.diag(self.T).copy(), np.eye(self.size)
        for rows in map(np.flatnonzero, parts):
            block = np.ix_(rows, rows)
            values[rows], vectors[block] = np.linalg.eigh(self.T[block])
        order = np.argsort(values, kind="stable")
        return values[order], vectors[:, order]

    def _start_in_ritz_vectors(self) -> np.ndarray:
        """Ritz values, and coupling times part in the start of each vector: (2, size)."""
        values, vectors = np.linalg.eigh(self.T)
        return np.stack([values, vectors[self.first] * (self.coupling @ vectors)])


class KrylovSpace:
    """``A Q = Q T + q cᵀ``: an orthonormal basis `Q`, a vector `q` orthogonal to it, and `c`.

    Products come in by turns of `extend`, which says what to multiply, and `expand`; after every
    `expand`, `projection` has `T` and `c`.
    """

    def __init__(self, A: MatrixLike, ncv: int, v0: Tensor | None, seed: int) -> None:
        self.ncv = ncv
        self.matvecs = 0
        self.basis = Basis(A, min(ncv + 1, A.shape[0]), seed)
        self.projection = Projection()
        self.rounding = 0.0  # of a product, as a norm
        self.exhausted = False  # the space is invariant, up to rounding
        self._scale = 0.0  # of A, as large as it was ever seen
        self._combined = 0  # how often the basis was combined anew
        self._next = self.basis.random()  # q, not yet of unit length
        if v0 is not None:
            start, columns = _start(v0, A)[self.basis.shard], v0[..., None].shape[1]
            share = self.basis.norm(start) / self.basis.norm(self._next)
            self._next = start + self._next * (share / columns**0.5).to(start)

    @property
    def size(self) -> int:
        """Number of basis vectors whose products are known."""
        return self.projection.size

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
            start = self.basis.random()
            # What is left of the last product may be more than rounding, and is not to be lost.
            left, length = self.basis.norm(self._next), self.basis.norm(start)
            self._begin(start.add_(self._next * (length / left).nan_to_num(posinf=0.0).to(start)))
        return self.basis.append(self._next)

    def expand(self, product: Tensor) -> bool:
        """Take in the `product` of A and the last basis vector; False if it is not finite."""
        self._next = product[self.basis.shard].clone()
        self.matvecs += 1
        coefficients, beta = self.basis.orthogonalise(self._next)
        if not (math.isfinite(beta) and np.isfinite(coefficients).all()):
            return False
        known, dtype = self.projection, self.basis.room.dtype
        seen = (known.T, known.coupling, coefficients)
        self._scale = max(self._scale, beta, *(np.abs(x).max(initial=0.0) for x in seen))
        differences = np.abs(coefficients[:-1] - known.coupling)
        defect = float((differences - known.residuals).max(initial=0.0))
        require_small_asymmetry(defect, self._scale, dtype)
        known.grow(coefficients, beta)
        # What the products of two vectors disagree by is rounding that was seen.
        rounding = 10 * torch.finfo(dtype).eps * self._scale
        self.rounding = max(self.rounding, rounding, defect)
        self.exhausted = beta <= self.rounding or self.size == self.basis.P
        return True

    def compress(self, choose: Callable[[np.ndarray], np.ndarray]) -> None:
        """Keep as many Ritz vectors as `choose` takes indices of the ascending values.

        They are the first of those chosen, after all that are locked, to which others are coupled
        otherwise than by `c`. Those of the newest sequence are not mixed with what was before it.
        """
        self._keep(self.projection.restart(choose))

    def lock(self, vectors: np.ndarray, residuals: np.ndarray) -> None:
        """Keep some Ritz vectors only, given as columns, and begin a new sequence beside them."""
        start = self.basis.random()
        # Orthogonal to all that was found, it has more of what was not.
        self.basis.orthogonalise(start)
        self._keep(vectors)
        self.projection.part[:], self.projection.residuals = LOCKED, residuals
        self._begin(start)

    def _begin(self, start: Tensor) -> None:
        self.projection.begin()
        self._next, self.exhausted = start, False
        self.basis.orthogonalise(self._next)

    def _keep(self, vectors: np.ndarray) -> None:
        self.basis.replace(self.basis.combine(vectors))
        self.projection.keep(vectors)
        self._combined += 1

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` takes, between an `expand` and the next `extend`."""
        known = self.projection
        counters = [self.matvecs, self.rounding, self._scale, self.exhausted]
        counters += [self._combined, known.first]
        return {
            "basis": self.basis.rows.cpu().numpy(),
            "next": self._next.cpu().numpy(),
            "T": known.T,
            "coupling": known.coupling,
            "part": known.part,
            "residuals": known.residuals,
            "restarts": np.reshape(known.restarts, (-1, 2, self.ncv)),
            "counters": np.array(counters, dtype=np.float64),
            "generator": self.basis.generator.get_state().numpy(),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Be as the space was whose `state` this is."""
        size = min(len(state.get("coupling", ())), self.ncv)
        numbers, entries = np.zeros(size), len(self._next)
        blank = {
            "basis": np.zeros((size, entries)),
            "next": np.zeros(entries),
            "T": np.zeros((size, size)),
            "coupling": numbers,
            "part": numbers.astype(int),
            "residuals": numbers,
            "restarts": np.zeros((len(state.get("restarts", ())), 2, self.ncv)),
            "counters": np.zeros(6),
            "generator": self.basis.generator.get_state().numpy(),
        }
        state = filled(blank, state)
        matvecs, self.rounding, self._scale, *others = state["counters"].tolist()
        self.matvecs, (exhausted, self._combined, first) = int(matvecs), map(int, others)
        self.exhausted = bool(exhausted)
        self.projection = Projection(
            state["T"],
            state["coupling"],
            state["part"],
            state["residuals"],
            first=first,
            restarts=list(state["restarts"]),
        )
        self.basis.replace(torch.from_numpy(state["basis"]))
        self.basis.generator.set_state(torch.from_numpy(state["generator"]))
        self._next = torch.from_numpy(state["next"]).to(self._next)


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
