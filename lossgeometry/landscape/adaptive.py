"""Surfaces from a fraction of their points, to a stated error.

Points of the grid that are not evaluated are interpolated by radial basis functions. Where two
interpolants of different smoothness disagree most, the surface is known least: there the next
points are evaluated, and how far off the prediction was is the error that is stated. Scattered
points follow the shape of a surface. On trained networks, whose loss is a narrow bowl in a plateau,
they take about half as many evaluations as a tensor grid of Chebyshev nodes for the same error.
"""

from __future__ import annotations

import numpy as np
from scipy.interpolate import RBFInterpolator

from lossgeometry.errors import InputError
from lossgeometry.landscape.sampling import Sampler

FIRST = 5  # Chebyshev nodes along each axis of the first grid
DOUBTFUL, REMOTE = 4, 4  # points of a round: where interpolants disagree, and far from all others
ROUNDS = 2  # in a row whose predictions must be good
SAFETY = 2  # how much better than the tolerance they must be, for they are few
WORTH_IT = 1 / 4  # of the grid: beyond that, all of it is evaluated
REACH = 0.12  # distance to which a new point makes its neighbours less doubtful; axes are [-1, 1]


def fill_adaptively(sampler: Sampler, tolerance: float, penalty: np.ndarray | float = 0.0) -> None:
    """Evaluate as few points of a surface as it takes and interpolate the others.

    The objective is the first metric plus `penalty`. It is held to `tolerance`, the largest
    relative error; the other metrics are interpolated from the same points. This is added to the
    settings of the slice:

    - ``adaptive``: `tolerance`;
    - ``evaluations``: points evaluated, those that measured the error included;
    - ``interpolated``: False if the surface proved not to be smooth, or not to be finite, so that
      the whole grid was evaluated;
    - ``objective_error``: largest |prediction - value| / |value| of the objective at the points of
      the last rounds, which were evaluated after they had been predicted;
    - ``NAME_error`` of each metric: largest |prediction - value| there, in the metric's own units.

    Raises
    ------
    InputError
        If `tolerance` is not positive.
    """
    if not tolerance > 0:
        raise InputError(f"adaptive: {tolerance} is not usable, expected a positive relative error")
    result = sampler.slice
    assert result.ys is not None, "a line is not worth it"
    shape = result.evaluated.shape
    plane = np.stack(np.meshgrid(_unit(result.xs), _unit(result.ys)), axis=-1).reshape(-1, 2)
    offset = np.broadcast_to(penalty, shape).reshape(-1)
    fresh = np.ravel_multi_index(np.ix_(*(_chebyshev(n) for n in shape)), shape).reshape(-1)
    chosen = np.zeros(len(plane), dtype=bool)
    chosen[fresh] = True
    errors: list[np.ndarray] = []  # of each round: the objective's, then those of the metrics
    predicted: np.ndarray | None = None
    while True:
        sampler.evaluate(zip(*np.unravel_index(fresh, shape), strict=True))
        values = np.stack([result[name].reshape(-1) for name in result], axis=-1)
        if not np.isfinite(values[chosen]).all() or chosen.mean() > WORTH_IT:
            sampler.evaluate(np.ndindex(shape))
            result.settings.update(
                adaptive=tolerance, evaluations=result.evaluated.size, interpolated=False
            )
            return
        if predicted is not None:
            off = np.abs(predicted - values)[fresh]
            objective = np.abs(values[fresh, 0] + offset[fresh])
            errors.append(np.array([(off[:, 0] / objective).max(), *off.max(axis=0)]))
        rough, predicted = (
            RBFInterpolator(plane[chosen], values[chosen], kernel=kernel)(plane)
            for kernel in ("cubic", "quintic")
        )
        last = np.max(errors[-ROUNDS:], axis=0) if len(errors) >= ROUNDS else None
        if last is not None and last[0] <= tolerance / SAFETY:
            break
        doubt = np.abs(rough - predicted)[:, 0] / np.abs(predicted[:, 0] + offset)
        fresh = _next_points(plane, chosen, doubt)
        chosen[fresh] = True
    for name, surface in zip(result, predicted.T, strict=True):
        result.metrics[name][~result.evaluated] = surface.reshape(shape)[~result.evaluated]
    result.settings.update(
        {"adaptive": tolerance, "evaluations": int(result.evaluated.sum()), "interpolated": True}
        | dict(
            zip(["objective_error", *(f"{n}_error" for n in result)], last.tolist(), strict=True)
        )
    )


def _next_points(plane: np.ndarray, chosen: np.ndarray, doubt: np.ndarray) -> np.ndarray:
    """Indices of the points of the next round, (DOUBTFUL + REMOTE,) at most."""
    doubt = np.where(chosen, 0, doubt)
    distance = np.min(
        [_squared_distance(plane, i) for i in np.flatnonzero(chosen).tolist()], axis=0
    )
    fresh = []
    for turn in range(REMOTE + DOUBTFUL):
        index = int(np.argmax(distance if turn < REMOTE else doubt))
        fresh.append(index)
        near = _squared_distance(plane, index)
        distance = np.minimum(distance, near)
        doubt *= 1 - np.exp(-near / (2 * REACH**2))
    return np.unique([index for index in fresh if not chosen[index]])


def _squared_distance(plane: np.ndarray, index: int) -> np.ndarray:
    return np.square(plane - plane[index]).sum(axis=1)


def _chebyshev(n: int) -> np.ndarray:
    """Indices of the points of an axis that are nearest to Chebyshev's extremal nodes."""
    nodes = (1 - np.cos(np.pi * np.arange(FIRST) / (FIRST - 1))) / 2
    return np.unique(np.round((n - 1) * nodes).astype(int))


def _unit(axis: np.ndarray) -> np.ndarray:
    """An axis scaled to [-1, 1]."""
    return (2 * axis - axis.min() - axis.max()) / max(np.ptp(axis), np.finfo(float).tiny)
