"""Autograd graphs as linear maps: what they keep in memory, and gradients through it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lossgeometry.errors import InputError


@dataclass(frozen=True)
class LinearMap:
    """What one chunk of data contributes to an operator, as a map of parameter-shaped tensors."""

    apply: Callable[[Sequence[Tensor], bool], Sequence[Tensor]]  # (tensors, is a block of vectors)
    size: Callable[[], int]  # bytes that it keeps alive
    # (product, rows), both (n, P): add those with all rows, where a device has a way of its own
    add_products: Callable[[Tensor, Tensor], None] | None = None


def storage_bytes(tensors: Iterable[Tensor], besides: Iterable[Tensor]) -> int:
    """Bytes in memory of what `tensors` are or are views of, not counting that of `besides`."""
    sizes = {(s := t.untyped_storage()).data_ptr(): s.nbytes() for t in tensors}
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    return sum(sizes[pointer] for pointer in sizes.keys() - known)


def saved_by_graph(roots: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors that the graphs behind `roots` keep for their backward pass."""
    saved_names: dict[type, list[str]] = {}
    for node in _nodes(roots):
        if type(node) not in saved_names:
            saved_names[type(node)] = [n for n in dir(node) if n.startswith("_saved_")]
        for name in saved_names[type(node)]:
            saved = getattr(node, name)
            for tensor in saved if isinstance(saved, tuple) else (saved,):
                if isinstance(tensor, Tensor):
                    yield tensor


def ends_of(tensors: Iterable[Tensor]) -> list[Tensor | GradientEdge]:
    """What gradients of `tensors` begin with, without the numbers in these."""
    return [get_gradient_edge(t) if t.requires_grad else t for t in tensors]


def leaves_of(root: Tensor) -> set[int]:
    """The ``id()`` of the tensors that a graph begins with."""
    nodes = _nodes([root])
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}


def _nodes(roots: Iterable[Tensor]) -> Iterator[Any]:
    """Each node of the graphs behind `roots`, once."""
    pending = [root.grad_fn for root in roots]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending.extend(parent for parent, _ in node.next_functions)
        yield node


# How PyTorch and torchvision say that a function cannot be differentiated twice.
_LACKING = re.compile(
    r"derivative for '?(?:aten::)?_?(\w+?)(?:_backward)?'? is not implemented"
    r"|double backwards? on (\w+) not supported"
)


def gradient(
    outputs: Sequence[Tensor | GradientEdge],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    block: bool = False,
) -> Sequence[Tensor]:
    """Vector-Jacobian products, zero where `outputs` do not depend on an input; the graph is kept.

    Without `grad_outputs`, the gradients of scalars. `block` says that `grad_outputs` carry a
    leading dimension of vectors, and so will the result. Raises `InputError` if a layer cannot be
    differentiated once more.
    """
    given: Sequence[Tensor | None] = grad_outputs or [None] * len(outputs)
    pairs = [
        (o, g)
        for o, g in zip(outputs, given, strict=True)
        if isinstance(o, GradientEdge) or o.requires_grad
    ]
    if not pairs:
        batch = given[0].shape[:1] if block and given[0] is not None else ()
        return [tensor.new_zeros((*batch, *tensor.shape)) for tensor in inputs]
    try:
        return torch.autograd.grad(
            [output for output, _ in pairs],  # type: ignore[arg-type]  # it takes a mixture
            inputs,
            [grad for _, grad in pairs],
            retain_graph=True,
            create_graph=create_graph,
            is_grads_batched=block,
            allow_unused=True,
            materialize_grads=True,
        )
    except RuntimeError as error:
        lacking = _LACKING.search(str(error))
        if not lacking:
            raise
        raise InputError(
            f"model: PyTorch has no second derivative of {lacking[1] or lacking[2]}, expected "
            "layers or a loss that have one"
        ) from error
