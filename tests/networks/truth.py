"""Values and derivatives of a problem as PyTorch has them: forward pass, backward pass, double."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lossgeometry.seeds import derive_seed, seed_everything, untouched_rng
from tests.networks.problems import CPU, Problem, plainly

Tensors = Sequence[Tensor]


class Truth:
    """Of a problem, as sums over its batches; its model is used up by that."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        pattern = problem.how.get("params", "")
        named = dict(problem.model.named_parameters())
        self.parameters = [p for n, p in named.items() if p.requires_grad and re.search(pattern, n)]
        self._buffers = [(b, b.clone()) for b in problem.model.buffers()]
        self._start = [p.detach().clone() for p in self.parameters]

    def vector(self, generator: torch.Generator) -> Tensors:
        """A random vector, zero where PyTorch takes what it calls padding for a constant."""
        vector = [torch.randn(p.shape, generator=generator).to(p) for p in self.parameters]
        padded = {
            id(module.weight): module.padding_idx
            for module in self._problem.model.modules()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None
        }
        for piece, parameter in zip(vector, self.parameters, strict=True):
            if id(parameter) in padded:
                piece[padded[id(parameter)]] = 0
        return vector

    def _batches(self) -> Iterator[tuple[Any, float]]:
        """Each with its weight, its random numbers, and buffers as they were."""
        for i, pair in enumerate(zip(self._problem.batches, self._problem.weights, strict=True)):
            if not pair[1]:  # no token of it counts
                continue
            with torch.no_grad():
                for (name, _), (_, then) in zip(
                    self._problem.model.named_buffers(), self._buffers, strict=True
                ):
                    self._problem.model.get_buffer(name).copy_(then)
            with plainly(), untouched_rng(CPU):
                seed_everything(CPU, derive_seed(0, i))
                yield pair

    def value(self, step: float = 0.0, direction: Tensors = ()) -> Tensor:
        """At parameters ``theta + step * direction``."""
        self._displace(step, direction)
        total = sum(
            weight * self._problem.loss_of(batch).detach().double()
            for batch, weight in self._batches()
        )
        self._displace(0.0, ())
        return torch.as_tensor(total)

    def gradient(self, step: float = 0.0, direction: Tensors = ()) -> Tensor:
        """(P,)"""
        self._displace(step, direction)
        total = sum(
            weight * flat(_grad(self._problem.loss_of(batch), self.parameters))
            for batch, weight in self._batches()
        )
        self._displace(0.0, ())
        return torch.as_tensor(total)

    def hessian_products(self, vectors: Sequence[Tensors]) -> Tensor:
        """(k, P), by double backward."""

        def products(batch: Any) -> list[Tensor]:
            slope = _grad(self._problem.loss_of(batch), self.parameters, create_graph=True)
            return [flat(_pulled(slope, self.parameters, v)) for v in vectors]

        return self._sum(products)

    def ggn_products(self, vectors: Sequence[Tensors]) -> Tensor:
        """(k, P), with the Jacobian of the outputs that the loss depends on."""

        def products(batch: Any) -> list[Tensor]:
            leaves, tree = pytree.tree_flatten(self._problem.outputs_of(batch))
            tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            others = [
                leaf.detach().requires_grad_() if isinstance(leaf, Tensor) else leaf
                for leaf in leaves
            ]
            loss = self._problem.loss_at(pytree.tree_unflatten(others, tree), batch)
            own = [others[i] for i in tensors]
            slopes = torch.autograd.grad(loss, own, create_graph=True, allow_unused=True)
            used = [k for k, slope in enumerate(slopes) if slope is not None]
            own, slopes = [own[k] for k in used], [slopes[k] for k in used]
            J = self._jacobian(flat([leaves[tensors[k]] for k in used]))
            found = []
            for v in vectors:
                along = (J @ flat(v)).split([leaf.numel() for leaf in own])
                pieces = [a.view(leaf.shape) for a, leaf in zip(along, own, strict=True)]
                found.append(flat(_pulled(slopes, own, pieces)) @ J)
            return found

        return self._sum(products)

    def _jacobian(self, outputs: Tensor) -> Tensor:
        if not outputs.requires_grad:
            return torch.zeros(len(outputs), sum(p.numel() for p in self.parameters))
        n = len(outputs)
        rows = torch.autograd.grad(
            outputs,
            self.parameters,
            torch.eye(n, dtype=outputs.dtype),
            is_grads_batched=True,
            allow_unused=True,
        )
        blocks = [
            p.new_zeros(n, p.numel()) if row is None else row.reshape(n, -1)
            for row, p in zip(rows, self.parameters, strict=True)
        ]
        return torch.cat(blocks, 1)

    def difference(self, direction: Tensors, step: float, order: int = 2) -> Tensor:
        """Central difference of gradients, (P,)."""

        def central(step: float) -> Tensor:
            there, here = (self.gradient(sign * step, direction) for sign in (1, -1))
            return (there - here) / (2 * step)

        return central(step) if order == 2 else (4 * central(step) - central(2 * step)) / 3

    def _sum(self, products: Callable[[Any], list[Tensor]]) -> Tensor:
        total: Any = 0
        for batch, weight in self._batches():
            total = total + weight * torch.stack(products(batch)).detach()
        return torch.as_tensor(total)

    @torch.no_grad()
    def _displace(self, step: float, direction: Tensors) -> None:
        for i, (parameter, start) in enumerate(zip(self.parameters, self._start, strict=True)):
            parameter.copy_(start + step * direction[i] if step else start)


def flat(tensors: Tensors) -> Tensor:
    """One vector of all entries."""
    return torch.cat([t.reshape(-1) for t in tensors])


def _grad(scalar: Tensor, inputs: Tensors, **options: Any) -> Tensors:
    if not scalar.requires_grad:
        return [torch.zeros_like(t) for t in inputs]
    return torch.autograd.grad(
        scalar, inputs, retain_graph=True, allow_unused=True, materialize_grads=True, **options
    )


def _pulled(slopes: Tensors, inputs: Tensors, vectors: Tensors) -> Tensors:
    along = sum((s * v).sum() for s, v in zip(slopes, vectors, strict=True))
    return _grad(torch.as_tensor(along), inputs)
