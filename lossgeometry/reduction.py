"""How losses come out of examples, as is found out by trying: as a mean, a sum, or neither.

A batch of which each loss is a mean or a sum may be computed in any pieces. It matters as a whole
where a loss weighs or contrasts examples, and where the model draws random numbers or normalises
over the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lossgeometry.batches import Chunk, Count, divisible, map_tensors, part_of
from lossgeometry.running.memory import is_out_of_memory
from lossgeometry.seeds import derive_seed, drawn_since_seeded, seeded

Result = TypeVar("Result")
Numbered: TypeAlias = list[tuple[int, Chunk]]  # each with the number of its first example

# A sum that draws random numbers is about twice as much of twice the examples: a mean over so many
# draws tells it from the same.
_DRAWS = 64


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

    def observed_slopes(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        """These, and the gradient of each that has one, (P,)."""

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
    if pair.divisible:
        if drawn and not divisible(outputs, pair.size):
            like_sums = partial(_like_sums_but_for_draws, losses, pair, chunks, eps)
        elif drawn and _losses_draw(losses, outputs, pair):
            like_sums = partial(_like_drawn_sums, losses, pair, outputs)
        else:
            like_sums = partial(_like_sums, losses, pair, outputs, together, chunks, eps)
        sums = _or_none(like_sums) or sums
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
        anew, _ = _total(losses, _numbered(pair.cut(size, losses.count)), summed)
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


def _like_sums_but_for_draws(
    losses: Losses, pair: Chunk, chunks: list[Chunk], eps: float
) -> list[bool]:
    """The same of a model that draws random numbers, and whose outputs are the losses themselves.

    In evaluation mode it may draw none, and the losses come out of examples in the same way.
    """

    def compared() -> list[bool] | None:
        with _evaluating(losses.model), losses.observed(pair) as outputs:
            together = losses.losses(outputs, pair.targets)
            if drawn_since_seeded(losses.device, pair.seed):
                return None
            return _like_sums(losses, pair, outputs, together, chunks, eps)

    if (found := _or_none(compared)) is not None:
        return found
    n = pair.size
    twice = Chunk(part_of(pair.batch, n, _twice(n)), 2 * n, 2 * pair.count, 1.0, 0, pair.seed)

    def drawn(chunk: Chunk, draw: int) -> Tensor:
        return losses.observed_losses(replace(chunk, seed=derive_seed(pair.seed, draw)))

    return _nearer_twice(partial(drawn, pair), partial(drawn, twice))


def _losses_draw(losses: Losses, outputs: Any, chunk: Chunk) -> bool:
    """Whether the losses of given outputs draw random numbers."""
    with seeded(losses.device, chunk.seed):
        losses.losses(outputs, chunk.targets)
        return drawn_since_seeded(losses.device, chunk.seed)


def _like_drawn_sums(losses: Losses, pair: Chunk, outputs: Any) -> list[bool]:
    """The same of losses that draw random numbers themselves."""
    n = pair.size
    doubled = _others(losses, outputs, n, 2 * n), part_of(pair.targets, n, _twice(n))
    single = _others(losses, outputs, n, n), pair.targets
    return _nearer_twice(lambda _: losses.losses(*single), lambda _: losses.losses(*doubled))


def _nearer_twice(once: Callable[[int], Tensor], twice: Callable[[int], Tensor]) -> list[bool]:
    """Whether the one is nearer to twice the other than to the same, in the mean over draws."""
    one, two = (torch.stack([f(draw) for draw in range(_DRAWS)]).mean(0) for f in (once, twice))
    return ((two - 2 * one).abs() < (two - one).abs()).tolist()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


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
    """Whether losses and their slopes are the same however examples are divided.

    The slopes are those along the outputs, or where outputs are not of single examples along the
    parameters. Values alone do not tell: of examples that have nearly the same loss, any weights
    have nearly the same mean.
    """
    join = sum if instead is None else torch.cat
    for both in divisions:
        (one, slopes), (other, others) = (_total(losses, part, summed, instead) for part in both)
        if not _close(one, other, eps).all():
            return False
        for pieces, finer in zip(slopes, others, strict=False):
            off = torch.as_tensor(join(pieces) - join(finer)).norm()
            if off > min(1e3 * eps, 0.02) * sum(piece.norm() for piece in finer):
                return False
    return True


def _total(
    losses: Losses, numbered: Numbered, summed: Tensor, instead: tuple[Any, int] | None = None
) -> tuple[Tensor, list[list[Tensor]]]:
    """Losses of several chunks together, of their own outputs or of so many others instead.

    And what each chunk adds to the slopes, of every loss, if all chunks have some.
    """
    counts = torch.tensor([[chunk.count] for _, chunk in numbered], device=losses.device)
    weights = torch.where(summed, 1.0, counts.double() / counts.sum())
    found = [
        losses.observed_slopes(chunk)
        if instead is None
        else _along_outputs(losses, _others(losses, *instead, chunk.size, first), chunk.targets)
        for first, chunk in numbered
    ]
    total = (weights * torch.stack([values for values, _ in found])).sum(0)
    by_loss = zip(*(slopes for _, slopes in found), strict=False)
    return total, [
        [weight[k] * slope.double() for weight, slope in zip(weights, slopes, strict=True)]
        for k, slopes in enumerate(by_loss)
    ]


def _along_outputs(losses: Losses, outputs: Any, targets: Any) -> tuple[Tensor, list[Tensor]]:
    """All losses, and the slopes of each along the outputs, by example, if they have any."""

    def sloping() -> tuple[Tensor, list[Tensor]] | None:
        leaves: list[Tensor] = []

        def leaf(output: Tensor) -> Tensor:
            if not output.is_floating_point():
                return output
            leaves.append(output.detach().clone().requires_grad_())
            return leaves[-1].clone()  # for losses that write to it

        with torch.enable_grad():
            found = losses.losses(map_tensors(leaf, outputs), targets)
        if not found.requires_grad:
            return None
        slopes = [
            torch.autograd.grad(
                loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for loss in found
        ]
        return found.detach(), [
            torch.cat([slope.reshape(len(slope), -1) for slope in own], 1) for own in slopes
        ]

    return _or_none(sloping) or (losses.losses(outputs, targets), [])


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
