"""Hessian-vector products as compiled code that repeats nothing that the vector does not touch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from lossgeometry.batches import Chunk, map_tensors
from lossgeometry.objective import FrozenLoss
from lossgeometry.operators.graphs import LinearMap, storage_bytes
from lossgeometry.seeds import seeded

Product = Callable[[Chunk, Sequence[Tensor]], Sequence[Tensor]]


class CompiledProduct:
    """A map ``(chunk, vectors) -> products``, linear in the vectors, split into two programs.

    The operations of one evaluation are recorded. Those that depend on the vectors are compiled;
    all others run once for each chunk, as they are, and hand over what the former need of them.

    Parameters
    ----------
    objective
        Of which `product` is a function; its randomness is frozen.
    product
        To be recorded on `chunk`, and valid for every chunk of the same shapes and dtypes.
    """

    def __init__(self, objective: FrozenLoss, product: Product, chunk: Chunk) -> None:
        self._objective = objective
        self._key = _key(chunk)
        parameters = list(objective.parameters.values())

        given = self._tensors(chunk)

        def record(*tensors: Tensor) -> tuple[Tensor, ...]:
            own, vectors = iter(tensors[: len(given)]), tensors[len(given) :]
            batch = map_tensors(lambda _: next(own), chunk.batch)
            return tuple(product(replace(chunk, batch=batch, weight=1.0), vectors))

        with seeded(objective.device, chunk.seed):
            whole = make_fx(record)(*given, *(torch.zeros_like(p) for p in parameters))
        self._prepare, self._multiply = (
            # The fallback draws the very random numbers that uncompiled code would.
            torch.compile(part, dynamic=False, fullgraph=True, options={"fallback_random": True})
            for part in _split(whole, constant=len(given))
        )

    def fits(self, chunk: Chunk) -> bool:
        """Whether `chunk` is one that the code was made for."""
        return _key(chunk) == self._key

    def linear_map(self, chunk: Chunk) -> LinearMap:
        """Products of a chunk that `fits`, weighted by its share."""
        with torch.no_grad(), seeded(self._objective.device, chunk.seed):
            kept = self._prepare(*self._tensors(chunk))

        def apply(vectors: Sequence[Tensor], block: bool) -> Sequence[Tensor]:
            with torch.no_grad():
                if not block:
                    return [chunk.weight * piece for piece in self._multiply(*vectors, *kept)]
            rows = [apply(vector, False) for vector in zip(*vectors, strict=True)]
            return [torch.stack(pieces) for pieces in zip(*rows, strict=True)]

        return LinearMap(apply, lambda: storage_bytes(kept, self._objective.at_hand(chunk)))

    def _tensors(self, chunk: Chunk) -> list[Tensor]:
        return [tensor.to(self._objective.device) for tensor in chunk.tensors]


def _split(whole: fx.GraphModule, constant: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a program in two, of which the first depends on its first `constant` inputs only.

    ``whole(*c, *v) == second(*v, *first(*c))``
    """
    inputs = [node for node in whole.graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in whole.graph.nodes if node.op == "output")
    variable = dict.fromkeys(inputs[constant:])
    for node in whole.graph.nodes:
        if any(source in variable for source in node.all_input_nodes):
            variable[node] = None
    del variable[output]
    handed_over = [
        node
        for node in whole.graph.nodes
        if node not in variable and any(user in variable or user is output for user in node.users)
    ]

    first, second = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in whole.graph.nodes:
        if node not in variable and node is not output:
            copies[node] = first.node_copy(node, copies.__getitem__)
    first.output(tuple(copies[node] for node in handed_over))

    copies = {node: second.placeholder(node.name) for node in inputs[constant:]}
    copies |= {node: second.placeholder(f"kept_{node.name}") for node in handed_over}
    for node in variable:
        if node.op == "placeholder":
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and node.args[0] in handed_over:
            # It serves the next product, too.
            copies[node.args[0]] = second.call_function(torch.clone, (copies[node.args[0]],))
        copies[node] = second.node_copy(node, copies.__getitem__)
    second.output(fx.map_arg(output.args[0], copies.__getitem__))
    return fx.GraphModule(whole, first), fx.GraphModule(whole, second)


def _key(chunk: Chunk) -> tuple[object, ...]:
    return tuple(part for tensor in chunk.tensors for part in (tensor.shape, tensor.dtype))
