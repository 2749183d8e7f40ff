"""A loss of a model on fixed data, with fixed randomness, as a pure function of the parameters.

Operators, surfaces, paths and checks all ask one object, `FrozenLoss`: whatever it finds out about
a loss and a model holds for all of them.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lossgeometry.batches import (
    Batch,
    Chunk,
    Count,
    Data,
    Forward,
    as_batches,
    call,
    examples_in,
    is_pair,
    joined,
    map_tensors,
)
from lossgeometry.errors import InputError
from lossgeometry.functional import functional_call
from lossgeometry.parameters import flatten, select_parameters, unflatten, unwrapped
from lossgeometry.plainly import computing_plainly, require_derivatives
from lossgeometry.reduction import examine, normalises
from lossgeometry.running.distributed import ALONE, Team
from lossgeometry.seeds import derive_seed, seeded

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]

# Examples that pass through the model at once unless told otherwise. On a CPU more do not make the
# matrix products any faster but leave the cache; a GPU needs more to be busy. Without a backward
# pass less stays in the cache of a CPU core, and a GPU has room for more.
MICRO_BATCH = {"cpu": 32, "cuda": 256}
REGROUPED = {"cpu": 16, "cuda": 1024}

# Threads take turns with what they have in common: a model, which has one set of tensors at a time,
# PyTorch's generators, and its choice of kernels.
_turn = threading.RLock()


class FrozenLoss:
    """Losses of `model` over all of `data`, deterministic functions of the parameters.

    The model is used through `torch.func.functional_call`, with tensors that share the storage of
    its parameters and with copies of its buffers, and is never changed. Dropout, stochastic depth
    and all else that is random in a forward pass come from a seed that belongs to the batch.

    What is the mean over examples is told from what is their sum: the former is averaged over all
    data, the latter added up. Both may be computed in any pieces. Where neither is the case (the
    loss weighs or ignores targets, or contrasts examples), or the model draws random numbers or
    normalises over the batch, batches stay as they are delivered, and their losses are averaged.

    Parameters
    ----------
    model
        Its parameters that require gradients are variables, all others constants.
    losses
        ``fn(outputs, targets)`` is a scalar; by name, the first being that of `loss`. None: the
        model itself computes its loss, ``outputs.loss``.
    data
        A batch or an iterable of them, read once; see `CurvatureOperator`.
    params
        Regular expression on parameter names; the others are constants. None takes all.
    forward, count
        See `CurvatureOperator`.
    micro_batch
        Largest number of examples in one forward pass. None chooses by device, and takes batches as
        they are delivered where cutting them would change the result.
    regroup
        In evaluation mode, make batches of a size that suits values without curvature, as far as
        that does not change the result.
    team
        The processes that share the data: each has its own of the `chunks`, or none.

    Raises
    ------
    InputError
        No data, no parameter, or a `micro_batch` that would change the result.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: LossFunction | Mapping[str, LossFunction | None] | None,
        data: Data,
        *,
        params: str | None = None,
        forward: Forward | None = None,
        count: Count | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
        regroup: bool = False,
        team: Team = ALONE,
    ) -> None:
        selected = select_parameters(model, params)
        self.team = team
        self.model = unwrapped(model)
        named = losses if isinstance(losses, Mapping) else {"loss": losses}
        self._losses = {n: _own_loss if loss is None else loss for n, loss in named.items()}
        self._forward, self.count = forward, count
        self.compiled = any(
            hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
            for module in self.model.modules()
        )
        self.parameters = {
            name: parameter.detach().requires_grad_() for name, parameter in selected.items()
        }
        self._constants = {
            name: parameter.detach()
            for name, parameter in self.model.named_parameters()
            if name not in selected
        }
        first = next(iter(self.parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self._cast: Callable[[Tensor], Tensor] = lambda tensor: tensor
        if any(
            (p.dtype, p.device) != (first.dtype, first.device) for p in self.parameters.values()
        ):
            raise InputError("model: parameters of several dtypes or devices, expected one of each")
        self._micro_batch, self._regroup = micro_batch, regroup
        self.sums = dict.fromkeys(self._losses, False)  # losses that are no means but sums
        self._of_outputs: set[str] = set()  # losses that are known to depend on nothing else
        self.chunks = self._chunks(data, seed)

    def on(self, data: Data, seed: int) -> FrozenLoss:
        """The same function of the parameters on other data."""
        other = copy.copy(self)
        other.chunks = other._chunks(data, seed)
        return other

    # -- values ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def forward(
        self, chunk: Chunk, parameters: Mapping[str, Tensor] | None = None
    ) -> Iterator[Any]:
        """Model outputs of a chunk, here or at other parameters; inside, randomness is frozen."""
        # Only the math kernel of scaled_dot_product_attention has a second derivative.
        with (
            _turn,
            seeded(self.device, chunk.seed),
            computing_plainly(self.compiled),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield self.outputs(chunk, parameters or self.parameters)

    def outputs(
        self,
        chunk: Chunk,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor] | None = None,
        *,
        in_place: bool = False,
    ) -> Any:
        """Outputs at `parameters`; randomness and kernels are the caller's to choose.

        Batch normalisation in training mode writes to its buffers, and a graph that is kept must
        not see those of the next chunk: every pass has its own, unless `in_place`.
        """
        if buffers is None:
            buffers = dict(self.model.named_buffers())
        if not in_place:
            buffers = {name: self._cast(buffer.clone()) for name, buffer in buffers.items()}
        state = {**self._constants, **parameters, **buffers}
        if self._forward is not None:
            batch = self._ready(chunk.batch)
            return functional_call(self.model, state, batch, via=self._forward)
        batch = (chunk.batch[0], None) if is_pair(chunk.batch) else chunk.batch  # no targets
        return call(partial(functional_call, self.model, state), self._ready(batch))

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The first loss, a scalar; to be called inside of `forward`."""
        return self._scalar(next(iter(self._losses)), outputs, self._ready(targets))

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """All losses of a chunk, float64."""
        return self.losses_and_precision(outputs, targets)[0]

    def losses_and_precision(self, outputs: Any, targets: Any) -> tuple[Tensor, float]:
        """All losses, float64, and their unit roundoff: some are float32 in any model."""
        targets = self._ready(targets)
        found = [self._scalar(name, outputs, targets) for name in self._losses]
        dtypes = {self.dtype, *(loss.dtype for loss in found if loss.is_floating_point())}
        losses = torch.stack([loss.to(self.device, torch.float64) for loss in found])
        return losses, max(torch.finfo(dtype).eps for dtype in dtypes)

    def _scalar(self, name: str, outputs: Any, targets: Any) -> Tensor:
        known = name in self._of_outputs or torch.is_inference_mode_enabled()
        with contextlib.nullcontext() if known else torch.enable_grad():
            result = self._losses[name](outputs, targets)
        if result is None:
            raise InputError("loss_fn: it returns None, expected a scalar")
        loss = torch.as_tensor(result)
        if loss.ndim or loss.is_complex():
            found = f"shape {tuple(loss.shape)}" if loss.ndim else str(loss.dtype)
            raise InputError(f"loss_fn: a result of {found}, expected a real scalar")
        if not known:
            self._require_of_outputs(loss)
            self._of_outputs.add(name)
        return loss

    def _require_of_outputs(self, loss: Tensor) -> None:
        """Refuse a loss of the model's own parameters, in whose place others are only within it."""
        if not loss.requires_grad:
            return
        own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        slopes = torch.autograd.grad(loss, list(own.values()), retain_graph=True, allow_unused=True)
        used = [name for name, slope in zip(own, slopes, strict=True) if slope is not None]
        if used:
            raise InputError(
                f"loss_fn: it uses the model's parameters ({used[0]}), expected a function of "
                "outputs and targets: weight_decay= is a penalty, and forward= may return what "
                "else a loss needs"
            )

    def _ready(self, tree: Any) -> Any:
        """Copies on the device: a model or a loss may write to what it is given."""
        return map_tensors(
            lambda t: self._cast(t.to(self.device, non_blocking=True, copy=True)), tree
        )

    def value(self, parameters: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """First loss of a batch ``(x, y)``; randomness is the caller's to freeze."""
        chunk = Chunk((x, y), len(x), len(x), 1.0, 0, 0)
        with computing_plainly(self.compiled), sdpa_kernel(SDPBackend.MATH):
            return self.loss(self.outputs(chunk, parameters), y)

    def value_and_gradient(
        self, parameters: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The first loss of all chunks of this process, () float64, and its gradient (P,)."""
        require_derivatives()
        leaves = {
            name: parameter.detach().requires_grad_()
            for name, parameter in (parameters or self.parameters).items()
        }
        value = torch.zeros((), dtype=torch.float64, device=self.device)
        total = torch.zeros_like(flatten(leaf.detach() for leaf in leaves.values()))
        for chunk in self.chunks:
            with torch.enable_grad(), self.forward(chunk, leaves) as outputs:
                loss = chunk.weight * self.loss(outputs, chunk.targets)
                value += loss.detach()
                if loss.requires_grad:
                    total += flatten(
                        torch.autograd.grad(
                            loss, list(leaves.values()), allow_unused=True, materialize_grads=True
                        )
                    )
        return value, total

    def displaced(self, direction: Tensor, step: float) -> dict[str, Tensor]:
        """Parameters ``theta + step * direction``; `direction` is (P,)."""
        return {
            name: self.parameters[name].detach() + step * piece
            for name, piece in unflatten(direction, self.parameters).items()
        }

    def at_hand(self, chunk: Chunk) -> list[Tensor]:
        """Tensors that are in memory whether or not anything of a chunk is kept."""
        return [*self.parameters.values(), *self._constants.values(), *chunk.tensors]

    # -- the same in another way -------------------------------------------------------------------

    def in_float64(self) -> FrozenLoss:
        """The same function in double precision, or `self` where the model does not allow that.

        It does not if it insists on a dtype, or draws other random numbers in another one.
        """
        if self.dtype == torch.float64:
            return self
        precise = copy.copy(self)
        precise.dtype = torch.float64
        precise.parameters = {
            name: p.detach().double().requires_grad_() for name, p in self.parameters.items()
        }
        precise._cast = lambda t: t.double() if t.is_floating_point() else t
        precise._constants = {name: precise._cast(p) for name, p in self._constants.items()}
        differing = torch.zeros(1, device=self.device)
        for chunk in self.chunks[:1]:
            differing += not self._agrees(precise, chunk)
        return self if self.team.sum_(differing) else precise

    def _agrees(self, other: FrozenLoss, chunk: Chunk) -> bool:
        loss = self.observed_losses(chunk)[0]
        try:
            return bool(torch.isclose(other.observed_losses(chunk)[0], loss, 1e-4, 0.0))
        except RuntimeError:
            return False

    def twin(self) -> FrozenLoss:
        """The same for another thread: a copy of model and losses, which shares the weights.

        Raises `TypeError` or `RuntimeError` if they cannot be copied.
        """
        memo = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        other = copy.copy(self)
        other.model, other._losses = copy.deepcopy((self.model, self._losses), memo)
        return other

    def halved(self) -> FrozenLoss | None:
        """The same function with at most half as many examples in one forward pass.

        None if there is but one, or cutting batches would change the result.
        """
        size = max((chunk.size for chunk in self.chunks), default=0) // 2
        if not size or normalises(self.model):
            return None
        sums, reason = self._examine([c for c in self.chunks if c.size > size], size)
        if reason:
            return None
        other = copy.copy(self)
        other._micro_batch, other.sums = size, sums
        other.chunks = [piece for chunk in self.chunks for piece in other._cut(chunk, size)]
        return other

    # -- pieces of the data ------------------------------------------------------------------------

    def _chunks(self, data: Data, seed: int) -> list[Chunk]:
        """Those of this process."""
        batches = as_batches(data, count=self.count)
        self.examples = sum(map(examples_in, batches))  # of all processes
        self.counted = self.examples if self.count is None else int(sum(map(self.count, batches)))
        chunks = self._all_chunks(batches, seed)
        return chunks[self.team.shard(len(chunks))]

    def _all_chunks(self, batches: list[Batch], seed: int) -> list[Chunk]:
        whole = self._weighted(batches, seed)
        longest, n = max(chunk.size for chunk in whole), sum(chunk.size for chunk in whole)
        size = self._micro_batch
        if self._regroup and not any(m.training for m in self.model.modules()):
            size = REGROUPED.get(self.device.type, 256)
            regrouped = self._weighted(joined(batches, size), seed)
            if len(whole) > 1:
                half = max(max(chunk.size for chunk in regrouped) // 2, 1)
                self.sums, reason = self._examine(regrouped, half, whole)
            elif len(regrouped) > 1:
                self.sums, reason = self._examine(whole, size)
            else:
                return whole
            return self._weighted(batches if reason else joined(batches, size), seed)
        if self._regroup:
            size = longest  # batches of training mode are what is measured
        elif size is None:
            size = min(MICRO_BATCH.get(self.device.type, 32), -(-n // self.team.size))
        elif size < 1:
            raise InputError(f"micro_batch: {size}, expected at least 1")
        if longest <= size and len(whole) == 1:
            return whole
        self.sums, reason = self._examine([c for c in whole if c.size > size] or whole, size)
        whole = self._weighted(batches, seed)  # of a sum each counts in full
        if longest <= size or (reason and self._micro_batch is None):
            return whole
        if reason:
            raise InputError(f"micro_batch: {size} would change the result: {reason}")
        return [piece for chunk in whole for piece in self._cut(chunk, size)]

    def _weighted(self, batches: list[Batch], seed: int) -> list[Chunk]:
        """Whole batches; those with nothing that counts are left out."""
        sizes = [examples_in(batch) for batch in batches]
        counts = sizes if self.count is None else [int(self.count(batch)) for batch in batches]
        total = sum(counts)
        if total < 1:
            raise InputError(f"count: {total} of all data, expected at least 1")
        summed = self.summed
        return [
            Chunk(batch, size, n, 1.0 if summed else n / total, 0, derive_seed(seed, i))
            for i, (batch, size, n) in enumerate(zip(batches, sizes, counts, strict=True))
            if n
        ]

    @property
    def summed(self) -> bool:
        """Whether the first loss was found to be a sum, which for one chunk makes no difference."""
        return next(iter(self.sums.values()))

    def is_sum(self) -> bool:
        """Whether the first loss is a sum over examples, also where there is but one chunk."""
        if len(self.chunks) != 1:
            return self.summed
        sums, _ = self._examine(self.chunks, self.chunks[0].size)
        return next(iter(sums.values()))

    def _cut(self, chunk: Chunk, size: int) -> list[Chunk]:
        return chunk.cut(size, self.count, summed=self.summed)

    # -- what can be found out ---------------------------------------------------------------------

    def _examine(
        self, chunks: list[Chunk], size: int, delivered: list[Chunk] | None = None
    ) -> tuple[dict[str, bool], str | None]:
        """As `examine` does."""
        with _turn:
            sums, reason = examine(self, chunks, size, delivered)
        return dict(zip(self._losses, sums, strict=True)), reason

    @contextlib.contextmanager
    def observed(self, chunk: Chunk) -> Iterator[Any]:
        """Outputs nearby, without a graph other than what the model itself differentiates.

        Parameters of zeros, as layers often start with, would hide what follows them: then all
        examples have one loss, however much they count. Here, others stand for them.
        """
        with torch.enable_grad(), self.forward(chunk, self._nearby()) as outputs:
            yield map_tensors(Tensor.detach, outputs)

    def _nearby(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {
            name: p.detach()
            if p.detach().any()
            else (0.1 * torch.randn(p.shape, generator=generator)).to(p)
            for name, p in self.parameters.items()
        }

    def observed_losses(self, chunk: Chunk) -> Tensor:
        """Losses of these outputs, float64."""
        with self.observed(chunk) as outputs:
            return self.losses(outputs, chunk.targets)

    def observed_slopes(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        """These, and the gradient of each that has one, (P,)."""
        nearby = {name: p.requires_grad_() for name, p in self._nearby().items()}
        with torch.enable_grad(), self.forward(chunk, nearby) as outputs:
            found = self.losses(outputs, chunk.targets)
            slopes = [
                flatten(
                    torch.autograd.grad(
                        loss,
                        list(nearby.values()),
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                )
                for loss in found
                if found.requires_grad
            ]
        return found.detach(), slopes


def _own_loss(outputs: Any, _: Any) -> Tensor:
    """The loss that a model itself computes."""
    if isinstance(outputs, Tensor) and not outputs.ndim:
        return outputs
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise InputError(
            "loss_fn: none given, and the outputs have no loss, expected one or the other"
        )
    return loss
