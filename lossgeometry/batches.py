"""Batches of any kind: how many examples they hold, and how they are called, cut and joined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lossgeometry.errors import InputError

# (inputs, targets), or a mapping of what the model takes by name, or what a `forward` is for.
Batch: TypeAlias = Any
Data: TypeAlias = "Batch | Iterable[Batch]"
Forward: TypeAlias = Callable[[nn.Module, Batch], Any]
Count: TypeAlias = Callable[[Batch], int]


@dataclass(frozen=True)
class Chunk:
    """Examples that pass through a model together: a batch, or a part of one."""

    batch: Batch
    size: int  # examples
    count: int  # of what a mean is over, in these examples
    weight: float  # of their loss in that of the whole data
    start: int  # position of the first of them in its batch
    seed: int  # of everything random in the forward pass of the batch

    @property
    def targets(self) -> Any:
        """What a loss is given besides the outputs."""
        return self.batch[1] if is_pair(self.batch) else self.batch

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the batch, inputs first."""
        return tensors_of(self.batch)

    @property
    def divisible(self) -> bool:
        """Whether all of the batch belongs to single examples."""
        return divisible(self.batch, self.size)

    def cut(self, size: int, count: Count | None = None, *, summed: bool = False) -> list[Chunk]:
        """Pieces of at most `size` examples; those of a mean share its weight by their counts."""
        pieces = []
        for start in range(0, self.size, size):
            own = min(size, self.size - start)
            part = part_of(self.batch, self.size, slice(start, start + own))
            number = own if count is None else int(count(part))
            if number:  # a mean over nothing is no number
                weight = self.weight if summed else self.weight * number / self.count
                pieces.append(Chunk(part, own, number, weight, self.start + start, self.seed))
        return pieces

    def first(self, size: int, count: Count | None = None) -> Chunk:
        """The first examples alone."""
        return next(iter(self.cut(size, count)), self)


def is_pair(batch: Batch) -> bool:
    """Whether a batch is ``(inputs, targets)``."""
    return isinstance(batch, (tuple, list)) and len(batch) == 2


def call(model: Callable[..., Any], batch: Batch) -> Any:
    """Outputs of a model for a batch that says by itself what it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if not is_pair(batch):
        found = f"of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise InputError(
            f"data: a batch {found}, expected (inputs, targets) or a mapping, or forward="
        )
    inputs = batch[0]
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in dicts, lists and tuples of whatever depth."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same with ``function(tensor)`` for each tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    return pytree.tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, tree)


def examples_in(batch: Batch) -> int:
    """The length of the first tensor; 1 where there is none."""
    first = next((tensor for tensor in tensors_of(batch) if tensor.ndim), None)
    return 1 if first is None else len(first)


def divisible(tree: Any, n: int) -> bool:
    """Whether every tensor has an entry for each of `n` examples, and there is nothing else."""
    return all(
        isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == n
        for leaf in pytree.tree_leaves(tree)
        if leaf is not None
    )


def part_of(tree: Any, n: int, examples: slice | Tensor) -> Any:
    """Some of `n` examples: of each tensor that has an entry for each of them."""
    return map_tensors(lambda t: t[examples] if t.ndim and len(t) == n else t, tree)


def as_batches(data: Data, *, count: Count | None = None) -> list[Batch]:
    """One batch or an iterable of them as a list, of tensors where there were NumPy's arrays.

    A list or tuple with a tensor in it is a batch, and so is a mapping; one of batches has none.
    Raises `InputError` if there is none, or inputs and targets are of different lengths.
    """
    if isinstance(data, Mapping) or (
        isinstance(data, (tuple, list))
        and any(part is None or isinstance(part, (Tensor, np.ndarray)) for part in data)
    ):
        data = [data]
    if not isinstance(data, Iterable):
        raise InputError(
            f"data: a {type(data).__name__}, expected (inputs, targets) or an iterable of them"
        )
    batches = [_with_tensors(batch) for batch in data]
    if not batches:
        raise InputError("data: no batches, expected (inputs, targets) or an iterable of them")
    for batch in batches:
        lengths = [len(part) for part in batch if _has_length(part)] if is_pair(batch) else []
        if count is None and (len(set(lengths)) > 1 or not examples_in(batch)):
            found = " and ".join(
                f"{n} {what}" for n, what in zip(lengths, ("inputs", "targets"), strict=False)
            )
            raise InputError(
                f"data: a batch with {found or 'no examples'}, expected as many of both"
            )
    return batches


def joined(batches: list[Batch], size: int) -> list[Batch]:
    """Batches of `size` examples, where the given ones have examples of one kind and shape."""
    if not all(divisible(batch, examples_in(batch)) for batch in batches):
        return batches
    trees = [pytree.tree_flatten(batch) for batch in batches]
    kinds = {
        (str(tree), *(leaf if leaf is None else (leaf.shape[1:], leaf.dtype) for leaf in leaves))
        for leaves, tree in trees
    }
    if len(kinds) > 1:
        return batches
    leaves = [
        None if parts[0] is None else torch.cat(parts)
        for parts in zip(*(leaves for leaves, _ in trees), strict=True)
    ]
    whole = pytree.tree_unflatten(leaves, trees[0][1])
    n = examples_in(whole)
    return [part_of(whole, n, slice(start, start + size)) for start in range(0, n, size)]


def _has_length(part: Any) -> bool:
    return isinstance(part, Tensor) and part.ndim > 0


def _with_tensors(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree
    if isinstance(tree, np.ndarray):
        return torch.from_numpy(tree)
    if isinstance(tree, Mapping):
        return {key: _with_tensors(value) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_with_tensors(part) for part in tree)
    return tree
