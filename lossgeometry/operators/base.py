"""Curvature matrices of a training objective as symmetric linear operators."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lossgeometry.batches import Chunk, Count, Data, Forward
from lossgeometry.errors import InputError
from lossgeometry.objective import FrozenLoss, LossFunction
from lossgeometry.operators.captured import RowProducts, make_recorder, on_stream_of
from lossgeometry.operators.checking import Check, against_differences
from lossgeometry.operators.compiled import CompiledProduct
from lossgeometry.operators.graphs import LinearMap
from lossgeometry.operators.sharing import Plan, make_plan, runs_python
from lossgeometry.parameters import flatten, unflatten_rows
from lossgeometry.plainly import require_derivatives
from lossgeometry.reduction import draws
from lossgeometry.running.devices import default_memory, full_precision
from lossgeometry.running.distributed import ALONE, Team
from lossgeometry.running.memory import is_out_of_memory, make_room
from lossgeometry.running.threads import MOST_THREADS, free_threads, give_way, parallel
from lossgeometry.seeds import derive_seed
from lossgeometry.symmetry import asymmetry

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator
    from typing_extensions import Self


class CurvatureOperator(ABC):
    """A symmetric (P, P) matrix, known by its products with vectors: ``A @ v``.

    It belongs to the mean loss over all of `data` at the present parameters of `model`, plus
    ``weight_decay/2 * |theta|^2``. A vector has the entries of all variables, in the order of
    ``model.named_parameters()``; `eigenvector_directions` makes tensors of it. What does not depend
    on the vector is computed at the first product and kept, within a budget of memory; beyond it,
    it is computed again every time. No call changes the model: parameters, buffers, gradients and
    training mode stay as they are. Change the parameters, and the operator is void: make a new one.

    Parameters
    ----------
    model
        Any module, in the mode (training or evaluation) it is to be measured in. Variables are its
        parameters that require gradients, constants those that do not: ``model.requires_grad_()``
        includes all. `FunctionModule` makes a model of a function of parameters.
    loss_fn
        ``loss_fn(outputs, targets)`` is a scalar. Of a mean over examples, the mean over all of
        `data` is taken, of a sum the sum; which it is, is found out. Any other loss (weighted,
        contrasting) is averaged over the batches as they are. None: the model itself computes it,
        as ``outputs.loss`` or ``outputs["loss"]``, or its output is one. What a loss takes of the
        model besides its outputs, such as a penalty on weights, is for `forward` to return.
    data
        A batch, or an iterable of them (a list, a DataLoader), read once. A batch is ``(inputs,
        targets)`` with the examples along the first dimension; inputs are a tensor, a tuple or a
        mapping, for ``model(*inputs)`` or ``model(**inputs)``; targets are what the loss takes. Or
        it is a mapping, for ``model(**batch)`` and ``loss_fn(outputs, batch)``. A batch without a
        tensor at its top is given in a list. Ragged batches count by their number of examples.
    weight_decay
        Adds this multiple of the identity.
    params
        Regular expression: only parameters in whose name it is found are variables. None: all.
    forward
        ``forward(model, batch)`` returns the outputs, for batches of any other kind. Of those that
        are no pairs, the loss is given the whole batch for targets.
    count
        ``count(batch)`` is the number of what the loss of a batch, or of a part of one, is the mean
        over, such as tokens that are not ignored. None: examples.
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
        No data, no matching parameter, a loss that uses the parameters of the model itself, or a
        `micro_batch` that would change the result; of a product, vectors of another shape or dtype.

    See Also
    --------
    Hessian : of the loss.
    GGN : without the curvature of the network itself.
    Fisher : from the gradients of single examples.
    SymmetricOperator : what `eigsh` and `trace` ask of any other.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import Hessian
    >>> H = Hessian(model, mse_loss, data)
    >>> H.shape, (H @ torch.eye(2)).tolist()
    ((2, 2), [[1.0, 0.0], [0.0, 4.0]])
    >>> H.to_scipy() @ [1.0, 1.0]
    array([1., 4.], dtype=float32)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        data: Data,
        *,
        weight_decay: float = 0.0,
        params: str | None = None,
        forward: Forward | None = None,
        count: Count | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
        memory: int | None = None,
        compile: bool = False,
        capture: bool = True,
        team: Team = ALONE,
    ) -> None:
        self._objective = FrozenLoss(
            model,
            loss_fn,
            data,
            params=params,
            forward=forward,
            count=count,
            seed=seed,
            micro_batch=micro_batch,
            team=team,
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

    def in_float64(self) -> Self:
        """The same operator in double precision, or as it is where the model does not allow that.

        It does not if it insists on a dtype, or draws other random numbers in another one.
        """
        other = copy.copy(self)
        other._objective = self._objective.in_float64()
        other._parameters, other.dtype = other._objective.parameters, other._objective.dtype
        other._kept, other._made_plan, other._compiled = {}, None, None
        return other

    def kept_bytes(self) -> int | None:
        """Size of what products have in common, None unless all of it is kept by now."""
        if len(self._kept) < len(self._objective.chunks):
            return None
        return sum(linear_map.size() for linear_map in self._kept.values())

    def draws(self) -> bool:
        """Whether the forward pass draws random numbers, which are frozen here."""
        return any(draws(self._objective, chunk) for chunk in self._objective.chunks[:1])

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
    def _difference(
        self, objective: FrozenLoss, direction: Tensor, ahead: float, behind: float
    ) -> Tensor:
        """Product with `direction`, a derivative being replaced by a difference of two steps."""

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Product with a vector (P,) or with the columns of a matrix (P, k)."""
        require_columns(self, vectors)
        if vectors.dtype != self.dtype:
            raise InputError(
                f"{type(self).__name__} @ v: v of dtype {vectors.dtype}, expected {self.dtype}"
            )
        if vectors.ndim == 1:
            return self._product(vectors[None])[0]
        return self._product(vectors.T.contiguous()).T

    @full_precision()
    def _product(self, rows: Tensor) -> Tensor:
        require_derivatives()
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
            longest = max(chunk.size for chunk in self._objective.chunks)
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
        lengths = [chunk.size for chunk in self._objective.chunks]
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
        relative to its size for an antisymmetric `A`. Finite differences are taken along a random
        direction, multiplied by `A` once so that curvature stands out against rounding, and along
        one that is not, in which what is wrong where there is less curvature stands out. They are
        taken in float64 where the model allows it: with smaller steps, fewer ReLUs change sides.
        The smallest error over a range of steps counts, since no step makes a false derivative
        agree. Where none agrees, the differences must at least agree with each other, those of
        both sides and of half the step: otherwise there is no derivative here, and nothing is said
        about the operator.
        """
        generator = torch.Generator().manual_seed(derive_seed(self._seed, 0xC))
        pairs = torch.randn(2, 3, self.shape[0], generator=generator, dtype=torch.float64)
        u, v = pairs.to(self.device, self.dtype)
        Au, Av = (torch.stack([self @ row for row in block]).double() for block in (u, v))
        symmetry = asymmetry(u, Au, v, Av)

        objective = self._objective.in_float64()
        precision = self._precision(objective)
        tolerance = max(torch.finfo(self.dtype).eps ** 0.5, precision ** (1 / 3))
        scale = max(1.0, float(flatten(objective.parameters.values()).detach().norm()))
        steps = [scale * precision ** (1 / 3) * 2.0**-halvings for halvings in range(0, 18, 2)]

        def compared(direction: Tensor, exact: Tensor, rounding: float) -> tuple[float, bool]:
            along = direction.to(objective.dtype)

            def difference(ahead: float, behind: float) -> Tensor:
                return self._difference(objective, along, ahead, behind).double()

            return against_differences(difference, exact, steps, tolerance, rounding)

        direction = (Av[0] / Av[0].norm() if Av[0].any() else v[0]).to(self.dtype)
        exact = (self @ direction).double()
        if not exact.any() and self._moves_without_gradient(objective, direction, scale):
            return Check(symmetry, math.inf, tolerance)
        error, smooth = compared(direction, exact, 0.0)
        if error <= tolerance:
            length = v[0].norm()
            rounding = 10 * torch.finfo(self.dtype).eps * float(exact.norm())
            off, agreeing = compared(v[0] / length, Av[0] / length, rounding)
            if agreeing and off > tolerance:
                error, smooth = off, True
        return Check(symmetry, error, tolerance, smooth)

    def _precision(self, objective: FrozenLoss) -> float:
        """Unit roundoff of the loss, the same for all of a team."""
        found = torch.zeros(2, dtype=torch.float64, device=self.device)
        for chunk in objective.chunks[:1]:
            with objective.observed(chunk) as outputs:
                _, found[0] = objective.losses_and_precision(outputs, chunk.targets)
                found[1] = 1
        total, processes = self.team.sum_(found).tolist()
        return total / processes

    def _moves_without_gradient(
        self, objective: FrozenLoss, direction: Tensor, scale: float
    ) -> bool:
        """Whether the loss changes though all derivatives are zeros: a graph has been cut."""
        step = scale * torch.finfo(objective.dtype).eps ** (1 / 3)
        there = objective.displaced(direction.to(objective.dtype), step)
        here, gradient = objective.value_and_gradient()
        found = torch.stack([objective.value_and_gradient(there)[0] - here, gradient.norm()])
        moved, slope = self.team.sum_(found.abs()).tolist()
        return moved > 0 and slope == 0

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


def require_columns(A: Any, vectors: Tensor) -> None:
    """Raise `InputError` unless `vectors` are what the operator `A`, (P, P), takes."""
    (P, _) = A.shape
    if vectors.ndim not in (1, 2) or len(vectors) != P:
        raise InputError(
            f"{type(A).__name__} @ v: v of shape {tuple(vectors.shape)}, expected ({P},) or "
            f"({P}, k)"
        )
