"""Paths of low loss between two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from tqdm import tqdm

from lossgeometry.batches import Count, Data, Forward, as_batches
from lossgeometry.errors import InputError
from lossgeometry.landscape.directions import Direction, towards
from lossgeometry.landscape.evaluation import Evaluator, Metric, Sets, displaced
from lossgeometry.landscape.flatness import barrier
from lossgeometry.objective import FrozenLoss
from lossgeometry.parameters import flatten, unflatten
from lossgeometry.running.saving import Saver, filled
from lossgeometry.seeds import derive_seed
from lossgeometry.storing import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Arrays = dict[str, np.ndarray]  # of something unfinished, to be stored


@dataclass(frozen=True, repr=False)
class Path(Result):
    """Metrics on a way from one model, t = 0, to another, t = 1.

    See Also
    --------
    linear_path : computes the straight one.
    bezier_path : computes a bent one.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import linear_path
    >>> other = {"weight": torch.tensor([[-1.0, -2.0]])}
    >>> path = linear_path(model, other, {"mse": mse_loss}, data, [0, 0.25, 1])
    >>> path.metrics["mse"], path.barrier("mse")
    (array([8.5  , 2.125, 8.5  ]), 0.0)
    """

    ts: np.ndarray  # (n,), from 0 to 1
    metrics: dict[str, np.ndarray]  # {name: (n,)}

    def barrier(self, metric: str) -> float:
        """Largest height of a metric over the straight line between its values at both ends."""
        return barrier(self.ts, self.metrics[metric])

    def plot(self, ax: Axes | None = None, *, metric: str | None = None) -> Axes:
        """A metric on the way, by default the first."""
        from lossgeometry.plots import plot_line

        name = metric or next(iter(self.metrics))
        way = "from one model, 0, to the other, 1"
        return plot_line(self.ts, self.metrics[name], xlabel=way, ylabel=name, ax=ax)


@dataclass(frozen=True, repr=False)
class Bezier(Result):
    """The curve (1-t)^2 model + 2t(1-t) bend + t^2 other.

    See Also
    --------
    fit_bezier : computes it.
    bezier_path : metrics on the curve.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import bezier_path, fit_bezier
    >>> other = {"weight": torch.tensor([[1.0, -2.0]])}
    >>> curve = fit_bezier(model, other, mse_loss, data, steps=20)
    >>> path = bezier_path(model, other, curve.bend, {"mse": mse_loss}, data, [0, 0.5, 1])
    >>> bool(path.metrics["mse"][1] < 0.5)  # which is what the straight way has there
    True
    """

    bend: Direction  # weights of the control point
    losses: np.ndarray  # (steps,) at the random points of the fit, without the penalty

    def plot(self, ax: Axes | None = None) -> Axes:
        """The losses that the fit has met."""
        from lossgeometry.plots import plot_line

        steps = np.arange(len(self.losses))
        return plot_line(steps, self.losses, xlabel="step of the fit", ylabel="loss", ax=ax)


def linear_path(
    model: nn.Module,
    other: Mapping[str, Tensor],
    metrics: Mapping[str, Metric],
    data: Sets,
    ts: ArrayLike,
    *,
    recalibrate: Data | None = None,
    forward: Forward | None = None,
    count: Count | None = None,
    seed: int = 0,
    resume: Mapping[str, np.ndarray] | None = None,
    save: Callable[[Arrays], object] | None = None,
) -> Path:
    """Metrics at the weights (1-t) model + t other, for each t.

    Parameters
    ----------
    model : nn.Module
    other : state dict
        Of the same architecture. Its buffers are not used.
    recalibrate : batch, or iterable of batches, optional
        Data on which the statistics of every BatchNorm are computed anew at each t; by default they
        stay those of `model`.
    metrics, data, forward, count, seed
        As for `surface`.
    ts : (n,) array_like
        From 0 to 1, increasing.
    resume : mapping of str to array, optional
        What `save` received from the same call before: it goes on from there, to the last bit.
    save : callable, optional
        Called with arrays to store, which are filled further afterwards, after about every ten
        seconds, when interrupted, and in the end.

    Returns
    -------
    Path
        With a (n,) array of each metric, and their barriers.

    Raises
    ------
    InputError
        If `other` does not fit the model, or `ts` does not go from 0 to 1; as of `surface`.

    See Also
    --------
    fit_bezier : a way around a barrier.

    References
    ----------
    J. Frankle et al., *Linear Mode Connectivity and the Lottery Ticket Hypothesis*, ICML 2020.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import linear_path
    >>> other = {"weight": torch.tensor([[-1.0, 2.0]])}
    >>> path = linear_path(model, other, {"mse": mse_loss}, data, [0, 0.5, 1])
    >>> path.metrics["mse"], path.barrier("mse")
    (array([8.5, 8. , 8.5]), 0.0)
    """
    ts = _interval(ts)
    how: dict[str, Any] = dict(seed=seed, recalibrate=recalibrate, forward=forward, count=count)
    evaluator = Evaluator(model, metrics, data, **how)
    return _follow(evaluator, [towards(model, other)], ts, ts[:, None], resume, save)


def bezier_path(
    model: nn.Module,
    other: Mapping[str, Tensor],
    bend: Mapping[str, Tensor],
    metrics: Mapping[str, Metric],
    data: Sets,
    ts: ArrayLike,
    *,
    recalibrate: Data | None = None,
    forward: Forward | None = None,
    count: Count | None = None,
    seed: int = 0,
    resume: Mapping[str, np.ndarray] | None = None,
    save: Callable[[Arrays], object] | None = None,
) -> Path:
    """Metrics on the curve ``(1-t)^2 model + 2t(1-t) bend + t^2 other``, for each t.

    Parameters
    ----------
    model, other, metrics, data, ts, recalibrate, forward, count, seed, resume, save
        As of `linear_path`.
    bend : Direction
        The control point, as `fit_bezier` finds it; absent parameters are those of `model`.

    Returns
    -------
    Path
        With a (n,) array of each metric, and their barriers.

    Raises
    ------
    InputError
        If `other` or `bend` does not fit the model, or `ts` does not go from 0 to 1; as of
        `surface`.

    See Also
    --------
    fit_bezier : finds the control point.
    linear_path : the straight way.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import bezier_path
    >>> other, bend = ({"weight": torch.tensor([[a, b]])} for a, b in ((-1.0, 2.0), (0.0, 0.0)))
    >>> path = bezier_path(model, other, bend, {"mse": mse_loss}, data, [0, 0.5, 1])
    >>> path.metrics["mse"]
    array([8.5, 2. , 8.5])
    """
    ts = _interval(ts)
    how: dict[str, Any] = dict(seed=seed, recalibrate=recalibrate, forward=forward, count=count)
    evaluator = Evaluator(model, metrics, data, **how)
    directions = [towards(model, other), towards(model, {**evaluator.weights, **bend})]
    steps = np.stack([ts**2, 2 * ts * (1 - ts)], axis=1)
    return _follow(evaluator, directions, ts, steps, resume, save)


def fit_bezier(
    model: nn.Module,
    other: Mapping[str, Tensor],
    loss_fn: Metric,
    data: Data,
    *,
    weight_decay: float = 0.0,
    steps: int = 200,
    learning_rate: float = 1e-2,
    forward: Forward | None = None,
    count: Count | None = None,
    seed: int = 0,
    resume: Mapping[str, np.ndarray] | None = None,
    save: Callable[[Arrays], object] | None = None,
) -> Bezier:
    """Quadratic Bezier curve of low loss from `model` to the state dict `other`.

    Garipov et al., *Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs*, NeurIPS 2018,
    section 3: minimises the expected loss at a uniformly random t, by Adam on the control point,
    which starts half-way. Each step takes one t and one batch of `data`.

    Parameters
    ----------
    model : nn.Module
        The start, t = 0, in the mode in which its loss is to be low.
    other : state dict
        The end, t = 1, of the same architecture.
    loss_fn : callable
        ``loss_fn(outputs, targets) -> scalar``.
    data : batch, or iterable of batches
    weight_decay : float
        Adds the penalty weight_decay / 2 * |weights|^2 at the point on the curve.
    steps, learning_rate
        Of Adam, with a cosine schedule to 0.
    forward, count
        As of `Hessian`.
    seed : int
        Of the random t, the order of the batches and what the model draws in training mode.
    resume, save
        As of `linear_path`, only that what is done of a step is not saved when interrupted.

    Returns
    -------
    Bezier
        The control point, for `bezier_path`, and the losses that the fit has met.

    Raises
    ------
    InputError
        If `other` does not fit the model, there are no examples, `steps` is not positive, or
        `resume` belongs to another call.

    See Also
    --------
    bezier_path : metrics on the curve.
    linear_path : the straight way, and its barrier.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import fit_bezier
    >>> other = {"weight": torch.tensor([[1.0, -2.0]])}
    >>> curve = fit_bezier(model, other, mse_loss, data, steps=20)
    >>> curve.bend["weight"].shape, curve.losses.shape
    (torch.Size([1, 2]), (20,))
    """
    if steps < 1:
        raise InputError(f"steps: {steps}, expected at least 1")
    chord = towards(model, other)
    batches = as_batches(data, count=count)
    how: dict[str, Any] = dict(forward=forward, count=count, regroup=True)
    losses = [
        FrozenLoss(model, loss_fn, [batch], seed=derive_seed(seed, i), **how)
        for i, batch in enumerate(batches)
    ]
    weights = {name: parameter.detach() for name, parameter in losses[0].parameters.items()}
    control = flatten(weight + chord[name] / 2 for name, weight in weights.items())
    bend = unflatten(control, weights)  # views, which move with it
    state = {
        "control": control,
        "exp_avg": torch.zeros_like(control),
        "exp_avg_sq": torch.zeros_like(control),
        "losses": torch.full((steps,), torch.nan, dtype=torch.float64),
        "step": torch.zeros(()),
    }
    for name, array in filled(_arrays(state), resume).items():
        state[name].copy_(torch.from_numpy(array))
    optimiser = torch.optim.Adam([control], lr=learning_rate)
    optimiser.state[control] = {name: state[name] for name in ("step", "exp_avg", "exp_avg_sq")}
    generator = torch.Generator().manual_seed(seed)
    ts = torch.rand(steps, generator=generator).tolist()
    epochs = -(-steps // len(batches))
    order = torch.cat([torch.randperm(len(batches), generator=generator) for _ in range(epochs)])
    saver = Saver(None if save is None else lambda now: save(_arrays(now)), state)
    todo = range(int(state["step"]), steps)
    for step in tqdm(todo, unit="step", disable=None, leave=False):
        t, objective = ts[step], losses[order[step]]
        pull = {name: bend[name] - weight for name, weight in weights.items()}
        point = displaced(weights, [chord, pull], [t**2, 2 * t * (1 - t)])
        loss, gradient = objective.value_and_gradient(point)
        slope = gradient + weight_decay * flatten(point[name] for name in weights)
        control.grad = 2 * t * (1 - t) * slope
        optimiser.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        state["losses"][step] = loss
        optimiser.step()
        saver.now_and_then()  # here only, between two steps
    saver.now()
    return Bezier(bend, state["losses"].numpy())


def _arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def _follow(
    evaluator: Evaluator,
    directions: list[Direction],
    ts: np.ndarray,
    steps: np.ndarray,
    resume: Mapping[str, np.ndarray] | None,
    save: Callable[[Arrays], object] | None,
) -> Path:
    blank = {
        "values": np.full((len(ts), len(evaluator.names)), np.nan),
        "done": np.zeros(len(ts), bool),
    }
    state = filled(blank, resume)
    todo = np.flatnonzero(~state["done"])
    points = [partial(displaced, evaluator.weights, directions, steps[i].tolist()) for i in todo]
    saver = Saver(save, state)
    with (
        saver,
        tqdm(total=len(todo), unit="point", disable=None, leave=False) as bar,
        closing(evaluator.at(points)) as found,
    ):
        for i, values in found:
            state["values"][todo[i]] = values
            state["done"][todo[i]] = True
            bar.update()
            saver.now_and_then()
    saver.now()
    return Path(ts, dict(zip(evaluator.names, state["values"].T, strict=True)))


def _interval(ts: ArrayLike) -> np.ndarray:
    ts = np.asarray(ts, dtype=np.float64)
    if ts.ndim != 1 or len(ts) < 2 or (ts[0], ts[-1]) != (0, 1) or not (np.diff(ts) > 0).all():
        raise InputError(f"ts: {ts.tolist()}, expected increasing numbers from 0 to 1")
    return ts
