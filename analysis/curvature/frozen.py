"""A model's loss on fixed data, with fixed randomness, as a pure function of its parameters."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from analysis.functional import functional_call
from analysis.parameters import select_parameters, unflatten
from models.distributed import ALONE, Team
from models.errors import InputError
from models.memory import is_out_of_memory
from models.seeds import derive_seed, seeded

LossFunction = Callable[[Tensor, Tensor], Tensor]
Data = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]

# Examples that pass through the model at once unless told otherwise. On a CPU more do not make the
# matrix products any faster but leave the cache; a GPU needs more to be busy.
MICRO_BATCH = {"cpu": 32, "cuda": 256}


# Threads take turns with what they have in common: a model, which has one set of tensors at a time,
# PyTorch's generators, and its choice of kernels.
_turn = threading.RLock()


@dataclass(frozen=True)
class Chunk:
    """Examples that pass through the model together."""

    x: Tensor  # (n, ...)
    y: Tensor  # (n, ...)
    weight: float  # share of these examples in the whole data
    start: int  # position of the first of them in its batch
    seed: int  # of everything random in the forward pass of the batch


class FrozenLoss:
    """Mean loss of `model` over all of `data`, a deterministic function of the parameters.

    The model is used through `torch.func.functional_call`, with tensors that share the storage of
    its parameters and with copies of its buffers, and is never changed. Dropout, stochastic depth
    and all else that is random in a forward pass come from a seed that belongs to the batch.

    Parameters
    ----------
    model, loss_fn
        ``loss_fn(model(x), y)`` is a scalar, the mean over the batch.
    data
        One ``(x, y)`` or an iterable of them, read once. Batches count by their number of examples.
    params
        Regular expression on parameter names; the others are constants. None takes all.
    micro_batch
        Largest number of examples in one forward pass. None chooses by device, and takes batches as
        they are delivered where cutting them would change the result.
    team
        The processes that share the data: each has its own of the `chunks`, or none.

    Raises
    ------
    InputError
        No data, no parameter, or a `micro_batch` that would change the result: batch normalisation
        in training mode, random numbers in the forward pass, a loss that is not a mean.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Data,
        *,
        params: str | None = None,
        seed: int = 0,
        micro_batch: int | None = None,
        team: Team = ALONE,
    ) -> None:
        self.team = team
        self.model = model
        self._loss_fn = loss_fn
        selected = select_parameters(model, params)
        self.parameters = {
            name: parameter.detach().requires_grad_() for name, parameter in selected.items()
        }
        self._constants = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if name not in selected
        }
        first = next(iter(self.parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self._cast: Callable[[Tensor], Tensor] = lambda tensor: tensor
        if any(
            (p.dtype, p.device) != (first.dtype, first.device) for p in self.parameters.values()
        ):
            raise InputError("model: parameters of several dtypes or devices, expected one of each")

        self._micro_batch = micro_batch
        self.chunks = self._chunks(data, seed)

    def on(self, data: Data, seed: int) -> FrozenLoss:
        """The same function of the parameters on other data."""
        other = copy.copy(self)
        other.chunks = self._chunks(data, seed)
        return other

    def halved(self) -> FrozenLoss | None:
        """The same function with at most half as many examples in one forward pass.

        None if there is but one, or cutting batches would change the result.
        """
        size = max((len(chunk.x) for chunk in self.chunks), default=0) // 2
        if not size or self._why_whole([c for c in self.chunks if len(c.x) > size], size):
            return None
        other = copy.copy(self)
        other._micro_batch = size
        other.chunks = [piece for chunk in self.chunks for piece in _cut(chunk, size)]
        return other

    def _chunks(self, data: Data, seed: int) -> list[Chunk]:
        chunks = self._all_chunks(data, seed)
        return chunks[self.team.shard(len(chunks))]

    def _all_chunks(self, data: Data, seed: int) -> list[Chunk]:
        batches = as_batches(data)
        total = sum(len(x) for x, _ in batches)
        whole = [
            Chunk(x, y, len(x) / total, 0, derive_seed(seed, index))
            for index, (x, y) in enumerate(batches)
        ]
        size = self._micro_batch
        if size is None:
            size = min(MICRO_BATCH.get(self.device.type, 32), -(-total // self.team.size))
        elif size < 1:
            raise InputError(f"micro_batch: {size}, expected at least 1")
        long = [chunk for chunk in whole if len(chunk.x) > size]
        if not long:
            return whole
        reason = self._why_whole(long, size)
        if reason is None:
            return [piece for chunk in whole for piece in _cut(chunk, size)]
        if self._micro_batch is not None:
            raise InputError(f"micro_batch: {size} would change the result: {reason}")
        return whole

    @contextlib.contextmanager
    def forward(
        self, chunk: Chunk, parameters: Mapping[str, Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Model outputs of a chunk, here or at other parameters; inside, randomness is frozen."""
        with _turn, seeded(self.device, chunk.seed):
            yield self._outputs(parameters or self.parameters, chunk.x)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss, a scalar; to be called inside of `forward`."""
        targets = self._cast(targets.to(self.device, non_blocking=True))
        loss = self._loss_fn(outputs, targets)
        if loss.ndim:
            raise InputError(f"loss_fn: a result of shape {tuple(loss.shape)}, expected a scalar")
        return loss

    def value(self, parameters: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Loss of examples at `parameters`; randomness is the caller's to freeze."""
        return self.loss(self._outputs(parameters, x), y)

    def _outputs(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        # Batch normalisation in training mode writes to its buffers, and a graph that is kept must
        # not see those of the next chunk: every pass has its own.
        buffers = {name: self._cast(buffer.clone()) for name, buffer in self.model.named_buffers()}
        state = {**self._constants, **parameters, **buffers}
        # Only the math kernel of scaled_dot_product_attention has a second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(
                self.model, state, self._cast(x.to(self.device, non_blocking=True))
            )

    def displaced(self, direction: Tensor, step: float) -> dict[str, Tensor]:
        """Parameters ``theta + step * direction``, as leaves of a graph; `direction` is (P,)."""
        return {
            name: (self.parameters[name].detach() + step * piece).requires_grad_()
            for name, piece in unflatten(direction, self.parameters).items()
        }

    def at_hand(self, chunk: Chunk) -> list[Tensor]:
        """Tensors that are in memory whether or not anything of a chunk is kept."""
        return [*self.parameters.values(), *self._constants.values(), chunk.x, chunk.y]

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
        precise._constants = {name: p.double() for name, p in self._constants.items()}
        precise._cast = lambda t: t.double() if t.is_floating_point() else t
        differing = torch.zeros(1, device=self.device)
        for chunk in self.chunks[:1]:
            differing += not self._agrees(precise, chunk)
        return self if self.team.sum_(differing) else precise

    @torch.no_grad()
    def _agrees(self, other: FrozenLoss, chunk: Chunk) -> bool:
        with self.forward(chunk) as outputs:
            loss = self.loss(outputs, chunk.y)
        try:
            with other.forward(chunk) as outputs:
                return bool(torch.isclose(other.loss(outputs, chunk.y), loss.double(), 1e-4))
        except RuntimeError:
            return False

    def _why_whole(self, chunks: list[Chunk], size: int) -> str | None:
        """Why `chunks`, all longer, cannot be cut into pieces of `size`, or None if they can."""
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                return f"{name or 'model'} normalises over the batch"
        longest = max(chunks, key=lambda chunk: len(chunk.x))
        try:
            return self._why_together(_first(longest, 2 * size), size, chunks)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        return self._why_whole(chunks, size // 2)

    @torch.no_grad()
    def _why_together(self, pair: Chunk, size: int, chunks: list[Chunk]) -> str | None:
        """The same, found out with the outputs of a pair of `size` examples and all targets."""
        with self.forward(pair) as outputs:
            together = self.loss(outputs, pair.y)
            if self._drawn(pair):
                return "the forward pass draws random numbers"
        apart = torch.zeros_like(together)
        for part in _cut(pair, size):
            with self.forward(part) as own:
                apart += self.loss(own, part.y) * (len(part.x) / len(pair.x))
        found = [(together, apart)]
        if outputs.ndim and len(outputs) == len(pair.x):
            # Targets, too, decide how much an example counts: a loss may weigh or ignore classes.
            found += [self._two_ways(outputs, chunk, size) for chunk in chunks]
        rounding = 1e3 * torch.finfo(self.dtype).eps
        if not all(torch.isclose(*two, rounding, rounding, equal_nan=True) for two in found):
            return "the loss of a batch is not the mean of the losses of its examples"
        return None

    @torch.no_grad()
    def draws(self, chunk: Chunk) -> bool:
        """Whether the forward pass of a chunk, or its loss, draws random numbers."""
        with self.forward(chunk) as outputs:
            self.loss(outputs, chunk.y)
            return self._drawn(chunk)

    def _drawn(self, chunk: Chunk) -> bool:
        """The same of what has happened so far, asked inside of `forward`."""
        drawn = _generator_states(self.device)
        with seeded(self.device, chunk.seed):
            undrawn = _generator_states(self.device)
        return not all(map(torch.equal, drawn, undrawn))

    def _two_ways(self, outputs: Tensor, chunk: Chunk, size: int) -> tuple[Tensor, Tensor]:
        """Loss of the targets of `chunk`, and the mean over its pieces, whatever the outputs."""
        n = len(chunk.x)
        outputs = outputs[torch.arange(n, device=outputs.device) % len(outputs)]
        pieces = zip(outputs.split(size), chunk.y.split(size), strict=True)
        apart = [self.loss(own, targets) * (len(own) / n) for own, targets in pieces]
        return self.loss(outputs, chunk.y), torch.stack(apart).sum()


def as_batches(data: Data) -> list[tuple[Tensor, Tensor]]:
    """One ``(x, y)`` or an iterable of them as a list. Raises `InputError` if it is not usable."""
    if isinstance(data, (tuple, list)) and data and isinstance(data[0], Tensor):
        data = [cast("tuple[Tensor, Tensor]", data)]
    batches = list(cast("Iterable[tuple[Tensor, Tensor]]", data))
    if not batches:
        raise InputError("data: no batches, expected (x, y) or an iterable of them")
    for x, y in batches:
        if len(x) != len(y) or not len(x):
            raise InputError(
                f"data: a batch with {len(x)} inputs and {len(y)} targets, expected as many of both"
            )
    return batches


def _first(chunk: Chunk, size: int) -> Chunk:
    return Chunk(chunk.x[:size], chunk.y[:size], chunk.weight, chunk.start, chunk.seed)


def _cut(chunk: Chunk, size: int) -> Iterator[Chunk]:
    for start in range(0, len(chunk.x), size):
        x, y = chunk.x[start : start + size], chunk.y[start : start + size]
        yield Chunk(x, y, chunk.weight * len(x) / len(chunk.x), chunk.start + start, chunk.seed)


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
