"""How losses come out of examples, as is found out by trying: as a mean, a sum, or neither.

A batch of which each loss is a mean or a sum may be computed in any pieces. It matters as a whole
where a loss weighs or contrasts examples, and where the model draws random numbers or normalises
over the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lossgeometry.batches import Chunk, Count, divisible, map_tensors, part_of
from lossgeometry.running.memory import is_out_of_memory
from lossgeometry.seeds import seeded

Result = TypeVar("Result")


class Losses(Protocol):
    """What is asked about: losses of a model, some number of them."""

    model: nn.Module
    device: torch.device
    count: Count | None

    def observed(self, chunk: Chunk) -> AbstractContextManager[Any]:
        """Outputs of a chunk; inside, randomness is frozen."""

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """All losses of a chunk."""

    def observed_losses(self, chunk: Chunk) -> Tensor:
        """The same of the outputs that are observed."""

    def precision(self, outputs: Any, targets: Any) -> float:
        """Unit roundoff of the losses."""


def examine(losses: Losses, chunks: list[Chunk], size: int) -> tuple[list[bool], str | None]:
    """Which losses are sums, and why `chunks` cannot be cut into pieces of `size` (or None)."""
    longest = max(chunks, key=lambda chunk: chunk.size)
    try:
        with seeded(losses.device, longest.seed):  # for losses that draw
            return _tried(losses, longest, size, chunks)
    except (RuntimeError, MemoryError) as error:
        if size == 1 or not is_out_of_memory(error):
            raise
    return examine(losses, chunks, size // 2)


def normalises(model: nn.Module) -> str | None:
    """Which module normalises over the batch, in a sentence, if any."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            return f"{name or 'model'} normalises over the batch"
    return None


def draws(losses: Losses, chunk: Chunk) -> bool:
    """Whether the forward pass of a chunk, or its loss, draws random numbers."""
    with losses.observed(chunk) as outputs:
        losses.losses(outputs, chunk.targets)
        return _drawn(losses.device, chunk.seed)


def _tried(
    losses: Losses, longest: Chunk, size: int, chunks: list[Chunk]
) -> tuple[list[bool], str | None]:
    """The same, found out with the outputs of a pair of `size` examples and all targets."""
    pair = longest.first(2 * size, losses.count) if longest.divisible else longest
    with losses.observed(pair) as outputs:
        together = losses.losses(outputs, pair.targets)
        drawn = _drawn(losses.device, pair.seed)
    sums = [False] * len(together)
    if pair.divisible and (not drawn or divisible(outputs, pair.size)):
        sums = _or_none(lambda: _like_sums(losses, pair, outputs, together, chunks)) or sums
    if normalising := normalises(losses.model):
        return sums, normalising
    if drawn:
        return sums, "the forward pass draws random numbers"
    if not all(chunk.divisible for chunk in chunks):
        return sums, "not all of a batch belongs to single examples"
    summed = torch.tensor(sums, device=losses.device)
    if not _or_none(lambda: _alike(losses, pair, size, outputs, together, chunks, summed)):
        return sums, "the loss of a batch is not the mean of the losses of its examples"
    return sums, None


def _like_sums(
    losses: Losses, pair: Chunk, outputs: Any, together: Tensor, chunks: list[Chunk]
) -> list[bool]:
    """Whether twice the examples have twice the losses (and not the same, as means have)."""
    n, eps = pair.size, losses.precision(outputs, pair.targets)

    def doubled(once: Tensor, twice: Tensor) -> Tensor:
        return _close(twice, 2 * once, eps) & ~_close(twice, once, eps)

    if not divisible(outputs, n):
        both = part_of(pair.batch, n, _twice(n))
        twice = losses.observed_losses(Chunk(both, 2 * n, 2 * pair.count, 1.0, 0, pair.seed))
        return doubled(together, twice).tolist()
    sums = torch.zeros_like(together, dtype=torch.bool)
    undecided = ~sums  # a loss of zero tells nothing, but others may be found
    for given in (outputs, map_tensors(_shifted, outputs)):
        for chunk in (pair, *chunks):
            once, twice = (
                losses.losses(_others(losses, given, n, times * chunk.size), targets)
                for times, targets in (
                    (1, chunk.targets),
                    (2, part_of(chunk.targets, chunk.size, _twice(chunk.size))),
                )
            )
            sums |= undecided & doubled(once, twice)
            undecided &= once == 0
            if not undecided.any():
                return sums.tolist()
    return sums.tolist()


def _alike(
    losses: Losses,
    pair: Chunk,
    size: int,
    outputs: Any,
    together: Tensor,
    chunks: list[Chunk],
    summed: Tensor,
) -> bool:
    """Whether losses of pieces make those of the whole."""
    eps = losses.precision(outputs, pair.targets)

    def of_pieces(chunk: Chunk, losses_of: Callable[[Chunk], Tensor]) -> Tensor:
        pieces = chunk.cut(size, losses.count)
        counts = torch.tensor([[piece.count] for piece in pieces], device=losses.device)
        parts = torch.stack([losses_of(piece) for piece in pieces])
        return torch.where(summed, parts, parts * counts / chunk.count).sum(0)

    def additive(chunk: Chunk) -> bool:
        given = _others(losses, outputs, pair.size, chunk.size)

        def losses_of(piece: Chunk) -> Tensor:
            first = piece.start - chunk.start
            own = part_of(given, chunk.size, slice(first, first + piece.size))
            return losses.losses(own, piece.targets)

        whole = losses.losses(given, chunk.targets)
        return bool(_close(of_pieces(chunk, losses_of), whole, eps).all())

    if pair.size > size:
        anew = of_pieces(pair, losses.observed_losses)
        if not _close(anew, together, eps).all():
            return False
    if not divisible(outputs, pair.size):
        return True
    # Targets, too, decide how much an example counts: a loss may weigh or ignore classes.
    return all(map(additive, chunks))


def _others(losses: Losses, outputs: Any, n: int, length: int) -> Any:
    """Outputs for as many examples, of others: losses of zero would not tell anything."""
    return part_of(outputs, n, (1 + torch.arange(length, device=losses.device)) % n)


def _close(found: Tensor, expected: Tensor, eps: float) -> Tensor:
    return torch.isclose(found, expected, min(1e3 * eps, 0.05), 10 * eps, equal_nan=True)


def _drawn(device: torch.device, seed: int) -> bool:
    """Whether random numbers have been drawn since the generators were seeded."""
    drawn = _generator_states(device)
    with seeded(device, seed):
        undrawn = _generator_states(device)
    return not all(map(torch.equal, drawn, undrawn))


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _twice(n: int) -> Tensor:
    return torch.arange(2 * n) % n


def _shifted(outputs: Tensor) -> Tensor:
    """Other outputs than those that may fit perfectly."""
    return outputs + 1 if outputs.is_floating_point() else outputs


def _or_none(function: Callable[[], Result]) -> Result | None:
    """What `function` returns; None where it fails, as losses of fixed batches do on parts."""
    try:
        return function()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None
