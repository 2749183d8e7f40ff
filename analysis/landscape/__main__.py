"""``python -m analysis.landscape``: lines and surfaces of checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from analysis.options import MeasurementOptions, open_checkpoints
from models.cli import run
from models.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from analysis.landscape import Slice
    from analysis.measurements import Measurement
    from models.checkpoint import Checkpoint


_SETTINGS = (  # that decide the result
    *("objective", "split", "batch_size", "seed", "batches"),
    *("points", "line_points", "span", "adaptive"),
)


@dataclass(frozen=True)
class Options(MeasurementOptions):
    """Cut the loss landscape of checkpoints along random filter-normalised directions.

    Evaluates NLL, error and L2 on fixed mini-batches, along a line and on a surface around the
    weights, and draws NLL + L2 of all checkpoints on one scale. An interrupted run goes on where it
    stopped.
    """

    batch_size: Annotated[int, arg(help="images in a mini-batch")] = 32
    batches: Annotated[int, arg(help="mini-batches that the loss is the mean over")] = 4
    points: Annotated[int, arg(help="points along each axis of the surface")] = 21
    line_points: Annotated[int, arg(help="points along the line")] = 51
    adaptive: Annotated[
        float | None,
        arg(
            metavar="TOL",
            help="evaluate as few points of the surface as this relative error of "
            "NLL + L2 takes, and interpolate the others",
        ),
    ] = None
    processes: Annotated[int, arg(help="processes that share the points, on a CPU")] = 1
    span: Annotated[float, arg(help="largest step; 1 is as long as the weights")] = 1.0


def main(options: Options) -> None:
    """Measure each checkpoint, print a table, draw, and name the files."""
    import numpy as np

    from analysis import labels
    from analysis.drawing.landscapes import draw_landscapes
    from analysis.tables import print_table

    options.require(batches=1, points=2, line_points=2, processes=1)
    for name in ("points", "line_points"):
        if getattr(options, name) % 2 == 0:
            raise InputError(
                f"{name.replace('_', '-')}: {getattr(options, name)} found, expected an odd "
                "number, so that one is at the weights"
            )
    measurements = [measure(c, options) for c in open_checkpoints(options.ckpt, options.out)]
    rows = []
    for m in measurements:
        nll, l2 = m.arrays["line/nll"], m.arrays.get("line/l2", np.zeros(options.line_points))
        loss = nll + l2
        centre, ends = options.line_points // 2, [0, -1]
        values = (nll[centre], nll[ends].mean(), loss[centre], loss[ends].mean())
        rows.append([labels.name(m), labels.label(m), *(f"{value:.4g}" for value in values)])
    far = f"at ±{options.span:g}"
    print_table(
        f"Along a filter-normalised direction, {labels.objective(measurements[0])}",
        ["checkpoint", "window", "NLL at the weights", f"NLL {far}", "with L2", f"with L2 {far}"],
        rows,
    )
    for m in measurements:
        unknown = int((~np.isfinite(m.arrays["surface/nll"])).sum())
        if unknown:
            total = m.arrays["surface/nll"].size
            print(f"{labels.name(m)}: not a number at {unknown} of {total} points of the surface")
        print(f"stored in {m.path}:/{m.name}")
    for path in draw_landscapes(measurements, options.out):
        print(f"wrote {path}")


def measure(checkpoint: Checkpoint, options: Options) -> Measurement:
    """Line and surface of a checkpoint, stored, or as they were stored before."""
    import numpy as np

    from analysis.landscape import line, random_directions, surface
    from analysis.measurements import store, stored
    from analysis.objective import error_rate

    settings = {key: getattr(options, key) for key in _SETTINGS}
    group = options.group("landscape")
    earlier = None
    if not options.force:
        found = stored(group, checkpoint=checkpoint, options=settings)
        if found:
            print(f"{found.path}:/{group} is there already; --force measures it again")
            return found
        earlier = stored(f"unfinished/{group}", checkpoint=checkpoint, options=settings)
        if earlier:
            print(f"{earlier.path}:/{group} was interrupted; going on from there")
    objective = options.build(checkpoint, options.batches)
    directions = random_directions(objective.model, 2, seed=options.seed)
    grid = np.linspace(-options.span, options.span, options.points)
    steps = np.linspace(-options.span, options.span, options.line_points)
    arrays: dict[str, np.ndarray] = {}

    def save(part: str, unfinished: Slice) -> None:
        so_far = arrays | pack(part, unfinished)
        store(f"unfinished/{group}", so_far, checkpoint=checkpoint, options=settings)

    for part, cut, arguments in (
        ("line", line, (directions[0], steps)),
        ("surface", partial(surface, adaptive=options.adaptive), (directions, grid, grid)),
    ):
        result = cut(
            objective.model,
            {"nll": objective.loss, "error": error_rate},
            objective.batches,
            *arguments,
            weight_decay=objective.weight_decay or None,
            seed=options.seed,
            processes=options.processes,
            resume=unpack(part, earlier),
            save=partial(save, part),
        )
        arrays |= pack(part, result)
    done = f"unfinished/{group}"
    return store(group, arrays, checkpoint=checkpoint, options=settings, in_place_of=done)


def pack(part: str, result: Slice) -> dict[str, np.ndarray]:
    """Arrays of a slice, by the names they are stored under."""
    import numpy as np

    arrays = {**result, "xs": result.xs, "done": result.done}
    if result.ys is not None:
        arrays["ys"] = result.ys
    arrays["attributes"] = np.frombuffer(json.dumps(result.attributes).encode(), dtype=np.uint8)
    return {f"{part}/{key}": array for key, array in arrays.items()}


def unpack(part: str, measurement: Measurement | None) -> Slice | None:
    """Inverse of `pack`; None if the part has not been begun."""
    from analysis.landscape import Slice

    if measurement is None or f"{part}/done" not in measurement.arrays:
        return None
    arrays = {
        key.removeprefix(f"{part}/"): array
        for key, array in measurement.arrays.items()
        if key.startswith(f"{part}/")
    }
    return Slice(
        xs=arrays.pop("xs"),
        ys=arrays.pop("ys", None),
        done=arrays.pop("done"),
        attributes=json.loads(arrays.pop("attributes").tobytes()),
        metrics=arrays,
    )


if __name__ == "__main__":
    run(main, Options)
