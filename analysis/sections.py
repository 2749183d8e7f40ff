"""What is measured of a landscape: lines and a surface, of which progress is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from analysis.cuts import Cut
from analysis.measurements.packing import pack, pack_cut, unpack, unpack_cut
from analysis.measurements.recording import Recording
from analysis.objective import Objective
from lossgeometry import Slice, line, random_directions, surface
from lossgeometry.batches import Data
from lossgeometry.landscape.directions import Include, Normalization
from lossgeometry.running.saving import Progress, above, below
from lossgeometry.seeds import derive_seed


def sections(
    objective: Objective,
    test: Objective,
    recording: Recording,
    choose: Callable[[Progress], Cut],
    *,
    points: int,
    line_points: int,
    lines: int,
    normalization: Normalization,
    include: Include,
    adaptive: float | None,
    recalibrate: Data | None,
    bf16: bool,
    seed: int,
) -> dict[str, np.ndarray]:
    """Arrays of a measurement "landscape": the lines and the surface of a cut.

    The cut is what `choose` makes; where that takes long it keeps its progress. Along its first
    direction there is also a line of `test`; `lines` more are in random directions of their own,
    for intervals of the summary. The other parameters are those of `surface`, `line` and
    `random_directions`.
    """
    team, arrays = recording.team, dict(recording.begun)

    def save_choice(so_far: dict[str, np.ndarray]) -> None:
        recording.save(below("cutting", so_far))

    cut = unpack_cut(arrays)
    if cut is None:
        cut = team.first(partial(choose, Progress(above("cutting", arrays), save_choice)))
        arrays = pack_cut(cut, objective.model)
        team.first(partial(recording.save, arrays))

    def of(function: Callable[..., Slice], what: Objective, *where: Any) -> Callable[..., Slice]:
        how: dict[str, Any] = dict(weight_decay=what.weight_decay or None, seed=seed, bf16=bf16)
        return partial(function, what.model, what.metrics, what.batches, *where, **how)

    first, second = cut.tensors(objective.model)
    steps = cut.along(0, line_points)
    parts = {"line": of(line, objective, first, steps), "test_line": of(line, test, first, steps)}
    drawn: dict[str, Any] = dict(normalization=normalization, include=include)
    for i in range(lines):
        (own,) = random_directions(objective.model, 1, seed=derive_seed(seed, i + 1), **drawn)
        parts[f"lines/{i}"] = of(line, objective, own, steps)
    grid = [cut.along(axis, points) for axis in (0, 1)]
    parts["surface"] = of(partial(surface, adaptive=adaptive), objective, [first, second], *grid)

    def save(part: str, so_far: Slice) -> None:
        recording.save(arrays | pack(part, so_far))

    for part, evaluate in parts.items():
        measured = evaluate(
            recalibrate=recalibrate,
            team=team,
            resume=unpack(part, arrays),
            save=partial(save, part),
        )
        arrays |= pack(part, measured)
        team.first(partial(recording.save, arrays))
    return arrays
