"""Curvature matrices of a training objective as symmetric linear operators."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from analysis.curvature.captured import RowProducts, make_recorder, on_stream_of
from analysis.curvature.compiled import CompiledProduct
from analysis.curvature.frozen import Chunk, Data, FrozenLoss, LossFunction
from analysis.curvature.graphs import LinearMap
from analysis.curvature.sharing import Plan, make_plan, runs_python
from analysis.parameters import flatten, unflatten_rows
from analysis.threads import MOST_THREADS, free_threads, give_way, parallel
from models.devices import full_precision
from models.distributed import ALONE, Team
from models.errors import InputError
from models.memory import is_out_of_memory, make_room
from models.seeds import derive_seed

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator
    from typing_extensions import Self

MEMORY = 2 * 1024**3  # default budget on a CPU for what is kept and for threads, in bytes


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
        some of the chunks; default: 2 GiB, on a GPU half of what is free. Where it is more than
        there is, it is halved, and threads or else the examples in one pass become fewer.
    compile
        Record one product, and compile what depends on the vector: a minute or so for the shape of
        the first chunk of data (others go without), repaid after some thousand products. What is
        recorded is double backward: of PyTorch's ways to a second derivative some are wrong, and
        compiling does not mend them.
    capture
        On a GPU, products that are not compiled are recorded as a CUDA graph where what they have
        in common is kept, and replayed for each vector: the same kernels, launched all at once. It
        holds on to the memory that a product takes. What cannot be recorded is said in a warning.
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
        memory: int | None = None,
        compile: bool = False,
        capture: bool = True,
        team: Team = ALONE,
    ) -> None:
        self._objective = FrozenLoss(
            model, loss_fn, data, params=params, seed=seed, micro_batch=micro_batch, team=team
        )
        self.team = team
        self._parameters = self._objective.parameters
        self._weight_decay = weight_decay
        self._seed = seed
        self._memory = default_memory(self._objective.device) if memory is None else memory
        self._kept: dict[int, LinearMap] = {}  # of the chunks with these numbers
        self._made_plan: Plan | None = None  # at the first product
        self._threads_failed = False  # for want of memory
        size = sum(parameter.numel() for parameter in self._parameters.values())
        self.shape = (size, size)
        self.dtype = self._objective.dtype
        self.device = self._objective.device
        self._recorder = make_recorder(self.device) if capture else None
        self._compiled: CompiledProduct | None = None
        if compile and self._objective.chunks:
            self._compiled = self._compile(self._objective.chunks[0])

    def on(self, data: Data, *, seed: int = 0) -> Self:
        """The same operator of other data, which shares what has been compiled."""
        other = copy.copy(self)
        other._objective = self._objective.on(data, seed)
        other._kept, other._made_plan = {}, None
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

        Not where Python code runs in them, as with hooks and with checkpointing: threads would meet
        in it. What the first chunk of data does counts for all.
        """
        first = next(self._linear_maps(range(len(self._objective.chunks))), None)
        return first is not None and self._threadable(first)

    def _threadable(self, linear_map: LinearMap) -> bool:
        zeros = [torch.zeros_like(parameter) for parameter in self._parameters.values()]
        return not runs_python(lambda: linear_map.apply(zeros, False))

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
        while True:
            try:
                product = self._product_of_own_data(rows)
                return self.team.sum_(product).add_(rows, alpha=self._weight_decay)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                threads = 1 if self._made_plan is None else len(self._shares(len(rows)))
                smaller = self._objective if threads > 1 else self._objective.halved()
                if smaller is None:
                    raise
            longest = max(len(chunk.x) for chunk in self._objective.chunks)
            make_room(type(self).__name__, threads * longest)
            self._threads_failed |= threads > 1
            self._objective, self._memory = smaller, self._memory // 2
            self._kept, self._made_plan = {}, None

    def _product_of_own_data(self, rows: Tensor) -> Tensor:
        def product_of(share: Sequence[int]) -> Tensor:
            product = torch.zeros_like(rows)
            for linear_map in self._linear_maps(share):
                self._add_product(product, linear_map, rows)
                del linear_map  # before the next one is built
            return product

        shares = self._shares(len(rows))
        parts = dict(parallel(product_of, shares, min(len(shares), free_threads())))
        product = parts.pop(0)
        for i in range(1, len(shares)):  # in one order
            product += parts.pop(i)
        return product

    def _add_product(self, product: Tensor, linear_map: LinearMap, rows: Tensor) -> None:
        """Add the products of a chunk with all vectors to the rows of `product`."""
        if linear_map.add_products is not None:
            linear_map.add_products(product, rows)
            return
        # One pass for the whole block takes longer on a CPU: intermediate results, so many times
        # larger, leave the cache, and no kernel is too short to be worth its launch.
        pieces = unflatten_rows(rows, self._parameters)
        for index, row in enumerate(product):
            give_way()
            row += flatten(linear_map.apply([piece[index] for piece in pieces], False))

    def _shares(self, vectors: int) -> list[list[int]]:
        """Which chunks each thread takes in a product with so many vectors."""
        return self._plan().shares(self._vector_bytes(vectors))

    def _vector_bytes(self, vectors: int) -> int:
        """Of the sums of products, and of one in the making."""
        return (vectors + 2) * self.shape[0] * self.dtype.itemsize

    def _plan(self) -> Plan:
        if self._made_plan is None:
            self._made_plan = self._make_plan()
        return self._made_plan

    def _make_plan(self) -> Plan:
        lengths = [len(chunk.x) for chunk in self._objective.chunks]
        if len(lengths) < 2:
            return Plan(lengths, kept=len(lengths))  # costs no more than the product itself
        first = self._kept[0] = self._make_linear_map(self._objective.chunks[0])
        threads = min(free_threads(), MOST_THREADS)
        if (
            self.device.type != "cpu"
            or self._compiled is not None
            or self._threads_failed
            or (threads > 1 and not self._threadable(first))
        ):
            threads = 1
        per_example = first.size() / lengths[0]
        return make_plan(lengths, per_example, self._vector_bytes(1), self._memory, threads)

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

    def _linear_maps(self, share: Sequence[int]) -> Iterator[LinearMap]:
        """Those of some chunks, kept from the last time or made."""
        kept = self._plan().kept
        for i in share:
            linear_map = self._kept.pop(i, None) or self._make_linear_map(self._objective.chunks[i])
            if i < kept:
                self._kept[i] = linear_map
            yield linear_map
            del linear_map  # before the next one is built

    def _make_linear_map(self, chunk: Chunk) -> LinearMap:
        if self._compiled is not None and self._compiled.fits(chunk):
            made, recorder = self._compiled.linear_map(chunk), None
        else:
            recorder = self._recorder
            with on_stream_of(recorder):
                made = self._linear_map(chunk)
        if self.device.type == "cpu":
            return made
        return replace(made, add_products=RowProducts(made, self._parameters, recorder).add_to)

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


def default_memory(device: torch.device) -> int:
    """Bytes for what products have in common: half of what is free on a GPU, else `MEMORY`."""
    if device.type != "cuda":
        return MEMORY
    free, _ = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + idle) // 2


def asymmetry(u: Tensor, Au: Tensor, v: Tensor, Av: Tensor) -> float:
    """``‖(A - Aᵀ)v‖ / ‖Av‖``, estimated with the rows of random `u` and `v`, all (n, P)."""
    Au, Av = Au.double(), Av.double()
    return _ratio(((u * Av).sum(1) - (v * Au).sum(1)).norm(), Av.norm())


def _ratio(part: Tensor, whole: Tensor) -> float:
    """Quotient of two norms; nothing out of nothing is no error."""
    return 0.0 if part == 0 and whole == 0 else float(part / whole)


def _smaller(a: float, b: float) -> float:
    return b if math.isnan(a) or b < a else a
