"""The Hessian of a training objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lossgeometry.batches import Chunk
from lossgeometry.objective import FrozenLoss
from lossgeometry.operators.base import CurvatureOperator
from lossgeometry.operators.graphs import LinearMap, gradient, saved_by_graph, storage_bytes
from lossgeometry.parameters import flatten


class Hessian(CurvatureOperator):
    r"""Hessian of the mean loss, ``∇²(1/N Σ_n l(f(x_n), y_n) + w/2 |θ|²)``.

    The gradient is computed with a graph once per chunk of data; a product with a vector is one
    backward pass through it (Pearlmutter 1994), by reverse mode twice, which is the one way that
    PyTorch gets right for every layer.

    See `CurvatureOperator` for the parameters and the errors raised.

    See Also
    --------
    eigsh : its outermost eigenvalues.
    spectral_density : all of them, as a density.
    GGN : without the curvature of the network itself.
    per_layer : one for each part of a model.

    References
    ----------
    B. A. Pearlmutter, *Fast Exact Multiplication by the Hessian*, Neural Computation 6, 1994.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> H = Hessian(model, torch.nn.functional.mse_loss, (x, y), weight_decay=0.5)
    >>> H @ torch.eye(2)
    tensor([[1.5000, 0.0000],
            [0.0000, 4.5000]])
    """

    def gradient(self) -> Tensor:
        """Gradient (P,) of the objective that this is the Hessian of, weight decay included."""
        return self._gradient(self._objective, self._parameters)

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """The objective itself, weight decay included, and its gradient (P,)."""
        value, gradient = self._objective.value_and_gradient()
        value, gradient = self.team.sum_(value), self.team.sum_(gradient)
        position = flatten(parameter.detach() for parameter in self._parameters.values())
        penalty = self._weight_decay / 2 * position.double().square().sum()
        return float(value + penalty), gradient.add_(position, alpha=self._weight_decay)

    def _linear_map(self, chunk: Chunk) -> LinearMap:
        parameters = list(self._parameters.values())
        gradients = self._chunk_gradient(chunk)
        at_hand = self._objective.at_hand(chunk)

        def apply(vectors: Sequence[Tensor], block: bool) -> Sequence[Tensor]:
            return gradient(gradients, parameters, vectors, block=block)

        return LinearMap(apply, lambda: storage_bytes(saved_by_graph(gradients), at_hand))

    def _chunk_gradient(self, chunk: Chunk) -> Sequence[Tensor]:
        """Gradient of a chunk's share of the loss, with a graph."""
        with torch.enable_grad(), self._objective.forward(chunk) as outputs:
            loss = chunk.weight * self._objective.loss(outputs, chunk.targets)
            return gradient([loss], list(self._parameters.values()), create_graph=True)

    def _difference(
        self, objective: FrozenLoss, direction: Tensor, ahead: float, behind: float
    ) -> Tensor:
        there, here = (
            self._gradient(objective, objective.displaced(direction, step))
            for step in (ahead, behind)
        )
        return (there - here) / (ahead - behind)

    def _gradient(self, objective: FrozenLoss, parameters: dict[str, Tensor]) -> Tensor:
        position = flatten(parameter.detach() for parameter in parameters.values())
        _, total = objective.value_and_gradient(parameters)
        return self.team.sum_(total).add_(position, alpha=self._weight_decay)
