"""How losses come out of examples, as is found out by trying: as a mean, a sum, or neither.

A batch of which each loss is a mean or a sum may be computed in any pieces. It matters as a whole
where a loss weighs or contrasts examples, and where the model draws random numbers or normalises
over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lossgeometry.batches import Chunk, Count, divisible, map_tensors, part_of
from lossgeometry.running.memory import is_out_of_memory
from lossgeometry.seeds import drawn_since_seeded, seeded

Result = TypeVar("Result")
Numbered: TypeAlias = list[tuple[int, Chunk]]  # each with the number of its first example


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

    def losses_and_precision(self, outputs: Any, targets: Any) -> tuple[Tensor, float]:
        """All losses of a chunk, and their unit roundoff."""


def examine(
    losses: Losses, chunks: list[Chunk], size: int, delivered: list[Chunk] | None = None
) -> tuple[list[bool], str | None]:
    """Which losses are sums, and why data cannot be divided as is asked (or None).

    Asked is whether `chunks` can be cut into pieces of `size`, or be taken instead of what is
    `delivered`.
    """
    longest = max(chunks, key=lambda chunk: chunk.size)
    try:
        with seeded(losses.device, longest.seed):  # for losses that draw
            return _tried(losses, longest, size, chunks, delivered)
    except (RuntimeError, MemoryError) as error:
        if size == 1 or not is_out_of_memory(error):
            raise
    return examine(losses, chunks, size // 2, delivered)


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
        return drawn_since_seeded(losses.device, chunk.seed)


def _tried(
    losses: Losses, longest: Chunk, size: int, chunks: list[Chunk], delivered: list[Chunk] | None
) -> tuple[list[bool], str | None]:
    """The same, found out with the outputs of a pair of `size` examples and all targets."""
    pair = longest.first(2 * size, losses.count) if longest.divisible else longest
    with losses.observed(pair) as outputs:
        together, eps = losses.losses_and_precision(outputs, pair.targets)
        drawn = drawn_since_seeded(losses.device, pair.seed)
    sums = [False] * len(together)
    if pair.divisible and (not drawn or divisible(outputs, pair.size)):
        sums = _or_none(lambda: _like_sums(losses, pair, outputs, together, chunks, eps)) or sums
    if normalising := normalises(losses.model):
        return sums, normalising
    if drawn:
        return sums, "the forward pass draws random numbers"
    if not all(chunk.divisible for chunk in chunks):
        return sums, "not all of a batch belongs to single examples"
    summed = torch.tensor(sums, device=losses.device)

    def additive() -> bool:
        divisions = (
            _cuts(chunks, size, losses.count)
            if delivered is None
            else [(_numbered(delivered), _numbered(chunks))]
        )
        if not divisible(outputs, pair.size):
            return _alike(losses, divisions, summed, eps)
        # Outputs of all would take long where those of some will do for others. Targets, too,
        # decide how much an example counts: a loss may weigh or ignore classes.
        anew = _total(losses, _numbered(pair.cut(size, losses.count)), summed)
        return bool(_close(anew, together, eps).all()) and _alike(
            losses, divisions, summed, eps, instead=(outputs, pair.size)
        )

    if not _or_none(additive):
        return sums, "the loss of a batch is not the mean of the losses of its examples"
    return sums, None


def _like_sums(
    losses: Losses, pair: Chunk, outputs: Any, together: Tensor, chunks: list[Chunk], eps: float
) -> list[bool]:
    """Whether twice the examples have twice the losses (and not the same, as means have)."""
    n = pair.size

    def doubled(once: Tensor, twice: Tensor) -> Tensor:  # however small they are
        return _close(twice, 2 * once, eps, 0.0) & ~_close(twice, once, eps, 0.0)

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


def _numbered(chunks: list[Chunk]) -> Numbered:
    """Chunks with the number of the first example of each."""
    return list(zip(accumulate((c.size for c in chunks), initial=0), chunks, strict=False))


def _cuts(
    chunks: list[Chunk], size: int, count: Count | None
) -> Iterator[tuple[Numbered, Numbered]]:
    """Any two neighbouring pieces of a chunk, as one and as two.

    If both weigh alike in the loss of the two, wherever they are, then all pieces weigh alike.
    """
    for chunk in chunks:
        for one, other in pairwise(chunk.cut(size, count)):
            start, stop = one.start - chunk.start, other.start - chunk.start + other.size
            batch = part_of(chunk.batch, chunk.size, slice(start, stop))
            both = replace(one, batch=batch, size=stop - start, count=one.count + other.count)
            yield [(start, both)], [(start, one), (other.start - chunk.start, other)]


def _alike(
    losses: Losses,
    divisions: Iterable[tuple[Numbered, Numbered]],
    summed: Tensor,
    eps: float,
    instead: tuple[Any, int] | None = None,
) -> bool:
    """Whether losses are the same however examples are divided."""
    totals = ((_total(losses, part, summed, instead) for part in both) for both in divisions)
    return all(bool(_close(one, other, eps).all()) for one, other in totals)


def _total(
    losses: Losses, numbered: Numbered, summed: Tensor, instead: tuple[Any, int] | None = None
) -> Tensor:
    """Losses of several chunks together, of their own outputs or of so many others instead."""
    counts = torch.tensor([[chunk.count] for _, chunk in numbered], device=losses.device)
    found = torch.stack(
        [
            losses.observed_losses(chunk)
            if instead is None
            else losses.losses(_others(losses, *instead, chunk.size, first), chunk.targets)
            for first, chunk in numbered
        ]
    )
    return torch.where(summed, found, found * counts / counts.sum()).sum(0)


def _others(losses: Losses, outputs: Any, n: int, length: int, first: int = 0) -> Any:
    """Outputs for as many examples, of others: losses of zero would not tell anything."""
    numbers = torch.arange(first, first + length, device=losses.device)
    return part_of(outputs, n, (1 + numbers) % n)


def _close(found: Tensor, expected: Tensor, eps: float, atol: float | None = None) -> Tensor:
    atol = 10 * eps if atol is None else atol
    return torch.isclose(found, expected, min(1e3 * eps, 0.05), atol, equal_nan=True)


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
