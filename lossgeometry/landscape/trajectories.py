"""The way of a training run through weight space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from lossgeometry.errors import InputError
from lossgeometry.landscape.directions import Direction, as_vector, pca_directions, towards
from lossgeometry.storing import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, repr=False)
class Trajectory(Result):
    """Snapshots of a run in the plane in which it moved most, with the model as the origin.

    See Also
    --------
    trajectory : computes it.
    surface : the loss along its directions.
    plots.plot_way : the coordinates, drawn onto contours.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> run = [{"weight": torch.tensor([[a, b]])} for a, b in ((0.0, 0.0), (1.0, 0.0), (1.0, 2.0))]
    >>> from lossgeometry import trajectory
    >>> way = trajectory(model, run)
    >>> way.coordinates.shape, way.explained_variance.round(3)
    ((3, 2), array([0.861, 0.139]))
    """

    directions: list[Direction]  # two, orthonormal: the principal directions
    explained_variance: np.ndarray  # (2,) shares of the variance of the snapshots
    coordinates: np.ndarray  # (n, 2) of each snapshot

    def plot(self, ax: Axes | None = None) -> Axes:
        """The way of the run in the plane, also onto the contours of a `surface` there."""
        from lossgeometry.plots import plot_way

        ax = plot_way(self.coordinates, ax=ax)
        first, second = self.explained_variance
        ax.set(xlabel=f"principal direction 1 ({first:.1%} of variance)")
        ax.set(ylabel=f"principal direction 2 ({second:.1%} of variance)")
        return ax


@dataclass(frozen=True, repr=False)
class PolarTrajectory(Result):
    """Where a run is as seen from its end, and how it turns; angles in radians, in [0, pi].

    See Also
    --------
    polar : computes it.
    plots.plot_polar : several of them in one picture.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> run = [{"weight": torch.tensor([[a, b]])} for a, b in ((0.0, 0.0), (1.0, 0.0), (1.0, 2.0))]
    >>> from lossgeometry import polar
    >>> seen = polar(model, run)
    >>> seen.distances.round(3), seen.angles.round(3)
    (array([2.236, 2.   , 0.   ]), array([0.   , 0.464,   nan]))
    """

    distances: np.ndarray  # (n,) of each snapshot to the last
    angles: np.ndarray  # (n,) between snapshot and first, seen from the last, which has NaN
    turns: np.ndarray  # (n - 2,) between successive updates
    _projection = "polar"

    def plot(self, ax: Axes | None = None) -> Axes:
        """The run as seen from its end; `ax` has the projection "polar"."""
        from lossgeometry.plots import plot_polar

        return plot_polar(self.angles, self.distances, ax=ax)


def trajectory(model: nn.Module, snapshots: Sequence[Mapping[str, Tensor]]) -> Trajectory:
    """Project the state dicts of a run on their first two principal directions.

    Li et al., *Visualizing the Loss Landscape of Neural Nets*, NeurIPS 2018, section 7.2. The
    coordinates are the steps (x, y) of a `surface` around `model` along the same directions.

    Parameters
    ----------
    model : nn.Module
        The origin, usually with the weights of the last snapshot.
    snapshots : sequence of state dicts
        At least 3, in the order of the run.

    Returns
    -------
    Trajectory

    Raises
    ------
    InputError
        If snapshots do not fit the model, are not finite, or span less than a plane.

    See Also
    --------
    pca_directions : the principal directions alone.
    project : coordinates along any other directions.
    polar : distances and angles, which need no plane.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> from lossgeometry import trajectory
    >>> run = [{"weight": torch.tensor([[a, b]])} for a, b in ((0.0, 0.0), (2.0, 1.0), (1.0, 2.0))]
    >>> abs(trajectory(model, run).coordinates[-1].round(3))  # the model itself
    array([0., 0.])
    """
    directions, explained_variance = pca_directions(snapshots, model)
    return Trajectory(directions, explained_variance, project(model, snapshots, directions))


def project(
    model: nn.Module, snapshots: Sequence[Mapping[str, Tensor]], directions: Sequence[Direction]
) -> np.ndarray:
    """Steps along k `directions` that come closest to each of n snapshots.

    Parameters
    ----------
    model : nn.Module
        Where the steps begin.
    snapshots : sequence of n state dicts
    directions : sequence of k dicts {parameter name: tensor}
        They need not be orthogonal.

    Returns
    -------
    np.ndarray
        (n, k) float64.

    Raises
    ------
    InputError
        If snapshots do not fit the model or are not finite, or if a direction is a sum of others.

    See Also
    --------
    trajectory : along the principal directions.
    plots.plot_way : the steps, drawn onto contours.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> from lossgeometry import project
    >>> axes = [{"weight": torch.tensor([[1.0, 0.0]])}, {"weight": torch.tensor([[0.0, 2.0]])}]
    >>> project(model, [{"weight": torch.tensor([[0.0, 4.0]])}], axes)
    array([[-1.,  1.]])
    """
    moves = _moves(model, snapshots)
    axes = torch.stack([as_vector(direction, model).double() for direction in directions])
    lengths = axes.norm(dim=1, keepdim=True)
    units = axes / lengths
    gram = units @ units.T
    if not torch.linalg.eigvalsh(gram.nan_to_num())[0] > 1e-12:
        raise InputError("directions: one is zero or a sum of others, expected independent ones")
    steps = torch.linalg.solve(gram, units @ moves.T) / lengths
    return steps.T.cpu().numpy()


def polar(model: nn.Module, snapshots: Sequence[Mapping[str, Tensor]]) -> PolarTrajectory:
    """Polar view of a run, as in Figure 1b of Park and Kim, ICLR 2022.

    A run that goes straight to its end has angles of 0 on the way and turns of 0.

    Parameters
    ----------
    model : nn.Module
        Which entries of the state dicts are parameters.
    snapshots : sequence of n state dicts
        In the order of the run.

    Returns
    -------
    PolarTrajectory

    Raises
    ------
    InputError
        If there are fewer than two snapshots, or they do not fit the model or are not finite.

    See Also
    --------
    trajectory : in the plane of the principal directions.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 2.0]])})
    <All keys matched successfully>
    >>> from lossgeometry import polar
    >>> run = [{"weight": torch.tensor([[a, b]])} for a, b in ((0.0, 0.0), (1.0, 0.0), (1.0, 2.0))]
    >>> polar(model, run).turns  # a right angle
    array([1.57079633])
    """
    if len(snapshots) < 2:
        raise InputError(f"snapshots: {len(snapshots)}, expected at least 2")
    points = _moves(model, snapshots)
    from_end = points - points[-1]
    updates = points.diff(dim=0)
    return PolarTrajectory(
        distances=from_end.norm(dim=1).cpu().numpy(),
        angles=_angles(from_end, from_end[:1]),
        turns=_angles(updates[1:], updates[:-1]),
    )


def _angles(a: Tensor, b: Tensor) -> np.ndarray:
    """Angles between rows, accurate also where they are small; NaN for rows of zeros."""
    a, b = (rows / rows.norm(dim=1, keepdim=True) for rows in (a, b))
    return (2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))).cpu().numpy()


def _moves(model: nn.Module, snapshots: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """(n, P) float64 differences from the weights of `model`."""
    if not snapshots:
        raise InputError("snapshots: none, expected at least one")
    return torch.stack([as_vector(towards(model, state), model).double() for state in snapshots])
