"""Ways to cut a landscape: along which directions, how far, and what there is to see on the way.

Each function takes an `Objective` and returns a `Cut`: what `line` and `surface` need to know.
Those that may take long keep their `progress`, so that they can be interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.objective import Objective
from lossgeometry import Hessian, eigsh
from lossgeometry.batches import Data
from lossgeometry.errors import InputError
from lossgeometry.landscape.connectivity import bezier_path, fit_bezier, linear_path
from lossgeometry.landscape.directions import (
    Direction,
    Include,
    Normalization,
    as_vector,
    eigenvector_directions,
    from_vector,
    gradient_direction,
    plane,
    random_directions,
    require_finite,
    towards,
)
from lossgeometry.landscape.trajectories import polar, trajectory
from lossgeometry.running.saving import FRESH, Progress
from models.checkpoint import Checkpoint

MARGIN = 0.3  # around what is marked, as a share of its extent
PATH_POINTS = 51

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Cut:
    """Two directions from the weights of a model, and points of interest in their plane."""

    directions: np.ndarray  # (2, P) over all parameters, in their dtype
    names: tuple[str, str]  # of the directions
    low: tuple[float, float]  # least step along each
    high: tuple[float, float]  # largest
    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))  # (n, 2) steps
    extras: dict[str, np.ndarray] = field(default_factory=dict)  # what else was found on the way

    def along(self, axis: int, points: int) -> np.ndarray:
        """`points` evenly spaced steps along a direction, 0 among them."""
        step = (self.high[axis] - self.low[axis]) / (points - 1)
        return step * (np.arange(points) + round(self.low[axis] / step))

    def tensors(self, model: nn.Module) -> list[Direction]:
        """The directions as tensors beside the parameters of `model`."""
        return [from_vector(row, model) for row in torch.from_numpy(self.directions)]


KINDS = {"filter": "filter-normalised", "layer": "layer-normalised", "none": "Gaussian"}


def chosen_cut(
    kind: str,
    objective: Objective,
    others: Sequence[State],
    snapshots: Callable[[], tuple[Sequence[State], Sequence[int]]],
    progress: Progress = FRESH,
    *,
    seed: int,
    span: float,
    normalization: Normalization,
    include: Include,
    recalibrate: Data | None,
) -> Cut:
    """The cut that ``--directions`` names: see those below.

    `others` are the checkpoints of ``--towards``, `snapshots` gives those of the training and their
    epochs.
    """
    drawn: dict[str, Any] = dict(normalization=normalization, include=include)
    along: dict[str, Any] = dict(seed=seed, span=span, recalibrate=recalibrate, progress=progress)
    match kind:
        case "random":
            return random_cut(objective, seed=seed, span=span, **drawn)
        case "eigenvectors":
            return eigenvector_cut(objective, seed=seed, span=span, progress=progress)
        case "gradient":
            return gradient_cut(objective, seed=seed, span=span, **drawn)
        case "towards":
            return towards_cut(objective, others[0], **along, **drawn)
        case "plane":
            return plane_cut(objective, others[0], others[1], span=span)
        case "bezier":
            return bezier_cut(objective, others[0], **along)
    return pca_cut(objective, *snapshots(), span=span)


def random_cut(
    objective: Objective,
    *,
    seed: int,
    span: float,
    normalization: Normalization = "filter",
    include: Include = "weights",
) -> Cut:
    """Two random directions, see `random_directions`."""
    chosen = random_directions(
        objective.model, 2, seed=seed, normalization=normalization, include=include
    )
    names = (f"{KINDS[normalization]} direction 1", f"{KINDS[normalization]} direction 2")
    return _symmetric(objective.model, chosen, names, span)


def eigenvector_cut(
    objective: Objective, *, seed: int, span: float, progress: Progress = FRESH
) -> Cut:
    """Eigenvectors of the largest and the smallest eigenvalue of the Hessian; unit length.

    The eigenvalues and their residuals are among the extras. Raises `InputError` if the Hessian
    fails its own check, or the eigensolver did not converge.
    """
    hessian = Hessian(
        objective.model,
        objective.loss,
        objective.batches,
        weight_decay=objective.weight_decay,
        seed=seed,
    )
    check = hessian.check()
    if check.verdict == "wrong" or (check.verdict == "undecided" and check.smooth):
        raise InputError(f"directions: Hessian-vector products are wrong: {check}")
    found = eigsh(hessian, 2, which="BE", tol=1e-4, seed=seed, **progress.of("eigenvectors"))
    if not found.converged.all():
        raise InputError("directions: the eigenvectors have not converged, expected them to")
    order = found.eigenvalues.argsort(descending=True)
    values, vectors = (
        found.eigenvalues[order].cpu(),
        found.eigenvectors[:, order.to(hessian.device)],
    )
    names = tuple(f"eigenvector of {value:.3g}" for value in values.tolist())
    extras = {"eigenvalues": values.numpy(), "residuals": found.residuals[order].cpu().numpy()}
    chosen = eigenvector_directions(objective.model, vectors)
    return _symmetric(objective.model, chosen, (names[0], names[1]), span, extras)


def gradient_cut(
    objective: Objective,
    *,
    seed: int,
    span: float,
    normalization: Normalization = "filter",
    include: Include = "weights",
) -> Cut:
    """The gradient of the objective, and a random direction; both as long as the latter."""
    gradient = gradient_direction(
        objective.model,
        objective.loss,
        objective.batches,
        weight_decay=objective.weight_decay,
        seed=seed,
    )
    (across,) = random_directions(
        objective.model, 1, seed=seed, normalization=normalization, include=include
    )
    first, second = (as_vector(d, objective.model) for d in (gradient, across))
    length = first.norm()
    if not length > 0:
        raise InputError(
            f"directions: the gradient is {'zero' if length == 0 else 'not a number'} here, "
            "expected another direction"
        )
    chosen = [from_vector(first * (second.norm() / length), objective.model), across]
    names = ("gradient, of that length", f"{KINDS[normalization]} direction")
    extras = {"gradient_norm": np.array(length.item())}
    return _symmetric(objective.model, chosen, names, span, extras)


def towards_cut(
    objective: Objective,
    other: State,
    *,
    seed: int,
    span: float,
    normalization: Normalization = "filter",
    include: Include = "weights",
    recalibrate: Data | None = None,
    progress: Progress = FRESH,
) -> Cut:
    """Towards another checkpoint (x = 1), and a random direction of the same length.

    The extras hold the metrics on the straight path, ``linear/nll`` and ``linear/error``;
    `recalibrate` is that of `linear_path`.
    """
    model = objective.model
    (drawn,) = random_directions(model, 1, seed=seed, normalization=normalization, include=include)
    way, across = (as_vector(d, model) for d in (towards(model, other), drawn))
    if not way.norm() > 0:
        raise InputError("towards: the same weights as the checkpoint's, expected other ones")
    across -= (across @ way) / (way @ way) * way
    across *= way.norm() / across.norm()
    chosen = [from_vector(vector, model) for vector in (way, across)]
    names = ("way to the other", "random, of that length")
    return _around(
        model,
        chosen,
        names,
        np.array([[0.0, 0.0], [1.0, 0.0]]),
        span,
        _linear(objective, other, seed, recalibrate, progress),
    )


def plane_cut(objective: Objective, second: State, third: State, *, span: float) -> Cut:
    """The plane through three checkpoints; one unit of either axis is one unit of distance."""
    found = plane(objective.model, second, third)
    names = ("distance", "distance")
    return _around(objective.model, found.directions, names, found.points, span)


def bezier_cut(
    objective: Objective,
    other: State,
    *,
    seed: int,
    span: float,
    recalibrate: Data | None = None,
    progress: Progress = FRESH,
) -> Cut:
    """The plane of a fitted Bezier curve of low loss to another checkpoint.

    The loss is that of the objective without its penalty, which would draw the curve to the origin.
    The extras hold the metrics on the straight path and on the curve, ``linear/nll``,
    ``bezier/nll`` and so on, at ``ts``; `recalibrate` is that of `bezier_path`.
    """
    curve = fit_bezier(
        objective.model,
        other,
        objective.loss,
        objective.batches,
        seed=seed,
        **progress.of("fit"),
    )
    ts = np.linspace(0, 1, PATH_POINTS)
    path = bezier_path(
        objective.model,
        other,
        curve.bend,
        objective.metrics,
        objective.batches,
        ts,
        seed=seed,
        recalibrate=recalibrate,
        **progress.of("bezier"),
    )
    found = plane(objective.model, other, {**objective.model.state_dict(), **curve.bend})
    _, end, bend = found.points
    points = 2 * np.outer(ts * (1 - ts), bend) + np.outer(ts**2, end)
    extras = _linear(objective, other, seed, recalibrate, progress)
    extras |= {f"bezier/{name}": values for name, values in path.metrics.items()}
    extras["fit/losses"] = curve.losses
    return _around(objective.model, found.directions, ("distance",) * 2, points, span, extras)


def pca_cut(
    objective: Objective, snapshots: Sequence[State], epochs: Sequence[int] = (), *, span: float
) -> Cut:
    """The plane in which a training run moved most; the run's snapshots are marked.

    The extras hold the ``explained_variance`` (2,), the ``epochs`` if they are given, and the polar
    view: ``polar/distances``, ``polar/angles``, ``polar/turns``.
    """
    found = trajectory(objective.model, snapshots)
    shares = found.explained_variance
    names = tuple(
        f"principal direction {i + 1} ({s:.1%} of variance)" for i, s in enumerate(shares)
    )
    view = polar(objective.model, snapshots)
    extras = {"explained_variance": shares}
    extras |= {f"polar/{name}": values for name, values in vars(view).items()}
    if epochs:
        extras["epochs"] = np.array(epochs)
    return _around(
        objective.model, found.directions, (names[0], names[1]), found.coordinates, span, extras
    )


def snapshots(
    checkpoint: Checkpoint,
    load: Callable[[list[Path]], list[Checkpoint]],
    *,
    in_order: bool,
) -> tuple[list[State], list[int]]:
    """State dicts of a training, up to the checkpoint itself, and their epochs.

    Where the epochs are not known there are none of them, and the snapshots are `in_order` of their
    names. Raises `InputError` if there are fewer than three, or one has weights that are not
    finite.
    """
    assert checkpoint.path is not None
    folder = checkpoint.path.with_suffix("")
    kept = load(sorted(folder.glob(f"epoch*{checkpoint.path.suffix}")))
    earlier = [c for c in kept if in_order or c.epoch < checkpoint.epoch]
    run = [*sorted(earlier, key=lambda c: c.epoch), checkpoint]
    if len(run) < 3:
        raise InputError(
            f"{folder}: {len(run) - 1} snapshots found, expected at least 2 of earlier epochs; "
            "train with --snapshots"
        )
    for snapshot in run:
        require_finite(str(snapshot.path), dict(snapshot.model.named_parameters()))
    return [c.model.state_dict() for c in run], [] if in_order else [c.epoch for c in run]


def _linear(
    objective: Objective, other: State, seed: int, recalibrate: Data | None, progress: Progress
) -> dict[str, np.ndarray]:
    ts = np.linspace(0, 1, PATH_POINTS)
    path = linear_path(
        objective.model,
        other,
        objective.metrics,
        objective.batches,
        ts,
        seed=seed,
        recalibrate=recalibrate,
        **progress.of("linear"),
    )
    return {"ts": ts} | {f"linear/{name}": values for name, values in path.metrics.items()}


def _symmetric(
    model: nn.Module,
    directions: Sequence[Direction],
    names: tuple[str, str],
    span: float,
    extras: dict[str, np.ndarray] | None = None,
) -> Cut:
    flat = _stack(model, directions)
    return Cut(flat, names, (-span, -span), (span, span), extras=extras or {})


def _around(
    model: nn.Module,
    directions: Sequence[Direction],
    names: tuple[str, str],
    points: np.ndarray,
    span: float,
    extras: dict[str, np.ndarray] | None = None,
) -> Cut:
    """A square around `points` and the model, wider than they are by a margin times `span`."""
    every = np.vstack([points, np.zeros((1, 2))])
    low, high = every.min(axis=0), every.max(axis=0)
    half = (0.5 + MARGIN * span) * (high - low).max()
    middle = (low + high) / 2
    low, high = middle - half, middle + half
    return Cut(
        _stack(model, directions),
        names,
        (float(low[0]), float(low[1])),
        (float(high[0]), float(high[1])),
        points,
        extras or {},
    )


def _stack(model: nn.Module, directions: Sequence[Direction]) -> np.ndarray:
    return torch.stack([as_vector(direction, model) for direction in directions]).cpu().numpy()
