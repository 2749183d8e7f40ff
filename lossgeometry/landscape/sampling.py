"""A slice of a loss landscape, and how its points are evaluated: saved, resumed, shared."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tqdm import tqdm

from lossgeometry.errors import InputError
from lossgeometry.landscape.directions import Direction
from lossgeometry.landscape.evaluation import Evaluator, Point, displaced, fingerprint
from lossgeometry.running.distributed import ALONE, Team
from lossgeometry.running.saving import Saver
from lossgeometry.running.threads import free_threads
from lossgeometry.storing import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Index: TypeAlias = tuple[int, ...]  # of a point: (i,) or (i, j), as in the arrays of a Slice


@dataclass(frozen=True, repr=False)
class Slice(Result, Mapping[str, np.ndarray]):
    """Metrics on a grid of points; ``slice["nll"]`` is an array.

    The shape of each array is (len(ys), len(xs)) for a surface, (len(xs),) for a line. Values are
    what the metrics gave, NaN and infinity included; where `evaluated` is False they are NaN in an
    unfinished slice and interpolated in an adaptive one.

    See Also
    --------
    line : computes one along a direction.
    surface : computes one along two.
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
    >>> along = line(model, {"mse": mse_loss}, data, {"weight": torch.tensor([[1.0, 0.0]])}, [0, 1])
    >>> list(along), along["mse"], along.evaluated
    (['mse'], array([ 8.5, 10. ]), array([ True,  True]))
    """

    xs: np.ndarray  # (nx,) steps along the first direction
    ys: np.ndarray | None  # (ny,) steps along the second; None for a line
    metrics: dict[str, np.ndarray]  # {name: float64 of the shape above}
    evaluated: np.ndarray  # bool of the shape above: which points have been evaluated
    settings: dict[str, Any]  # how it was measured: plain strings, numbers and booleans

    def __getitem__(self, metric: str) -> np.ndarray:
        return self.metrics[metric]

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)

    @property
    def _kind(self) -> str:
        return "Line" if self.ys is None else "Surface"

    def plot(self, ax: Axes | None = None, *, metric: str | None = None) -> Axes:
        """A metric, by default the first: its curve along a line, its contours on a surface."""
        from lossgeometry.plots import plot_contours, plot_line

        name = metric or next(iter(self))
        if self.ys is None:
            return plot_line(self.xs, self[name], ylabel=name, ax=ax)
        return plot_contours(self.xs, self.ys, self[name], ax=ax)


class Sampler:
    """Fills a `Slice` point by point.

    Parameters
    ----------
    evaluator : Evaluator
    directions : sequence of directions
    axes : sequence of (n,) arrays
        Steps along each direction.
    resume : Slice, optional
        What `save` received from the same measurement before: its points are not evaluated again.
    save : callable, optional
        Called with the unfinished slice as `lossgeometry.running.saving.Saver` does; in the first
        process of the team only.
    team : Team
        The processes that share the points; everyone gets all of them.

    Raises
    ------
    InputError
        If directions do not fit the model, or `resume` belongs to another measurement.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        directions: Sequence[Direction],
        axes: Sequence[np.ndarray],
        *,
        resume: Slice | None = None,
        save: Callable[[Slice], None] | None = None,
        team: Team = ALONE,
    ) -> None:
        _require_fit(evaluator, directions)
        self._evaluator = evaluator
        self._directions = directions
        self._axes = axes
        self._team = team
        shape = tuple(len(axis) for axis in reversed(axes))
        self.slice = Slice(
            xs=axes[0],
            ys=axes[1] if len(axes) == 2 else None,
            metrics={name: np.full(shape, np.nan) for name in evaluator.names},
            evaluated=np.zeros(shape, dtype=bool),
            settings={
                **evaluator.settings(),
                "directions": fingerprint(t for d in directions for t in d.values()),
            },
        )
        if resume is not None:
            _take_over(self.slice, resume)
        self._saver = Saver(save if team.rank == 0 else None, self.slice)

    def evaluate(self, indices: Iterable[Index]) -> None:
        """Evaluate those points that are not evaluated yet."""
        todo = [index for index in indices if not self.slice.evaluated[index]]
        with (
            self._saver,
            tqdm(total=len(todo), unit="point", disable=None, leave=False) as bar,
            closing(self._found([self._point(index) for index in todo])) as found,
        ):
            for i, values in found:
                for name, value in zip(self._evaluator.names, values, strict=True):
                    self.slice.metrics[name][todo[i]] = value
                self.slice.evaluated[todo[i]] = True
                bar.update()
                self._saver.now_and_then()

    def _found(self, points: Sequence[Point]) -> Generator[tuple[int, np.ndarray], None, None]:
        """What `Evaluator.at` yields; processes of a team take as many points as have threads."""
        if self._team.size == 1:
            yield from self._evaluator.at(points)
            return
        n = self._team.first(free_threads)  # all have to deal out the same groups
        groups = [range(len(points))[start : start + n] for start in range(0, len(points), n)]

        def work(group: int) -> list[tuple[int, np.ndarray]]:
            own = groups[group]
            return [(own[i], values) for i, values in self._evaluator.at([points[i] for i in own])]

        for _, values in self._team.share(len(groups), work):
            yield from values

    def _point(self, index: Index) -> Point:
        steps = [float(axis[i]) for axis, i in zip(self._axes, reversed(index), strict=True)]
        return partial(displaced, self._evaluator.weights, self._directions, steps)


def _take_over(result: Slice, earlier: Slice) -> None:
    """Fill `result` with what `earlier` already has, provided that it was measured alike."""
    measured, wanted = (
        {"xs": s.xs.tolist(), "ys": s.ys is not None and s.ys.tolist()} | s.settings
        for s in (earlier, result)
    )
    for what, expected in wanted.items():
        if measured.get(what) != expected:
            raise InputError(f"resume: {what} was {measured.get(what)}, expected {expected}")
    for name, values in result.metrics.items():
        if name not in earlier:
            raise InputError(f"resume: no metric {name!r}, expected it")
        values[earlier.evaluated] = earlier[name][earlier.evaluated]
    result.evaluated[...] = earlier.evaluated


def _require_fit(evaluator: Evaluator, directions: Sequence[Direction]) -> None:
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
