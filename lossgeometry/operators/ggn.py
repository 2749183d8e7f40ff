"""The generalised Gauss-Newton matrix and the Fisher information of a training objective."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lossgeometry.batches import Chunk
from lossgeometry.errors import InputError
from lossgeometry.objective import FrozenLoss, LossFunction
from lossgeometry.operators.base import CurvatureOperator
from lossgeometry.operators.cross_entropy import InPieces
from lossgeometry.operators.graphs import (
    LinearMap,
    ends_of,
    gradient,
    leaves_of,
    saved_by_graph,
    storage_bytes,
)
from lossgeometry.parameters import flatten
from lossgeometry.seeds import untouched_rng

# A symmetric linear map of tensors shaped like the outputs; True: blocks of such tensors.
OutputMap = Callable[[Sequence[Tensor], bool], Sequence[Tensor]]


class Outputs:
    """The tensors of numbers among what a model returns, in whatever dicts and tuples."""

    def __init__(self, returned: Any) -> None:
        self._leaves, self._tree = pytree.tree_flatten(returned)
        self._places = [
            i
            for i, leaf in enumerate(self._leaves)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        if not self._places:
            raise InputError(
                f"model: outputs of type {type(returned).__name__}, expected tensors of real "
                "numbers, or dicts or tuples of them"
            )

    @property
    def tensors(self) -> list[Tensor]:
        """Those that count."""
        return [self._leaves[i] for i in self._places]

    def keep_those_of(self, loss: Callable[[Any], Tensor]) -> None:
        """Forget the tensors that a loss of the outputs does not depend on."""
        if len(self._places) == 1:
            return
        leaves = self.leaves()
        with untouched_rng(leaves[0].device):  # the loss that counts draws what this one does
            value = loss(self.with_(leaves))
        if value.requires_grad:
            used = leaves_of(value)
            pairs = zip(self._places, leaves, strict=True)
            self._places = [place for place, leaf in pairs if id(leaf) in used]

    def leaves(self) -> list[Tensor]:
        """The same numbers as leaves of a graph of their own."""
        return [tensor.detach().requires_grad_() for tensor in self.tensors]

    def with_(self, tensors: Sequence[Tensor]) -> Any:
        """What the model returns, with other numbers."""
        leaves = list(self._leaves)
        for i, tensor in zip(self._places, tensors, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, self._tree)


class _OuterProduct(CurvatureOperator):
    """``JᵀBJ`` with the Jacobian `J` of the outputs and a matrix `B` on the outputs.

    `Jv` comes from reverse mode alone: ``Jᵀu`` is linear in `u`, and the derivative of ``v·Jᵀu``
    with respect to `u` is `Jv`. Both graphs are kept, so that a product repeats no forward pass.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, *args: Any, **options: Any) -> None:
        if loss_fn is None:
            raise InputError(
                f"loss_fn: none given, expected one: {type(self).__name__} is of the outputs and "
                "of a loss of them"
            )
        super().__init__(model, loss_fn, *args, **options)

    @abstractmethod
    def _output_map(self, objective: FrozenLoss, outputs: Outputs, chunk: Chunk) -> OutputMap:
        """The matrix `B` of a chunk's share of the loss."""

    def _linear_map(self, chunk: Chunk) -> LinearMap:
        parameters = list(self._parameters.values())
        with torch.enable_grad(), self._objective.forward(chunk) as returned:
            outputs = self._outputs(self._objective, returned, chunk)
            # Zeros without memory of their own: outputs may be large.
            cotangents = [t.new_zeros(()).expand(t.shape).requires_grad_() for t in outputs.tensors]
            pulled = gradient(outputs.tensors, parameters, cotangents, create_graph=True)
            output_map = self._output_map(self._objective, outputs, chunk)
        tensors = outputs.tensors

        def apply(vectors: Sequence[Tensor], block: bool) -> Sequence[Tensor]:
            tangents = gradient(pulled, cotangents, vectors, block=block)
            curved = output_map(tangents, block)
            del tangents  # which may be large
            return gradient(tensors, parameters, curved, block=block)

        at_hand = self._objective.at_hand(chunk)
        return LinearMap(apply, lambda: storage_bytes(saved_by_graph([*pulled, *tensors]), at_hand))

    def _difference(
        self, objective: FrozenLoss, direction: Tensor, ahead: float, behind: float
    ) -> Tensor:
        total = torch.zeros_like(direction)
        parameters = list(objective.parameters.values())
        for chunk in objective.chunks:
            there, here = (
                self._values(objective, chunk, objective.displaced(direction, step))
                for step in (ahead, behind)
            )
            tangents = [(a - b) / (ahead - behind) for a, b in zip(there, here, strict=True)]
            with torch.enable_grad(), objective.forward(chunk) as returned:
                outputs = self._outputs(objective, returned, chunk)
                output_map = self._output_map(objective, outputs, chunk)
                curved = output_map(tangents, False)
                total += flatten(gradient(outputs.tensors, parameters, curved))
        return self.team.sum_(total).add_(direction, alpha=self._weight_decay)

    def _values(
        self, objective: FrozenLoss, chunk: Chunk, parameters: dict[str, Tensor]
    ) -> list[Tensor]:
        with torch.enable_grad(), objective.forward(chunk, parameters) as returned:
            outputs = self._outputs(objective, returned, chunk)
            return [tensor.detach() for tensor in outputs.tensors]

    @staticmethod
    def _outputs(objective: FrozenLoss, returned: Any, chunk: Chunk) -> Outputs:
        outputs = Outputs(returned)
        with InPieces():
            outputs.keep_those_of(lambda own: objective.loss(own, chunk.targets))
        return outputs


class GGN(_OuterProduct):
    r"""Generalised Gauss-Newton matrix, ``1/N Σ_n J_nᵀ ∇²l(f_n) J_n + w I`` (Schraudolph 2002).

    The Hessian without the curvature of the network itself; positive semi-definite where the loss
    is convex in the outputs. For softmax cross-entropy, and for any loss that is the negative
    log-likelihood of an exponential family with `f` its natural parameter, it is the exact (true)
    Fisher information.

    `torch.nn.functional.cross_entropy` of many logits, as language models have them, is
    differentiated in closed form and in pieces: at most three times the memory of the logits is
    taken besides.

    See `CurvatureOperator` for the parameters.

    Raises
    ------
    InputError
        As of `CurvatureOperator`; or `loss_fn` is None.

    See Also
    --------
    Hessian : with the curvature of the network itself.
    Fisher : from the gradients of single examples.

    References
    ----------
    N. N. Schraudolph, *Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent*,
    Neural Computation 14, 2002.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import cross_entropy
    >>> from lossgeometry import GGN
    >>> model = torch.nn.Linear(1, 2, bias=False).requires_grad_()
    >>> torch.nn.init.zeros_(model.weight)
    Parameter containing:
    tensor([[0.],
            [0.]], requires_grad=True)
    >>> A = GGN(model, cross_entropy, (torch.tensor([[2.0]]), torch.tensor([1])))
    >>> A @ torch.eye(2)  # 4 (diag(p) - p pᵀ), p = (1/2, 1/2)
    tensor([[ 1., -1.],
            [-1.,  1.]])
    """

    def _output_map(self, objective: FrozenLoss, outputs: Outputs, chunk: Chunk) -> OutputMap:
        leaves = outputs.leaves()
        with InPieces():
            loss = chunk.weight * objective.loss(outputs.with_(leaves), chunk.targets)
        slopes = ends_of(gradient([loss], leaves, create_graph=True))

        def output_map(tangents: Sequence[Tensor], block: bool) -> Sequence[Tensor]:
            return gradient(slopes, leaves, tangents, block=block)

        return output_map


class Fisher(_OuterProduct):
    r"""Fisher information, ``1/N Σ_n E_y[∇l_n ∇l_nᵀ] + w I``, empirical or by Monte Carlo.

    The gradient of one datum's loss is ``J_nᵀ ∇l(f_n)``, so that this is ``JᵀBJ`` as well. A datum
    is an example, except where outputs of more than two dimensions have a class index as target at
    every position, (n, classes, ...) as `torch.nn.functional.cross_entropy` has them or
    (n, ..., classes): there each position is one, unless its target is not the index of a class
    (the -100 or 255 that losses ignore), and the loss is taken for the mean over these. The loss of
    a datum is what it adds to the mean, times how many data there are: with `count`, long sentences
    count for more than short ones. Of a loss that is a sum, so is the Fisher information.

    Parameters
    ----------
    mc_samples
        None: the *empirical* Fisher, with the targets of the data. A number: the *true* Fisher,
        whose expectation over ``y ~ softmax(f(x))`` is estimated by so many draws per datum,
        frozen by `seed`; the outputs are then taken for logits. The exact expectation is `GGN`.
    *args, **options
        As of `CurvatureOperator`; `compile` with the targets of the data only, as what has been
        drawn for one batch would be recorded for all.

    Raises
    ------
    InputError
        As of `GGN`; or outputs are no logits where `mc_samples` is given, or it is less than 1.

    See Also
    --------
    GGN : the exact expectation over targets, for softmax cross-entropy.
    Hessian : the curvature of the loss itself.

    References
    ----------
    J. Martens, *New Insights and Perspectives on the Natural Gradient Method*, JMLR 21, 2020.
    F. Kunstner, L. Balles and P. Hennig, *Limitations of the Empirical Fisher Approximation for
    Natural Gradient Descent*, NeurIPS 2019.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import Fisher
    >>> Fisher(model, mse_loss, data) @ torch.eye(2)  # of gradients (2, 0), (0, 16)
    tensor([[  2.,   0.],
            [  0., 128.]])
    """

    def __init__(self, *args: Any, mc_samples: int | None = None, **options: Any) -> None:
        if mc_samples is not None and mc_samples < 1:
            raise InputError(f"mc_samples: {mc_samples}, expected None or at least 1")
        if mc_samples is not None and options.get("compile"):
            raise InputError(f"mc_samples: {mc_samples}, expected None where products are compiled")
        self._mc_samples = mc_samples
        super().__init__(*args, **options | {"compile": False})
        self._of_a_sum = self._objective.is_sum()
        if options.get("compile") and self._objective.chunks:
            self._compiled = self._compile(self._objective.chunks[0])

    def _output_map(self, objective: FrozenLoss, outputs: Outputs, chunk: Chunk) -> OutputMap:
        if self._mc_samples is None:
            targets = [chunk.targets]
        else:
            targets = list(_draw_targets(outputs.tensors, chunk, self._mc_samples))
        leaves = outputs.leaves()
        found = [gradient([objective.loss(outputs.with_(leaves), y)], leaves) for y in targets]
        n, inner = _data_in(leaves, chunk.targets)
        if len(inner[0]) == leaves[0].ndim - 1:  # examples, of however many that `count` counts
            n *= chunk.count / chunk.size * objective.examples / objective.counted
        # A mean over n data, of each of which the outputs touch one term only, or their sum.
        factor = 1 if self._of_a_sum else n
        slopes = [[factor * piece for piece in slope] for slope in found]
        scale = chunk.weight / (factor * len(slopes))

        def output_map(tangents: Sequence[Tensor], block: bool) -> Sequence[Tensor]:
            products = []
            for slope in slopes:
                along = sum(
                    (s * t).sum(dims, keepdim=True)
                    for s, t, dims in zip(slope, tangents, inner, strict=True)
                )
                products.append([s * along for s in slope])
            return [scale * torch.stack(pieces).sum(0) for pieces in zip(*products, strict=True)]

        return output_map


def _class_dimension(outputs: Tensor, targets: Any) -> int | None:
    """That of outputs which have classes where `targets` has their indices; the second if any."""
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    for dim in (1, outputs.ndim - 1):
        if outputs.ndim > 1 and targets.shape == outputs.shape[:dim] + outputs.shape[dim + 1 :]:
            return dim
    return None


def _are_classes(targets: Tensor, classes: int) -> Tensor:
    """Whether targets are indices of classes; what is none is one that the loss ignores."""
    return (targets >= 0) & (targets < classes)


def _data_in(outputs: Sequence[Tensor], targets: Any) -> tuple[float, list[tuple[int, ...]]]:
    """How many data there are, and the dimensions of each tensor that belong to one of them."""
    dim = _class_dimension(outputs[0], targets) if len(outputs) == 1 else None
    if dim is not None and outputs[0].ndim > 2:
        counted = _are_classes(targets, outputs[0].shape[dim])
        return int(counted.sum()), [(dim - outputs[0].ndim,)]
    n = len(outputs[0])
    if any(len(tensor) != n for tensor in outputs):
        raise InputError("model: outputs of different lengths, expected one entry for each example")
    return n, [tuple(range(1 - tensor.ndim, 0)) for tensor in outputs]


def _draw_targets(outputs: Sequence[Tensor], chunk: Chunk, samples: int) -> Iterator[Tensor]:
    """Targets in the form of the data's own, drawn from the model's predictive distribution."""
    logits, targets = outputs[0].detach(), chunk.targets
    soft = isinstance(targets, Tensor) and targets.shape == logits.shape
    dim = 1 if soft else _class_dimension(logits, targets)
    if len(outputs) > 1 or dim is None or logits.ndim < 2:
        raise InputError(
            f"mc_samples: outputs of shape {tuple(logits.shape)}, expected (n, classes), or "
            "classes beside the shape of the targets"
        )
    cumulative = logits.double().movedim(dim, -1).softmax(-1).cumsum(-1)
    # A batch's numbers are drawn in order of its examples: they do not depend on how it is cut.
    shape = (chunk.start + len(logits), *cumulative.shape[1:-1], samples)
    uniform = np.random.default_rng(chunk.seed).random(shape)
    levels = torch.as_tensor(uniform[chunk.start :], device=logits.device)
    indices = torch.searchsorted(cumulative, levels).clamp_(max=logits.shape[dim] - 1)
    for index in indices.unbind(-1):
        if soft:
            drawn = torch.nn.functional.one_hot(index, logits.shape[dim]).to(targets.dtype)
            yield drawn.movedim(-1, dim)
        else:  # what is ignored stays so
            given = targets.to(index.device)
            yield torch.where(_are_classes(given, logits.shape[dim]), index, given)
