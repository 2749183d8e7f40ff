"""The generalised Gauss-Newton matrix and the Fisher information of a training objective."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.curvature.frozen import Chunk, FrozenLoss
from analysis.curvature.graphs import LinearMap, gradient, saved_by_graph, storage_bytes
from analysis.curvature.operators import CurvatureOperator
from analysis.parameters import flatten
from models.errors import InputError

# A symmetric linear map of tensors shaped like the outputs; True: a block of such tensors.
OutputMap = Callable[[Tensor, bool], Tensor]


class _OuterProduct(CurvatureOperator):
    """``JᵀBJ`` with the Jacobian `J` of the outputs and a matrix `B` on the outputs.

    `Jv` comes from reverse mode alone: ``Jᵀu`` is linear in `u`, and the derivative of ``v·Jᵀu``
    with respect to `u` is `Jv`. Both graphs are kept, so that a product repeats no forward pass.
    """

    @abstractmethod
    def _output_map(self, objective: FrozenLoss, outputs: Tensor, chunk: Chunk) -> OutputMap:
        """The matrix `B` of the mean over a chunk; `outputs` is a leaf that requires a gradient."""

    def _linear_map(self, chunk: Chunk) -> LinearMap:
        parameters = list(self._parameters.values())
        with torch.enable_grad(), self._objective.forward(chunk) as outputs:
            cotangent = torch.zeros_like(outputs, requires_grad=True)
            pulled = gradient([outputs], parameters, [cotangent], create_graph=True)
            output_map = self._output_map(self._objective, outputs.detach().requires_grad_(), chunk)

        def apply(vectors: Sequence[Tensor], block: bool) -> Sequence[Tensor]:
            (tangent,) = gradient(pulled, [cotangent], vectors, block=block)
            curved = output_map(tangent, block)
            return gradient([outputs], parameters, [chunk.weight * curved], block=block)

        at_hand = self._objective.at_hand(chunk)
        return LinearMap(apply, lambda: storage_bytes(saved_by_graph([*pulled, outputs]), at_hand))

    def _difference(
        self, objective: FrozenLoss, direction: Tensor, ahead: float, behind: float
    ) -> Tensor:
        total = torch.zeros_like(direction)
        parameters = list(objective.parameters.values())
        for chunk in objective.chunks:
            with torch.no_grad():
                there, here = (
                    self._outputs(objective, chunk, objective.displaced(direction, step))
                    for step in (ahead, behind)
                )
            with torch.enable_grad(), objective.forward(chunk) as outputs:
                output_map = self._output_map(objective, outputs.detach().requires_grad_(), chunk)
                curved = output_map((there - here) / (ahead - behind), False)
                total += flatten(gradient([outputs], parameters, [chunk.weight * curved]))
        return self.team.sum_(total).add_(direction, alpha=self._weight_decay)

    @staticmethod
    def _outputs(objective: FrozenLoss, chunk: Chunk, parameters: dict[str, Tensor]) -> Tensor:
        with objective.forward(chunk, parameters) as outputs:
            return outputs


class GGN(_OuterProduct):
    r"""Generalised Gauss-Newton matrix, ``1/N Σ_n J_nᵀ ∇²l(f_n) J_n + w I`` (Schraudolph 2002).

    The Hessian without the curvature of the network itself; positive semi-definite where the loss
    is convex in the outputs. For softmax cross-entropy, and for any loss that is the negative
    log-likelihood of an exponential family with `f` its natural parameter, it is the exact (true)
    Fisher information.

    See `CurvatureOperator` for the parameters.
    """

    def _output_map(self, objective: FrozenLoss, outputs: Tensor, chunk: Chunk) -> OutputMap:
        loss = objective.loss(outputs, chunk.y)
        (slope,) = torch.autograd.grad(loss, outputs, create_graph=True, materialize_grads=True)

        def output_map(tangent: Tensor, block: bool) -> Tensor:
            return gradient([slope], [outputs], [tangent], block=block)[0]

        return output_map


class Fisher(_OuterProduct):
    r"""Fisher information, ``1/N Σ_n E_y[∇l_n ∇l_nᵀ] + w I``, empirical or by Monte Carlo.

    The gradient of one example's loss is ``J_nᵀ ∇l(f_n)``, so that this is ``JᵀBJ`` as well.

    Parameters
    ----------
    mc_samples
        None: the *empirical* Fisher, with the targets of the data. A number: the *true* Fisher,
        whose expectation over ``y ~ softmax(f(x))`` is estimated by so many draws per example,
        frozen by `seed`; the outputs are then taken for logits over the last dimension. The exact
        expectation is `GGN`.
    **options
        As of `CurvatureOperator`; `compile` with the targets of the data only, as what has been
        drawn for one batch would be recorded for all.
    """

    def __init__(self, *args: Any, mc_samples: int | None = None, **options: Any) -> None:
        if mc_samples is not None and mc_samples < 1:
            raise InputError(f"mc_samples: {mc_samples}, expected None or at least 1")
        if mc_samples is not None and options.get("compile"):
            raise InputError(f"mc_samples: {mc_samples}, expected None where products are compiled")
        self._mc_samples = mc_samples
        super().__init__(*args, **options)

    def _output_map(self, objective: FrozenLoss, outputs: Tensor, chunk: Chunk) -> OutputMap:
        if self._mc_samples is None:
            targets = [chunk.y]
        else:
            targets = list(_draw_targets(outputs.detach(), chunk, self._mc_samples))
        # The loss is a mean over the n examples, of which each one's outputs touch one term only.
        slopes = [
            len(outputs)
            * torch.autograd.grad(objective.loss(outputs, target), outputs, materialize_grads=True)[
                0
            ]
            for target in targets
        ]
        inner = tuple(range(1 - outputs.ndim, 0))  # all dimensions of one example
        scale = 1 / (len(outputs) * len(slopes))

        def output_map(tangent: Tensor, block: bool) -> Tensor:
            products = [slope * (slope * tangent).sum(inner, keepdim=True) for slope in slopes]
            return scale * torch.stack(products).sum(0)

        return output_map


def _draw_targets(logits: Tensor, chunk: Chunk, samples: int) -> Iterator[Tensor]:
    """Targets in the form of the data's own, drawn from the model's predictive distribution."""
    if logits.ndim != 2:
        raise InputError(
            f"mc_samples: outputs of shape {tuple(logits.shape)}, expected (n, classes)"
        )
    # A batch's numbers are drawn in order of its examples: they do not depend on how it is cut.
    uniform = np.random.default_rng(chunk.seed).random((chunk.start + len(logits), samples))
    levels = torch.as_tensor(uniform[chunk.start :], device=logits.device)
    cumulative = logits.double().softmax(1).cumsum(1)
    indices = torch.searchsorted(cumulative, levels).clamp_(max=logits.shape[1] - 1)
    for index in indices.unbind(1):
        if chunk.y.is_floating_point():
            yield torch.nn.functional.one_hot(index, logits.shape[1]).to(chunk.y.dtype)
        else:
            yield index
