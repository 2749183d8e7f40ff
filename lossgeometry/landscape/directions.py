"""Directions in weight space: what a slice of the loss landscape is cut along.

A direction is a dict ``{parameter name: tensor of the parameter's shape}``; a parameter it does not
name stays where it is. Directions live on the device and in the dtype of the parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lossgeometry.batches import Count, Data, Forward
from lossgeometry.errors import InputError
from lossgeometry.objective import FrozenLoss, LossFunction
from lossgeometry.parameters import flatten, select_parameters, unflatten
from lossgeometry.storing import Result

Direction = dict[str, Tensor]
Normalization = Literal["filter", "layer", "none"]
Include = Literal["weights", "all"]

# pos_embed, position_embedding, relative_position_bias_table, ...; class_token, cls_token, ...
_NOT_A_WEIGHT = re.compile(r"(^|[._])pos(ition(al)?)?(?=[._]|emb|$)|token$")


def random_directions(
    model: nn.Module,
    n: int = 2,
    *,
    seed: int,
    normalization: Normalization = "filter",
    include: Include = "weights",
) -> list[Direction]:
    """Gaussian directions with the scale of the weights, orthogonal to each other.

    Li et al., *Visualizing the Loss Landscape of Neural Nets*, NeurIPS 2018, section 4: a network
    whose weights are rescaled filter by filter computes the same function, so directions are
    comparable between networks only if each filter of the direction is as long as the network's.

    Parameters
    ----------
    model : nn.Module
        Its parameters that require gradients give the shapes and the lengths; the others stay.
    n : int
        Number of directions.
    seed : int
        The numbers are drawn on the CPU in float32: they are the same on every device, and the
        first directions are the same for every `n`.
    normalization : {"filter", "layer", "none"}
        Which pieces of a direction get the length of the same piece of the model: each output
        filter (index along dim 0 of a parameter with at least two), each parameter, or none.
    include : {"weights", "all"}
        "weights" leaves out what is not the weight of a linear map: parameters of fewer than two
        dimensions (biases, scales and shifts of norms), position embeddings and class tokens.
        Neither moves the row of an embedding's ``padding_idx``, a constant for its gradient.

    Returns
    -------
    list of Direction
        In every piece that has at least `n` entries (filters, or whole parameters with "layer" and
        "none") the directions are orthogonal to each other to rounding; smaller pieces, which have
        no room for that, stay as drawn. Whole directions are therefore orthogonal wherever every
        piece is large enough. Without normalization a piece keeps the length it was drawn with.

    Raises
    ------
    InputError
        If an option is not one of the above, or nothing is left to move.

    See Also
    --------
    eigenvector_directions : those in which the loss is most curved.
    pca_directions : those in which a training moved.
    surface : the loss along two of them.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> from lossgeometry import random_directions
    >>> a, b = random_directions(model, seed=0)
    >>> lengths = torch.stack([d["weight"].norm() for d in (a, b)])
    >>> torch.allclose(lengths, model.weight.norm())
    True
    """
    _require_choice("normalization", normalization, get_args(Normalization))
    _require_choice("include", include, get_args(Include))
    parameters = {
        name: parameter
        for name, parameter in select_parameters(model).items()
        if include == "all" or (parameter.ndim >= 2 and not _NOT_A_WEIGHT.search(name))
    }
    if not parameters:
        raise InputError("include: the model has no weights of two dimensions, expected 'all'")
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
        for _ in range(n)
    ]
    padding = {
        module.weight: module.padding_idx
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None
    }
    directions: list[Direction] = [{} for _ in range(n)]
    for name, parameter in parameters.items():
        if parameter in padding:
            for d in drawn:
                d[name][padding[parameter]] = 0
        filters = parameter.shape[0] if normalization == "filter" and parameter.ndim >= 2 else 1
        pieces = torch.stack([d[name].double().view(filters, -1) for d in drawn])
        lengths = pieces.norm(dim=-1, keepdim=True)
        if normalization != "none":
            lengths = (
                parameter.detach().double().reshape(filters, -1).norm(dim=-1, keepdim=True).cpu()
            )
        pieces = lengths * _orthonormal(pieces)
        for direction, piece in zip(directions, pieces, strict=True):
            direction[name] = piece.view(parameter.shape).to(parameter)
    return directions


def towards(model: nn.Module, other: Mapping[str, Tensor]) -> Direction:
    """Direction from the weights of `model` (x = 0) to those of the state dict `other` (x = 1).

    Only parameters move: buffers, such as the statistics of a BatchNorm, stay those of `model`.

    Parameters
    ----------
    model : nn.Module
    other : state dict
        Of the same architecture.

    Returns
    -------
    Direction
        A dict {parameter name: tensor}.

    Raises
    ------
    InputError
        If a parameter is missing from `other` or has another shape there, or if weights are not
        finite.

    See Also
    --------
    linear_path : the metrics on the way, and their barriers.
    plane : through three models.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> from lossgeometry import towards
    >>> towards(model, {"weight": torch.tensor([[1.0, 0.0]])})
    {'weight': tensor([[ 0., -2.]])}
    """
    return _difference(_matching(model, other), _matching(model, _weights(model)))


@dataclass(frozen=True, repr=False)
class Plane(Result):
    """The plane through three points of weight space, in coordinates that keep distances.

    See Also
    --------
    plane : computes it.
    surface : the loss along its directions.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import plane, surface
    >>> second, third = (torch.tensor([[a, b]]) for a, b in ((4.0, 2.0), (1.0, 4.0)))
    >>> through = plane(model, {"weight": second}, {"weight": third})
    >>> surface(model, {"mse": mse_loss}, data, through.directions, [0, 3], [0, 2])["mse"]
    array([[ 8.5, 16. ],
           [32.5, 40. ]])
    """

    directions: list[Direction]  # two, orthonormal
    points: np.ndarray  # (3, 2): where the model, the second and the third point lie


def plane(model: nn.Module, second: Mapping[str, Tensor], third: Mapping[str, Tensor]) -> Plane:
    """Plane through `model`, which is its origin, and two other state dicts.

    The x axis points to the second; see Garipov et al., *Loss Surfaces, Mode Connectivity, and Fast
    Ensembling of DNNs*, NeurIPS 2018, appendix A.1. One unit is one unit of Euclidean distance
    between weights.

    Parameters
    ----------
    model : nn.Module
    second, third : state dicts
        Of the same architecture.

    Returns
    -------
    Plane
        Its two directions, for `surface`, and where the three points lie.

    Raises
    ------
    InputError
        If the states do not fit the model, are not finite or lie on one line.

    See Also
    --------
    pca_directions : the plane that is closest to more than three.
    surface : the loss in the plane.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> from lossgeometry import plane
    >>> second, third = (torch.tensor([[a, b]]) for a, b in ((4.0, 2.0), (1.0, 4.0)))
    >>> plane(model, {"weight": second}, {"weight": third}).points
    array([[0., 0.],
           [3., 0.],
           [0., 2.]])
    """
    names = list(_weights(model))
    u, v = (
        flatten(d[name].double() for name in names)
        for d in (towards(model, second), towards(model, third))
    )
    width = u.norm()
    u = u / width
    along = u @ v
    v = v - along * u
    height = v.norm()
    if not height > 1e-6 * along.abs():  # also where two points are the same
        raise InputError("plane: the three points lie on one line, expected a triangle")
    points = torch.stack(
        [torch.zeros(2), torch.stack([width, width * 0]).cpu(), torch.stack([along, height]).cpu()]
    )
    return Plane([from_vector(vector, model) for vector in (u, v / height)], points.numpy())


def pca_directions(
    snapshots: Sequence[Mapping[str, Tensor]], model: nn.Module, n: int = 2
) -> tuple[list[Direction], np.ndarray]:
    """Principal directions of the weights at different times of a training run.

    Li et al. 2018, section 7.2: the few directions in which the run moved most, in which its
    trajectory is visible; in random directions it hardly moves.

    Parameters
    ----------
    snapshots : sequence of state dicts
        At least n + 1, in any order.
    model : nn.Module
        Which entries of the state dicts are parameters.
    n : int
        Number of directions.

    Returns
    -------
    directions : list of Direction
        Orthonormal, the largest variance first. Each points from the first snapshot to the last.
    explained_variance : np.ndarray
        (n,) shares of the total variance, in [0, 1].

    Raises
    ------
    InputError
        If snapshots do not fit the model, are not finite, or move in fewer than n directions.

    See Also
    --------
    trajectory : the way of the training along two of them.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> from lossgeometry import pca_directions
    >>> run = [{"weight": torch.tensor([[a, b]])} for a, b in ((0.0, 0.0), (2.0, 0.1), (4.0, 0.0))]
    >>> directions, shares = pca_directions(run, model)
    >>> directions[0]["weight"].round(decimals=3), shares.round(3)
    (tensor([[1., 0.]]), array([0.999, 0.001]))
    """
    too_few = InputError(
        f"snapshots: {len(snapshots)} that span fewer than {n} directions, expected {n + 1} or more"
    )
    if len(snapshots) <= n:
        raise too_few
    points = torch.stack(
        [flatten(w.double() for w in _matching(model, state).values()) for state in snapshots]
    )
    moves = points - points.mean(0)
    # The small Gram matrix has the same non-zero spectrum as the (P, P) covariance.
    variances, vectors = torch.linalg.eigh(moves @ moves.T)
    variances, vectors = variances.flip(0)[:n], vectors.flip(1)[:, :n]
    if len(variances) < n or not (variances > 1e-12 * variances[0]).all():
        raise too_few
    axes = (vectors / variances.sqrt()).T @ moves
    axes = torch.where(axes @ (points[-1] - points[0]) < 0, -1, 1)[:, None] * axes
    shares = variances / moves.square().sum()
    return [from_vector(axis, model) for axis in axes], shares.cpu().numpy()


def eigenvector_directions(
    model: nn.Module, eigenvectors: Tensor, *, params: str | None = None
) -> list[Direction]:
    """Columns of the (P, k) `eigenvectors` of a curvature operator as k directions.

    One unit along an eigenvector of length one is one unit of distance, so the second derivative of
    the loss along it is the eigenvalue.

    Parameters
    ----------
    model : nn.Module
    eigenvectors : (P, k) Tensor
        Of `eigsh`.
    params : str, optional
        The regular expression that chose the P parameters of the operator.

    Returns
    -------
    list of Direction
        k of them.

    Raises
    ------
    InputError
        If P is not the number of those parameters.

    See Also
    --------
    eigsh : computes the eigenvectors.
    surface : the loss along two of the directions.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import Hessian, eigenvector_directions, eigsh
    >>> top = eigsh(Hessian(model, mse_loss, data), k=1)
    >>> (direction,) = eigenvector_directions(model, top.eigenvectors)
    >>> direction["weight"].abs().round(decimals=3)
    tensor([[0., 1.]])
    """
    parameters = select_parameters(model, params)
    expected = sum(parameter.numel() for parameter in parameters.values())
    if eigenvectors.ndim != 2 or len(eigenvectors) != expected:
        raise InputError(
            f"eigenvectors: shape {tuple(eigenvectors.shape)}, expected ({expected}, k)"
        )
    return [
        {name: piece.to(parameters[name]) for name, piece in unflatten(vector, parameters).items()}
        for vector in eigenvectors.T.contiguous()
    ]


def gradient_direction(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Data,
    *,
    weight_decay: float = 0.0,
    forward: Forward | None = None,
    count: Count | None = None,
    seed: int = 0,
) -> Direction:
    """Gradient of the loss over all of `data` plus ``weight_decay / 2 * |weights|^2``.

    x = -0.1 is a step of gradient descent with learning rate 0.1.

    Parameters
    ----------
    model, loss_fn, data, weight_decay, forward, count
        As of `Hessian`.
    seed : int
        Of what the model draws at random, in the mode it is in.

    Returns
    -------
    Direction
        A dict {parameter name: tensor}.

    Raises
    ------
    InputError
        As of `Hessian`.

    See Also
    --------
    Hessian.gradient : the same as a vector.
    line : the loss along it.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import gradient_direction
    >>> gradient_direction(model, mse_loss, data)
    {'weight': tensor([[1., 8.]])}
    """
    how: dict[str, Any] = dict(forward=forward, count=count, seed=seed, regroup=True)
    objective = FrozenLoss(model, loss_fn, data, **how)
    _, gradient = objective.value_and_gradient()
    return {
        name: piece + weight_decay * objective.parameters[name].detach()
        for name, piece in unflatten(gradient, objective.parameters).items()
    }


def as_vector(direction: Mapping[str, Tensor], model: nn.Module) -> Tensor:
    """The (P,) vector of a direction over all parameters of `model`; absent ones do not move."""
    return flatten(direction.get(name, torch.zeros_like(p)) for name, p in _weights(model).items())


def from_vector(vector: Tensor, model: nn.Module) -> Direction:
    """Inverse of `as_vector`, in the dtype and on the device of the parameters."""
    weights = _weights(model)
    return {name: piece.to(weights[name]) for name, piece in unflatten(vector, weights).items()}


def _weights(model: nn.Module) -> Direction:
    return {name: parameter.detach() for name, parameter in select_parameters(model).items()}


def _matching(model: nn.Module, state: Mapping[str, Tensor]) -> Direction:
    """The entries of a state dict that are parameters of `model`, all of them finite."""
    weights = _weights(model)
    for name, weight in weights.items():
        found = tuple(state[name].shape) if name in state else "nothing"
        if found != tuple(weight.shape):
            raise InputError(f"state: {found} for {name}, expected shape {tuple(weight.shape)}")
    require_finite("state", {name: state[name] for name in weights})
    return {name: state[name].detach().to(weight.device) for name, weight in weights.items()}


def require_finite(what: str, state: Mapping[str, Tensor]) -> None:
    """Raise `InputError`, which begins with `what`, if a tensor of a state dict is not finite."""
    for name, tensor in state.items():
        unknown = int((~tensor.isfinite()).sum())
        if unknown:
            raise InputError(
                f"{what}: {unknown} of {tensor.numel()} numbers in {name} are not finite, expected "
                "finite weights"
            )


def _difference(end: Direction, start: Direction) -> Direction:
    return {name: (end[name] - weight).to(weight) for name, weight in start.items()}


def _orthonormal(pieces: Tensor) -> Tensor:
    """Gram-Schmidt on n directions of F pieces each: (n, F, E). With E < n it only scales."""
    basis: list[Tensor] = []
    for piece in pieces:
        if pieces.shape[-1] >= len(pieces):
            for earlier in basis:
                piece = piece - (piece * earlier).sum(-1, keepdim=True) * earlier
        length = piece.norm(dim=-1, keepdim=True)
        basis.append(piece / length.where(length > 0, 1))  # zeros stay zeros
    return torch.stack(basis)


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name}: {value!r} is not usable, expected one of {choices}")
