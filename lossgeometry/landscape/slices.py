"""Lines and surfaces: metrics of a model along one or two directions in weight space."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from lossgeometry.batches import Count, Data, Forward
from lossgeometry.errors import InputError
from lossgeometry.landscape.adaptive import fill_adaptively
from lossgeometry.landscape.directions import Direction
from lossgeometry.landscape.evaluation import Evaluator, Metric, Sets
from lossgeometry.landscape.sampling import Sampler, Slice
from lossgeometry.running.distributed import ALONE, Team


def line(
    model: nn.Module,
    metrics: Mapping[str, Metric],
    data: Sets,
    direction: Direction,
    xs: ArrayLike,
    *,
    weight_decay: float | None = None,
    recalibrate: Data | None = None,
    seed: int = 0,
    bf16: bool = False,
    forward: Forward | None = None,
    count: Count | None = None,
    team: Team = ALONE,
    resume: Slice | None = None,
    save: Callable[[Slice], None] | None = None,
) -> Slice:
    """Metrics at ``weights + x * direction`` for each x.

    Parameters
    ----------
    model, metrics, data, weight_decay, recalibrate, seed, bf16, forward, count, team, resume, save
        As of `surface`.
    direction : Direction
        A dict {parameter name: tensor}. Absent parameters do not move.
    xs : (nx,) array_like
        Steps along it.

    Returns
    -------
    Slice
        A mapping of metric name to an (nx,) float64 array.

    Raises
    ------
    InputError
        As of `surface`.

    See Also
    --------
    flatness : what several lines say in numbers.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import line
    >>> direction = {"weight": torch.tensor([[1.0, 0.0]])}
    >>> line(model, {"mse": mse_loss}, data, direction, [-1, 0, 1])["mse"]  # ((1 + x)^2 + 16) / 2
    array([ 8. ,  8.5, 10. ])
    """
    how: dict[str, Any] = dict(
        seed=seed, recalibrate=recalibrate, bf16=bf16, forward=forward, count=count
    )
    evaluator = Evaluator(model, metrics, data, **how)
    axes = [_axis("xs", xs)]
    sampler = Sampler(evaluator, [direction], axes, resume=resume, save=save, team=team)
    l2 = _penalty(evaluator, [direction], axes, weight_decay)
    sampler.evaluate(np.ndindex(sampler.slice.evaluated.shape))
    sampler.slice.metrics.update(l2)
    return sampler.slice


def surface(
    model: nn.Module,
    metrics: Mapping[str, Metric],
    data: Sets,
    directions: Sequence[Direction],
    xs: ArrayLike,
    ys: ArrayLike,
    *,
    weight_decay: float | None = None,
    adaptive: float | None = None,
    recalibrate: Data | None = None,
    seed: int = 0,
    bf16: bool = False,
    forward: Forward | None = None,
    count: Count | None = None,
    team: Team = ALONE,
    resume: Slice | None = None,
    save: Callable[[Slice], None] | None = None,
) -> Slice:
    """Metrics at ``weights + x * directions[0] + y * directions[1]`` on a grid.

    Li et al., *Visualizing the Loss Landscape of Neural Nets*, NeurIPS 2018, equation 1.

    Parameters
    ----------
    model : nn.Module
        Evaluated in the mode it is in, and left as it is. In training mode what it draws at random
        is drawn once per batch, so that the surface is smooth.
    metrics : mapping of str to callable
        ``fn(outputs, targets) -> scalar``, or None for the loss that the model computes. Of what is
        a mean over examples, the mean over all of `data` is taken, of a sum the sum, as `Hessian`
        does; the attribute "sums" names the latter.
    data : batch, iterable of batches, or mapping of str to one of them
        Batches as for `Hessian`. Of several sets, such as ``{"train": ..., "test": ...}``, the
        metrics are called "train/nll" and so on; the objective is the first metric of the first
        set.
    directions : two Directions
        Dicts {parameter name: tensor}. Absent parameters do not move.
    xs, ys : (nx,), (ny,) array_like
        Steps along the two directions.
    weight_decay : float, optional
        Adds the metric "l2" = weight_decay / 2 * |weights|^2, over all parameters that require
        gradients, at each point.
    adaptive : float, optional
        Largest relative error of the objective, which is the first metric plus the penalty. Only
        as many points of the grid are evaluated as it takes, and the others interpolated. The
        settings "evaluations", "objective_error" and, for each metric and in its units,
        "NAME_error" then say how many there were, and by how much predictions were off at most.
    recalibrate : batch, or iterable of batches, optional
        Training data on which the statistics of every BatchNorm are computed anew at each point; by
        default they stay those of the model. The setting "batchnorm" of the result says which.
    seed : int
        Of what the model draws in training mode.
    bf16 : bool
        Compute in bfloat16 what `torch.autocast` deems safe: faster on a GPU, to two or three
        digits. Statistics of BatchNorm are computed in full precision.
    forward, count : callable, optional
        As of `Hessian`.
    team : Team
        Processes that all make this call and share the points, see
        `lossgeometry.running.distributed.join`. Everyone gets the result of one process alone, to
        the last bit.
    resume : Slice, optional
        What `save` received from the same call before it was interrupted. Points that are done are
        not evaluated again, and the result equals that of an uninterrupted call to the last bit.
    save : callable, optional
        Called with the unfinished result after about every 10 seconds, and when interrupted; in
        the first process of a team only. The arrays it gets are filled further afterwards.

    Returns
    -------
    Slice
        A mapping of metric name to a (ny, nx) float64 array; entry [i, j] is at (xs[j], ys[i]).
        NaN and infinity are what the metric gave there.

    Raises
    ------
    InputError
        If directions do not fit the model, there are no metrics, examples or points, `adaptive` is
        not positive, or `resume` belongs to another grid or other options.

    See Also
    --------
    line : along one direction.
    random_directions : makes the directions; other functions make others.
    plots.plot_surface : draws it in three dimensions, ``plot`` of the result as contours.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import random_directions, surface
    >>> directions = random_directions(model, include="weights", seed=0)
    >>> found = surface(model, {"mse": mse_loss}, data, directions, [-1, 0, 1], [0, 1])
    >>> found["mse"].shape, float(found["mse"][0, 1])  # (ny, nx), and the loss at the weights
    ((2, 3), 8.5)
    """
    if len(directions) != 2:
        raise InputError(f"directions: {len(directions)}, expected 2")
    how: dict[str, Any] = dict(
        seed=seed, recalibrate=recalibrate, bf16=bf16, forward=forward, count=count
    )
    evaluator = Evaluator(model, metrics, data, **how)
    axes = [_axis("xs", xs), _axis("ys", ys)]
    sampler = Sampler(evaluator, directions, axes, resume=resume, save=save, team=team)
    l2 = _penalty(evaluator, directions, axes, weight_decay)
    if adaptive is None:
        sampler.evaluate(np.ndindex(sampler.slice.evaluated.shape))
    else:
        fill_adaptively(sampler, adaptive, l2.get("l2", 0.0))
    sampler.slice.metrics.update(l2)
    return sampler.slice


def _penalty(
    evaluator: Evaluator,
    directions: Sequence[Direction],
    axes: Sequence[np.ndarray],
    weight_decay: float | None,
) -> dict[str, np.ndarray]:
    """The metric "l2" on the grid of `axes`, if there is a `weight_decay`.

    It is a quadratic polynomial of the steps, whose coefficients are inner products.
    """
    if weight_decay is None:
        return {}
    if "l2" in evaluator.names:
        raise InputError("metrics: 'l2' is the name of the penalty, expected another name")
    vectors = [evaluator.weights, *directions]
    gram = np.array([[_dot(a, b) for b in vectors] for a in vectors])
    grid = np.meshgrid(*reversed(axes), indexing="ij")[::-1]
    steps = np.stack([np.ones_like(grid[0]), *grid])
    return {"l2": weight_decay / 2 * np.einsum("i...,ij,j...->...", steps, gram, steps)}


def _dot(a: Direction, b: Direction) -> float:
    products = [(a[name].double() * b[name].double()).sum() for name in a if name in b]
    return float(torch.stack(products).sum()) if products else 0.0


def _axis(name: str, values: ArrayLike) -> np.ndarray:
    axis = np.asarray(values, dtype=np.float64)
    if axis.ndim != 1 or not len(axis) or not np.isfinite(axis).all():
        raise InputError(f"{name}: {values!r}, expected a non-empty list of finite numbers")
    return axis
