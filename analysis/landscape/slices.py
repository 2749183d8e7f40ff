"""Lines and surfaces: metrics of a model along one or two directions in weight space."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn
from tqdm import tqdm

from analysis.landscape.directions import Direction
from analysis.landscape.evaluation import Data, Evaluator, Metric, displaced, fingerprint
from models.errors import InputError

SAVE_EVERY = 10.0  # seconds

Save = Callable[["Slice"], None]


@dataclass(frozen=True)
class Slice(Mapping[str, np.ndarray]):
    """Metrics on a grid of points; ``slice["nll"]`` is an array. What a metric gave is kept as is.

    The shape of each array is (len(ys), len(xs)) for a surface, (len(xs),) for a line.
    """

    xs: np.ndarray  # (nx,) steps along the first direction
    ys: np.ndarray | None  # (ny,) steps along the second; None for a line
    metrics: dict[str, np.ndarray]  # {metric: float64 of the shape above}
    done: np.ndarray  # bool of the shape above: which points have been evaluated
    attributes: dict[str, Any]  # how it was measured: plain strings, numbers and booleans

    def __getitem__(self, metric: str) -> np.ndarray:
        return self.metrics[metric]

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)


def line(
    model: nn.Module,
    metrics: Mapping[str, Metric],
    data: Data,
    direction: Direction,
    xs: ArrayLike,
    *,
    weight_decay: float | None = None,
    recalibrate: Data | None = None,
    seed: int = 0,
    resume: Slice | None = None,
    save: Save | None = None,
) -> Slice:
    """Metrics at ``weights + x * direction`` for each x: arrays of shape (len(xs),).

    Options and errors are those of `surface`.
    """
    return _evaluate(
        Evaluator(model, metrics, data, seed=seed, recalibrate=recalibrate),
        [direction],
        [_axis("xs", xs)],
        weight_decay=weight_decay,
        resume=resume,
        save=save,
    )


def surface(
    model: nn.Module,
    metrics: Mapping[str, Metric],
    data: Data,
    directions: Sequence[Direction],
    xs: ArrayLike,
    ys: ArrayLike,
    *,
    weight_decay: float | None = None,
    recalibrate: Data | None = None,
    seed: int = 0,
    resume: Slice | None = None,
    save: Save | None = None,
) -> Slice:
    """Metrics at ``weights + x * directions[0] + y * directions[1]`` on a grid.

    Li et al., *Visualizing the Loss Landscape of Neural Nets*, NeurIPS 2018, equation 1.

    Parameters
    ----------
    model : nn.Module
        Evaluated in the mode it is in, and left as it is. In training mode what it draws at random
        is drawn once per batch, so that the surface is smooth.
    metrics : mapping of str to callable
        ``fn(outputs, targets) -> scalar``, the mean over the batch.
    data : (x, y), or iterable of (x, y)
        The metrics are means over all its examples, however they are batched.
    directions : two dicts {parameter name: tensor}
        Absent parameters do not move.
    xs, ys : (nx,), (ny,) array_like
        Steps along the two directions.
    weight_decay : float, optional
        Adds the metric "l2" = weight_decay / 2 * |weights|^2, over all parameters, at each point.
    recalibrate : (x, y), or iterable of (x, y), optional
        Training data on which the statistics of every BatchNorm are computed anew at each point; by
        default they stay those of the model. The attribute "batchnorm" of the result says which.
    seed : int
        Of what the model draws in training mode.
    resume : Slice, optional
        What `save` received from the same call before it was interrupted. Points that are done are
        not evaluated again, and the result equals that of an uninterrupted call to the last bit.
    save : callable, optional
        Called with the unfinished result after about every 10 seconds, and when interrupted. The
        arrays it gets are filled further afterwards.

    Returns
    -------
    Slice
        A mapping of metric name to a (ny, nx) float64 array; entry [i, j] is at (xs[j], ys[i]).
        NaN and infinity are what the metric gave there.

    Raises
    ------
    InputError
        If directions do not fit the model, there are no metrics, examples or points, or `resume`
        belongs to another grid or other options.
    """
    return _evaluate(
        Evaluator(model, metrics, data, seed=seed, recalibrate=recalibrate),
        directions,
        [_axis("xs", xs), _axis("ys", ys)],
        weight_decay=weight_decay,
        resume=resume,
        save=save,
    )


def _evaluate(
    evaluator: Evaluator,
    directions: Sequence[Direction],
    axes: Sequence[np.ndarray],
    *,
    weight_decay: float | None,
    resume: Slice | None,
    save: Save | None,
) -> Slice:
    _require_fit(evaluator, directions, len(axes))
    result = _empty(evaluator, axes, weight_decay)
    result.attributes["directions"] = fingerprint(t for d in directions for t in d.values())
    if resume is not None:
        _take_over(result, resume)
    if weight_decay is not None:
        result.metrics["l2"][...] = penalty(evaluator.weights, directions, axes, weight_decay)
    todo = np.argwhere(~result.done)
    saved = time.monotonic()
    progress = tqdm(total=result.done.size, initial=result.done.sum(), unit="point", disable=None)
    try:
        for index in map(tuple, todo):
            steps = [float(axis[i]) for axis, i in zip(axes, reversed(index), strict=True)]
            point = displaced(evaluator.weights, directions, steps)
            for name, value in zip(evaluator.metrics, evaluator(point), strict=True):
                result.metrics[name][index] = value
            result.done[index] = True
            progress.update()
            if save is not None and time.monotonic() - saved >= SAVE_EVERY:
                save(result)
                saved = time.monotonic()
    finally:
        progress.close()
        if save is not None and not result.done.all():
            save(result)
    return result


def penalty(
    weights: Direction,
    directions: Sequence[Direction],
    axes: Sequence[np.ndarray],
    weight_decay: float,
) -> np.ndarray:
    """``weight_decay / 2 * |weights + sum of steps * directions|^2`` on the grid of `axes`.

    A quadratic polynomial of the steps, whose coefficients are inner products. Axis 0 of the result
    belongs to the last of `axes`.
    """
    vectors = [weights, *directions]
    gram = np.array([[_dot(a, b) for b in vectors] for a in vectors])
    grid = np.meshgrid(*reversed(axes), indexing="ij")[::-1]
    steps = np.stack([np.ones_like(grid[0]), *grid])
    return weight_decay / 2 * np.einsum("i...,ij,j...->...", steps, gram, steps)


def _dot(a: Direction, b: Direction) -> float:
    products = [(a[name].double() * b[name].double()).sum() for name in a if name in b]
    return float(torch.stack(products).sum()) if products else 0.0


def _empty(evaluator: Evaluator, axes: Sequence[np.ndarray], weight_decay: float | None) -> Slice:
    if weight_decay is not None and "l2" in evaluator.metrics:
        raise InputError("metrics: 'l2' is the name of the penalty, expected another name")
    shape = tuple(len(axis) for axis in reversed(axes))
    names = [*evaluator.metrics, *(["l2"] if weight_decay is not None else [])]
    return Slice(
        xs=axes[0],
        ys=axes[1] if len(axes) == 2 else None,
        metrics={name: np.full(shape, np.nan) for name in names},
        done=np.zeros(shape, dtype=bool),
        attributes={
            **evaluator.attributes,
            **({} if weight_decay is None else {"weight_decay": weight_decay}),
        },
    )


def _take_over(result: Slice, earlier: Slice) -> None:
    """Fill `result` with what `earlier` already has, provided that it was measured alike."""
    measured, wanted = (
        {"metrics": list(s), "xs": s.xs.tolist(), "ys": s.ys is not None and s.ys.tolist()}
        | s.attributes
        for s in (earlier, result)
    )
    for what, expected in wanted.items():
        if measured[what] != expected:
            raise InputError(f"resume: {what} was {measured[what]}, expected {expected}")
    result.done[...] = earlier.done
    for name, values in result.metrics.items():
        values[...] = earlier[name]


def _require_fit(evaluator: Evaluator, directions: Sequence[Direction], expected: int) -> None:
    if len(directions) != expected:
        raise InputError(f"directions: {len(directions)}, expected {expected}")
    for direction in directions:
        for name, step in direction.items():
            weight = evaluator.weights.get(name)
            if weight is None:
                raise InputError(f"directions: {name!r} is not a parameter of the model")
            if step.shape != weight.shape:
                raise InputError(
                    f"directions: shape {tuple(step.shape)} for {name}, "
                    f"expected {tuple(weight.shape)}"
                )


def _axis(name: str, values: ArrayLike) -> np.ndarray:
    axis = np.asarray(values, dtype=np.float64)
    if axis.ndim != 1 or not len(axis) or not np.isfinite(axis).all():
        raise InputError(f"{name}: {values!r}, expected a non-empty list of finite numbers")
    return axis
