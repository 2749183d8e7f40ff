"""Paths of low loss between two checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from tqdm import trange

from analysis.landscape.directions import Direction, towards
from analysis.landscape.evaluation import Data, Evaluator, Metric, Sets, batches_on, displaced
from analysis.landscape.summary import barrier
from models.errors import InputError
from models.seeds import derive_seed


@dataclass(frozen=True)
class Path:
    """Metrics on a way from a model to another, t = 0 and t = 1."""

    ts: np.ndarray  # (n,), from 0 to 1
    metrics: dict[str, np.ndarray]  # {name: (n,)}

    def barrier(self, metric: str) -> float:
        """Largest height of a metric over the straight line between both ends, see `barrier`."""
        return barrier(self.ts, self.metrics[metric])


@dataclass(frozen=True)
class Bezier:
    """The curve (1-t)^2 model + 2t(1-t) bend + t^2 other."""

    bend: Direction  # weights of the control point
    losses: np.ndarray  # (steps,) at the random points of the fit, without the penalty


def linear_path(
    model: nn.Module,
    other: Mapping[str, Tensor],
    metrics: Mapping[str, Metric],
    data: Sets,
    ts: ArrayLike,
    *,
    recalibrate: Data | None = None,
    seed: int = 0,
) -> Path:
    """Metrics at the weights (1-t) model + t other, for each t.

    Parameters
    ----------
    model : nn.Module
    other : state dict
        Of the same architecture. Its buffers are not used: with `recalibrate` the statistics of
        every BatchNorm are computed anew on that data at each t, otherwise they stay those of
        `model`.
    metrics, data, seed
        As for `surface`.
    ts : (n,) array_like
        From 0 to 1, increasing.

    Raises
    ------
    InputError
        If `other` does not fit the model, or `ts` does not go from 0 to 1.
    """
    ts = _interval(ts)
    evaluator = Evaluator(model, metrics, data, seed=seed, recalibrate=recalibrate)
    return _follow(evaluator, [towards(model, other)], ts, ts[:, None])


def bezier_path(
    model: nn.Module,
    other: Mapping[str, Tensor],
    bend: Mapping[str, Tensor],
    metrics: Mapping[str, Metric],
    data: Sets,
    ts: ArrayLike,
    *,
    recalibrate: Data | None = None,
    seed: int = 0,
) -> Path:
    """Metrics on the curve whose control point is `bend`; otherwise as `linear_path`."""
    ts = _interval(ts)
    evaluator = Evaluator(model, metrics, data, seed=seed, recalibrate=recalibrate)
    directions = [towards(model, other), towards(model, {**evaluator.weights, **bend})]
    return _follow(evaluator, directions, ts, np.stack([ts**2, 2 * ts * (1 - ts)], axis=1))


def fit_bezier(
    model: nn.Module,
    other: Mapping[str, Tensor],
    loss_fn: Metric,
    data: Data,
    *,
    weight_decay: float = 0.0,
    steps: int = 200,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> Bezier:
    """Quadratic Bezier curve of low loss from `model` to the state dict `other`.

    Garipov et al., *Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs*, NeurIPS 2018,
    section 3: minimises the expected loss at a uniformly random t, by Adam on the control point,
    which starts half-way. Each step takes one t and one batch of `data`.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(outputs, targets) -> scalar``, the mean over the batch.
    data : (x, y), or iterable of (x, y)
    weight_decay : float
        Adds the penalty weight_decay / 2 * |weights|^2 at the point on the curve.
    steps, learning_rate
        Of Adam, with a cosine schedule to 0.
    seed : int
        Of the random t, the order of the batches and what the model draws in training mode.

    Raises
    ------
    InputError
        If `other` does not fit the model, there are no examples, or `steps` is not positive.
    """
    if steps < 1:
        raise InputError(f"steps: {steps}, expected at least 1")
    chord = towards(model, other)
    batches = batches_on(next(model.parameters()).device, data)
    evaluators = [
        Evaluator(model, {"loss": loss_fn}, batch, seed=derive_seed(seed, i))
        for i, batch in enumerate(batches)
    ]
    weights = evaluators[0].weights
    bend = {name: weight + chord[name] / 2 for name, weight in weights.items()}
    optimiser = torch.optim.Adam(bend.values(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    ts = torch.rand(steps, generator=generator).tolist()
    epochs = -(-steps // len(batches))
    order = torch.cat([torch.randperm(len(batches), generator=generator) for _ in range(epochs)])
    losses = np.empty(steps)
    for step in trange(steps, unit="step", disable=None, leave=False):
        t, evaluator = ts[step], evaluators[order[step]]
        pull = {name: bend[name] - weight for name, weight in weights.items()}
        point = displaced(weights, [chord, pull], [t**2, 2 * t * (1 - t)])
        losses[step], gradient = evaluator.value_and_gradient(point)
        for name, control in bend.items():
            control.grad = 2 * t * (1 - t) * (gradient[name] + weight_decay * point[name])
        optimiser.step()
        schedule.step()
    return Bezier({name: control.detach() for name, control in bend.items()}, losses)


def _follow(
    evaluator: Evaluator, directions: list[Direction], ts: np.ndarray, steps: np.ndarray
) -> Path:
    values = np.stack(
        [evaluator(displaced(evaluator.weights, directions, point)) for point in steps.tolist()]
    )
    return Path(ts, dict(zip(evaluator.names, values.T, strict=True)))


def _interval(ts: ArrayLike) -> np.ndarray:
    ts = np.asarray(ts, dtype=np.float64)
    if ts.ndim != 1 or len(ts) < 2 or (ts[0], ts[-1]) != (0, 1) or not (np.diff(ts) > 0).all():
        raise InputError(f"ts: {ts.tolist()}, expected increasing numbers from 0 to 1")
    return ts
