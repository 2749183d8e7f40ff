"""Curvature matrices of a training objective as symmetric linear operators."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from analysis.curvature.compiled import CompiledProduct
from analysis.curvature.frozen import Chunk, Data, FrozenLoss, LossFunction
from analysis.curvature.graphs import LinearMap
from analysis.parameters import flatten
from analysis.threads import MOST_THREADS, free_threads, give_way, parallel
from models.devices import full_precision
from models.distributed import ALONE, Team
from models.errors import InputError
from models.memory import is_out_of_memory, make_room
from models.seeds import derive_seed

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator
    from typing_extensions import Self

MEMORY = 2 * 1024**3  # default budget for what is kept and for threads, in bytes


@dataclass(frozen=True)
class Check:
    """How far an operator is from being the symmetric derivative that it claims to be."""

    symmetry: float  # ‖(A - Aᵀ)v‖ / ‖Av‖, estimated with random vectors
    finite_difference: float  # ‖Av - central difference‖ / ‖Av‖
    tolerance: float  # of both, from the precision of the operator

    @property
    def ok(self) -> bool:
        """Whether both errors are finite and within the tolerance."""
        return self.symmetry <= self.tolerance and self.finite_difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"asymmetric by {self.symmetry:.1e} and off finite differences by "
            f"{self.finite_difference:.1e}, expected at most {self.tolerance:.1e}"
        )


@dataclass(frozen=True)
class Plan:
    """How chunks of data are worked through."""

    kept: int  # so many, the first, keep what products have in common
    workers: int  # threads of a CPU that each take some of the chunks


class CurvatureOperator(ABC):
    """A symmetric (P, P) matrix, known by its products with vectors: ``A @ v``.

    It belongs to the mean loss over all of `data` at the present parameters of `model`, plus
    ``weight_decay/2 * |theta|^2``. What does not depend on the vector is computed at the first
    product and kept, within a budget of memory; beyond it, it is computed again every time.
    No call changes the model: parameters, buffers, gradients and training mode stay as they are.
    Change the parameters, and the operator is void: make a new one.

    Parameters
    ----------
    model
        Any module from a tensor of inputs to a tensor of outputs, in the mode (training or
        evaluation) it is to be measured in.
    loss_fn
        ``loss_fn(outputs, targets)`` is a scalar, the mean over the batch.
    data
        One ``(x, y)`` or an iterable of them, with the examples along the first dimension. It is
        read once; ragged batches count by their number of examples.
    weight_decay
        Adds this multiple of the identity.
    params
        Regular expression: only parameters in whose name it is found are variables. None: all.
    seed
        Of whatever is random in the forward pass. It is drawn once per batch and frozen.
    micro_batch
        Largest number of examples in one pass; None chooses by device.
    memory
        Budget in bytes for what is kept between products and, on a CPU, for threads that each take
        some of the chunks. Where it is more than there is, batches are halved, and the budget, too.
    compile
        Record one product, and compile what depends on the vector: a minute or so for the shape of
        the first chunk of data (others go without), repaid after some thousand products. What is
        recorded is double backward: of PyTorch's ways to a second derivative some are wrong, and
        compiling does not mend them.
    team
        Processes that share the data, each with the same arguments. They make all products together
        and all get the whole result, for one sum over the processes.

    Raises
    ------
    InputError
        No data, no matching parameter, or a `micro_batch` that would change the result.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Data,
        *,
        weight_decay: float = 0.0,
        params: str | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
        memory: int = MEMORY,
        compile: bool = False,
        team: Team = ALONE,
    ) -> None:
        self._objective = FrozenLoss(
            model, loss_fn, data, params=params, seed=seed, micro_batch=micro_batch, team=team
        )
        self.team = team
        self._parameters = self._objective.parameters
        self._weight_decay = weight_decay
        self._seed = seed
        self._memory = memory
        self._kept: dict[int, LinearMap] = {}  # of the chunks with these numbers
        self._plan: Plan | None = None  # from the first product on
        size = sum(parameter.numel() for parameter in self._parameters.values())
        self.shape = (size, size)
        self.dtype = self._objective.dtype
        self.device = self._objective.device
        self._compiled: CompiledProduct | None = None
        if compile and self._objective.chunks:
            self._compiled = self._compile(self._objective.chunks[0])

    def on(self, data: Data, *, seed: int = 0) -> Self:
        """The same operator of other data, which shares what has been compiled."""
        other = copy.copy(self)
        other._objective = self._objective.on(data, seed)
        other._kept, other._plan = {}, None
        return other

    def kept_bytes(self) -> int | None:
        """Size of what products have in common, None unless all of it is kept by now."""
        if len(self._kept) < len(self._objective.chunks):
            return None
        return sum(linear_map.size() for linear_map in self._kept.values())

    def draws(self) -> bool:
        """Whether the forward pass draws random numbers, which are frozen here."""
        return any(map(self._objective.draws, self._objective.chunks[:1]))

    def threadable(self) -> bool:
        """Whether products may be made by several threads of a CPU at once.

        Not where threads would meet in the model, which products call that are, as with
        checkpointing, computed once more, and not in a mode that belongs to this thread.
        """
        return self._threadable(next(self._linear_maps()))

    def _threadable(self, linear_map: LinearMap) -> bool:
        called = []
        hook = register_module_forward_pre_hook(lambda *_: called.append(True))
        try:
            linear_map.apply([torch.zeros_like(p) for p in self._parameters.values()], False)
        finally:
            hook.remove()
        modules = self._objective.model.modules()
        hooked = any(m._backward_hooks or m._backward_pre_hooks for m in modules)
        return not (called or hooked or torch.is_autocast_enabled("cpu"))

    @abstractmethod
    def _linear_map(self, chunk: Chunk) -> LinearMap:
        """Everything about a chunk that products have in common, weighted by its share."""

    @abstractmethod
    def _difference(self, objective: FrozenLoss, direction: Tensor, step: float) -> Tensor:
        """Product with `direction` in which a derivative is replaced by a central difference."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Product with a vector (P,) or with the columns of a matrix (P, k)."""
        if vectors.ndim not in (1, 2) or len(vectors) != self.shape[1]:
            raise InputError(
                f"{type(self).__name__} @ v: v of shape {tuple(vectors.shape)}, "
                f"expected ({self.shape[1]},) or ({self.shape[1]}, k)"
            )
        if vectors.dtype != self.dtype:
            raise InputError(
                f"{type(self).__name__} @ v: v of dtype {vectors.dtype}, expected {self.dtype}"
            )
        if vectors.ndim == 1:
            return self._product(vectors[None])[0]
        return self._product(vectors.T.contiguous()).T

    @full_precision()
    def _product(self, rows: Tensor) -> Tensor:
        give_way()
        while True:
            try:
                product = self._product_of_own_data(rows)
                return self.team.sum_(product).add_(rows, alpha=self._weight_decay)
            except (RuntimeError, MemoryError) as error:
                smaller = self._objective.halved() if is_out_of_memory(error) else None
                if smaller is None:
                    raise
            make_room(type(self).__name__, max(len(c.x) for c in self._objective.chunks))
            self._objective, self._memory = smaller, self._memory // 2
            self._kept, self._plan = {}, None

    def _product_of_own_data(self, rows: Tensor) -> Tensor:
        pieces = _unflatten_rows(rows, self._parameters)
        if self._plan is None:
            self._plan = self._make_plan()
        workers = self._plan.workers

        def share(worker: int) -> Tensor:
            """Of every so many-th chunk."""
            product = torch.zeros_like(rows)
            for linear_map in self._linear_maps(worker, workers):
                self._add_product(product, linear_map, pieces)
                del linear_map  # before the next one is built
            return product

        parts = dict(parallel(share, range(workers), workers))
        return reduce(torch.add, (parts[worker] for worker in range(workers)))  # in one order

    def _add_product(self, product: Tensor, linear_map: LinearMap, pieces: list[Tensor]) -> None:
        """Add the products of a chunk with all vectors to the rows of `product`."""
        if self.device.type != "cpu" and len(product) > 1:
            found = [piece.flatten(1) for piece in linear_map.apply(pieces, True)]
            product += torch.cat(found, dim=1)
            return
        # One pass for the whole block takes longer on a CPU: intermediate results, so many times
        # larger, leave the cache, and no kernel is too short to be worth its launch.
        for index, row in enumerate(product):
            give_way()
            row += flatten(linear_map.apply([piece[index] for piece in pieces], False))

    def _make_plan(self) -> Plan:
        """Keep as much, and set as many threads to work, as the budget allows.

        Made before the first product, so that rounding is the same in all. There is but one thread
        where several would meet in the model, or know nothing of a mode of this one.
        """
        chunks = self._objective.chunks
        if len(chunks) < 2:
            return Plan(kept=len(chunks), workers=1)  # costs no more than the product itself
        first = self._make_linear_map(chunks[0])
        per_example = first.size() / len(chunks[0].x)
        sizes = np.cumsum([per_example * len(chunk.x) for chunk in chunks])
        # A thread makes one where it is not kept, and a backward pass takes about as much again.
        at_work = max(2 * per_example * max(len(chunk.x) for chunk in chunks), 1)
        # Keeping all is worth more than threads are, and they more than keeping some.
        spare = self._memory - sizes[-1] if sizes[-1] <= self._memory else self._memory / 2
        workers = min(free_threads(), MOST_THREADS, len(chunks), int(spare / at_work))
        if (
            workers < 2
            or self.device.type != "cpu"
            or self._compiled is not None
            or not self._threadable(first)
        ):
            workers = 1
        left = self._memory - workers * at_work if workers > 1 else self._memory
        kept = int(np.searchsorted(sizes, left, side="right"))
        if kept:
            self._kept[0] = first
        return Plan(kept, workers)

    def to_scipy(self) -> LinearOperator:
        """The operator for `scipy.sparse.linalg`, which takes and returns NumPy arrays."""
        from scipy.sparse.linalg import LinearOperator

        def product(array: np.ndarray) -> np.ndarray:
            vectors = torch.as_tensor(array, dtype=self.dtype, device=self.device)
            return (self @ vectors).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape,
            matvec=product,
            rmatvec=product,
            matmat=product,
            rmatmat=product,
            dtype=dtype,
        )

    @full_precision()
    def check(self) -> Check:
        """Verify the operator against its definition along random directions.

        Derivatives can be wrong without a word, and such a matrix is usually not symmetric.
        The symmetry error is the root mean square of ``u·Av - v·Au`` over three random pairs,
        relative to its size for an antisymmetric `A`. The direction of the finite difference is a
        random one, multiplied by `A` once so that curvature stands out against rounding. The
        difference is taken in float64 where the model allows it: with smaller steps, fewer ReLUs
        change sides. The smallest error over a range of steps counts, since no step makes a false
        derivative agree.
        """
        generator = torch.Generator().manual_seed(derive_seed(self._seed, 0xC))
        pairs = torch.randn(2, 3, self.shape[0], generator=generator, dtype=torch.float64)
        u, v = pairs.to(self.device, self.dtype)
        Au, Av = (torch.stack([self @ row for row in block]) for block in (u, v))
        symmetry = asymmetry(u, Au, v, Av)

        objective = self._objective.in_float64()
        precision = torch.finfo(objective.dtype).eps
        tolerance = max(torch.finfo(self.dtype).eps ** 0.5, precision ** (1 / 3))
        direction = (Av[0] / Av[0].norm() if Av[0].any() else v[0].double()).to(self.dtype)
        exact = (self @ direction).to(objective.dtype)
        scale = max(1.0, float(flatten(objective.parameters.values()).detach().norm()))
        error = math.nan
        for halvings in range(0, 18, 2):
            step = scale * precision ** (1 / 3) * 2.0**-halvings
            difference = self._difference(objective, direction.to(objective.dtype), step)
            error = _smaller(error, _ratio((difference - exact).norm(), exact.norm()))
            if error <= tolerance:
                break
        return Check(symmetry, error, tolerance)

    def _linear_maps(self, first: int = 0, step: int = 1) -> Iterator[LinearMap]:
        """Those of every `step`-th chunk, kept from the last time or made."""
        if self._plan is None:
            self._plan = self._make_plan()
        chunks = self._objective.chunks
        for i in range(first, len(chunks), step):
            linear_map = self._kept.get(i) or self._make_linear_map(chunks[i])
            if i < self._plan.kept:
                self._kept[i] = linear_map
            yield linear_map
            del linear_map  # before the next one is built

    def _make_linear_map(self, chunk: Chunk) -> LinearMap:
        if self._compiled is not None and self._compiled.fits(chunk):
            return self._compiled.linear_map(chunk)
        return self._linear_map(chunk)

    def _compile(self, chunk: Chunk) -> CompiledProduct:
        def product(chunk: Chunk, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
            return self._linear_map(chunk).apply(vectors, False)

        compiled = CompiledProduct(self._objective, product, chunk)
        generator = torch.Generator().manual_seed(self._seed)
        parameters = self._parameters.values()
        vectors = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
        found = flatten(compiled.linear_map(chunk).apply(vectors, False))
        exact = flatten(product(chunk, vectors))
        error = float((found - exact).norm() / exact.norm())
        if not error <= torch.finfo(self.dtype).eps ** 0.5:
            raise InputError(f"compile: products are off by {error:.1e}, use the operator without")
        return compiled


def _unflatten_rows(rows: Tensor, like: dict[str, Tensor]) -> list[Tensor]:
    pieces = rows.split([tensor.numel() for tensor in like.values()], dim=1)
    return [
        piece.reshape(len(rows), *tensor.shape)
        for piece, tensor in zip(pieces, like.values(), strict=True)
    ]


def asymmetry(u: Tensor, Au: Tensor, v: Tensor, Av: Tensor) -> float:
    """``‖(A - Aᵀ)v‖ / ‖Av‖``, estimated with the rows of random `u` and `v`, all (n, P)."""
    Au, Av = Au.double(), Av.double()
    return _ratio(((u * Av).sum(1) - (v * Au).sum(1)).norm(), Av.norm())


def _ratio(part: Tensor, whole: Tensor) -> float:
    """Quotient of two norms; nothing out of nothing is no error."""
    return 0.0 if part == 0 and whole == 0 else float(part / whole)


def _smaller(a: float, b: float) -> float:
    return b if math.isnan(a) or b < a else a
