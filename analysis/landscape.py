"""``python -m analysis.landscape``: lines and surfaces of checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from analysis.options import MeasurementOptions, Scale
from lossgeometry.errors import InputError
from models.cli import run

if TYPE_CHECKING:
    from analysis.cuts import Cut
    from analysis.measurements.schema import Measurement
    from analysis.objective import Objective
    from lossgeometry import Slice
    from lossgeometry.batches import Data
    from lossgeometry.running.distributed import Team
    from lossgeometry.running.saving import Progress
    from models.checkpoint import Checkpoint


_SETTINGS = (  # that decide the result, besides the files of --towards
    *("objective", "split", "batch_size", "seed", "batches", "directions", "normalization"),
    *("include", "points", "line_points", "lines", "span", "adaptive"),
)
FARTHEST = 1e6  # step along a direction


@dataclass(frozen=True)
class Options(MeasurementOptions):
    """Cut the loss landscape of checkpoints along two directions.

    Evaluates NLL, error and L2 on fixed mini-batches on a surface around the weights and along its
    first direction, there also on clean test images, and draws all checkpoints on one scale. Along
    random directions it also says in numbers how flat the minimum is. An interrupted run goes on
    where it stopped. Examples:

      python -m analysis.landscape --adaptive 0.01

      python -m analysis.landscape --directions pca --ckpt checkpoints/csan8.pt

      python -m analysis.landscape --directions bezier --ckpt A.pt --towards B.pt
    """

    batch_size: Annotated[int, arg(help="images in a mini-batch")] = 32
    batches: Annotated[int, arg(help="mini-batches that the loss is the mean over")] = 4
    directions: Annotated[
        Literal["random", "eigenvectors", "gradient", "towards", "plane", "bezier", "pca"],
        arg(
            help="random; eigenvectors: of the largest and the smallest Hessian eigenvalue; "
            "gradient: and a random one; towards: another checkpoint, and a random one; plane: "
            "through three checkpoints; bezier: of a fitted curve of low loss to another "
            "checkpoint; pca: in which the training moved most, seen in its snapshots"
        ),
    ] = "random"
    towards: Annotated[
        tuple[Path, ...],
        arg(metavar="FILE [FILE]", help="the other checkpoints, one, or two for a plane"),
    ] = ()
    normalization: Annotated[
        Literal["filter", "layer", "none"],
        arg(help="pieces of a random direction that are made as long as those of the weights"),
    ] = "filter"
    include: Annotated[
        Literal["weights", "all"],
        arg(
            help="parameters that random directions move; weights: without biases, norms and "
            "position embeddings"
        ),
    ] = "weights"
    points: Annotated[int, arg(help="points along each axis of the surface")] = 21
    line_points: Annotated[int, arg(help="points along the line")] = 51
    lines: Annotated[int, arg(help="random directions that flatness is the mean over")] = 8
    adaptive: Annotated[
        float | None,
        arg(
            metavar="TOL",
            help="evaluate as few points of the surface as this relative error of "
            "NLL + L2 takes, and interpolate the others",
        ),
    ] = None
    recalibrate: Annotated[
        bool,
        arg(
            help="compute the running statistics of every BatchNorm anew at each point, on the "
            "mini-batches; without, they stay those of the checkpoint"
        ),
    ] = False
    bf16: Annotated[bool, arg(help="compute in bfloat16 what is safe to")] = False
    span: Annotated[
        float,
        arg(help="largest step; for random directions 1 is as long as the weights"),
    ] = 1.0
    scale: Scale = "log"


def main(options: Options) -> None:
    """Measure each checkpoint, print tables, draw, and name the files."""
    import numpy as np

    from analysis.drawing.landscapes import draw_landscapes
    from analysis.measurements import labels
    from lossgeometry.running.devices import choose_device
    from lossgeometry.running.distributed import join

    require_usable(options)
    team = join(choose_device(options.device).type)
    others = options.load(options.towards) if options.towards else []
    checkpoints = options.open()
    for checkpoint, other in product(checkpoints, others):
        if other.architecture != checkpoint.architecture:
            raise InputError(
                f"towards: {other.path} is another architecture than {checkpoint.path}, expected "
                "the same"
            )
    require_finite([*checkpoints, *others])
    measurements = [measure(checkpoint, others, options, team) for checkpoint in checkpoints]
    if team.rank:
        return
    print_heights(measurements)
    for name, m in zip(labels.names(measurements), measurements, strict=True):
        unknown = int((~np.isfinite(m.arrays["surface/nll"])).sum())
        if unknown:
            total = m.arrays["surface/nll"].size
            print(f"{name}: not a number at {unknown} of {total} points of the surface")
        if options.adaptive and m.arrays["surface/done"].all():
            print(f"{name}: not smooth enough, all points of the surface evaluated")
        print(f"stored in {m.path}:/{m.name}")
    origin = labels.origin(measurements)
    for path in draw_landscapes(measurements, options.out, scale=options.scale, origin=origin):
        print(f"wrote {path}")


def require_usable(options: Options) -> None:
    """Raise `InputError` where options do not go together."""
    options.require(batches=1, points=3, line_points=5, lines=0)
    for name in ("points", "line_points"):
        if getattr(options, name) % 2 == 0:
            raise InputError(
                f"{name.replace('_', '-')}: {getattr(options, name)} found, expected an odd "
                "number, so that one is at the weights"
            )
    if not 0 < options.span <= FARTHEST:
        raise InputError(
            f"span: {options.span} found, expected a positive step of at most {FARTHEST:g}"
        )
    if options.adaptive is not None and not 0 < options.adaptive < 1:
        raise InputError(
            f"adaptive: {options.adaptive} found, expected a positive relative error below 1"
        )
    expected = {"towards": 1, "bezier": 1, "plane": 2}.get(options.directions, 0)
    if len(options.towards) != expected:
        raise InputError(
            f"towards: {len(options.towards)} checkpoints found, expected {expected} for "
            f"--directions {options.directions}"
        )


def require_finite(checkpoints: list[Checkpoint]) -> None:
    """Raise `InputError` that names the file where weights are not finite."""
    from lossgeometry.landscape import directions

    for checkpoint in checkpoints:
        directions.require_finite(str(checkpoint.path), dict(checkpoint.model.named_parameters()))


def measure(
    checkpoint: Checkpoint, others: list[Checkpoint], options: Options, team: Team
) -> Measurement:
    """Lines and surface of a checkpoint, stored, or as they were stored before."""
    from analysis.measurements.files import store, stored
    from analysis.measurements.packing import pack, pack_cut, unpack, unpack_cut
    from lossgeometry.landscape.evaluation import batch_norms
    from lossgeometry.running.saving import Progress, above, below

    settings = {key: getattr(options, key) for key in _SETTINGS}
    settings["towards"] = [other.sha256 for other in others]
    # Among the settings only where asked for: measurements from before these options are as good.
    settings |= {key: True for key in ("recalibrate", "bf16") if getattr(options, key)}
    kind = "" if options.directions == "random" else f"_{options.directions}"
    group = options.group(f"landscape{kind}")
    unfinished = f"unfinished/{group}"
    clean = replace(options, objective="clean", split="test")
    common: dict[str, Any] = dict(checkpoint=checkpoint, options=settings)

    def look(name: str) -> Measurement | None:
        def now() -> dict[str, str]:
            return options.fingerprints(checkpoint) | clean.fingerprints(checkpoint)

        return team.first(lambda: stored(name, **common, data=now))

    earlier = None
    if not options.force:
        found = look(group)
        if found:
            print(f"{found.path}:/{group} is there already; --force measures it again")
            return found
        earlier = look(unfinished)
        if earlier:
            print(f"{earlier.path}:/{group} was interrupted; going on from there")
    objective = options.build(checkpoint, options.batches)
    calibration = objective.batches if options.recalibrate else None
    if calibration and all(norm.training for norm in batch_norms(objective.model)):
        raise InputError(
            f"recalibrate: {checkpoint.path} has no BatchNorm with running statistics under "
            f"--objective {options.objective}, expected one"
        )
    test = clean.build(replace(checkpoint, model=copy.deepcopy(checkpoint.model)), options.batches)
    common["data"] = {options.split: objective.fingerprint, "test": test.fingerprint}
    arrays = dict(earlier.arrays) if earlier else {}
    cut = unpack_cut(arrays)
    if cut is None:
        cut = team.first(
            lambda: choose(
                *(checkpoint, others, objective, options, calibration),
                Progress(
                    above("cutting", arrays),
                    lambda so_far: store(unfinished, below("cutting", so_far), **common),
                ),
            )
        )
        arrays = pack_cut(cut)
        team.first(partial(store, unfinished, arrays, **common))

    def save(part: str, so_far: Slice) -> None:
        store(unfinished, arrays | pack(part, so_far), **common)

    for part, evaluate in parts_of(cut, objective, test, options).items():
        measured = evaluate(
            recalibrate=calibration,
            team=team,
            resume=unpack(part, arrays),
            save=partial(save, part),
        )
        arrays |= pack(part, measured)
        team.first(partial(store, unfinished, arrays, **common))
    return team.first(partial(store, group, arrays, **common, in_place_of=unfinished))


def parts_of(
    cut: Cut, objective: Objective, test: Objective, options: Options
) -> dict[str, Callable[..., Slice]]:
    """What is evaluated, by the name that it is stored by: the lines and the surface of a cut.

    The lines in random directions of their own, ``lines/i``, are for intervals of the summary.
    """
    from lossgeometry import line, random_directions, surface
    from lossgeometry.seeds import derive_seed

    def of(function: Callable[..., Slice], what: Objective, *where: Any) -> Callable[..., Slice]:
        penalty = what.weight_decay or None
        how: dict[str, Any] = dict(weight_decay=penalty, seed=options.seed, bf16=options.bf16)
        return partial(function, what.model, what.metrics, what.batches, *where, **how)

    first, second = cut.tensors(objective.model)
    steps = cut.along(0, options.line_points)
    parts = {"line": of(line, objective, first, steps), "test_line": of(line, test, first, steps)}
    for i in range(options.lines if options.directions == "random" else 0):
        (direction,) = random_directions(
            objective.model,
            1,
            seed=derive_seed(options.seed, i + 1),
            normalization=options.normalization,
            include=options.include,
        )
        parts[f"lines/{i}"] = of(line, objective, direction, steps)
    grid = [cut.along(axis, options.points) for axis in (0, 1)]
    sampled = partial(surface, adaptive=options.adaptive)
    return parts | {"surface": of(sampled, objective, [first, second], *grid)}


def choose(
    checkpoint: Checkpoint,
    others: list[Checkpoint],
    objective: Objective,
    options: Options,
    calibration: Data | None,
    progress: Progress,
) -> Cut:
    """The directions that `options` name; paths on the way are recalibrated on `calibration`."""
    from analysis import cuts

    states = [other.model.state_dict() for other in others]
    span, seed = options.span, options.seed
    drawn: dict[str, Any] = dict(normalization=options.normalization, include=options.include)
    along: dict[str, Any] = dict(seed=seed, span=span, recalibrate=calibration, progress=progress)
    match options.directions:
        case "random":
            return cuts.random_cut(objective, seed=seed, span=span, **drawn)
        case "eigenvectors":
            return cuts.eigenvector_cut(objective, seed=seed, span=span, progress=progress)
        case "gradient":
            return cuts.gradient_cut(objective, seed=seed, span=span, **drawn)
        case "towards":
            return cuts.towards_cut(objective, states[0], **along, **drawn)
        case "plane":
            return cuts.plane_cut(objective, states[0], states[1], span=span)
        case "bezier":
            return cuts.bezier_cut(objective, states[0], **along)
    return cuts.pca_cut(objective, snapshots_of(checkpoint, options), span=span)


def snapshots_of(checkpoint: Checkpoint, options: Options) -> list[dict[str, Any]]:
    """State dicts of a training, in the order of its epochs, up to the checkpoint itself.

    Where the epochs are not known, the order is that of the names. Raises `InputError` if there are
    fewer than three, or one has weights that are not finite.
    """
    assert checkpoint.path is not None
    folder = checkpoint.path.with_suffix("")
    kept = options.load(sorted(folder.glob(f"epoch*{checkpoint.path.suffix}")))
    earlier = [c for c in kept if options.model or c.epoch < checkpoint.epoch]
    run = [*sorted(earlier, key=lambda c: c.epoch), checkpoint]
    if len(run) < 3:
        raise InputError(
            f"{folder}: {len(run) - 1} snapshots found, expected at least 2 of earlier epochs; "
            "train with --snapshots"
        )
    require_finite(run)
    return [c.model.state_dict() for c in run]


def print_heights(measurements: list[Measurement]) -> None:
    """Tables of the loss along the line, and of what the cut says beyond."""
    from analysis.measurements import labels
    from analysis.measurements.landscape_tables import along_line, barriers, flatness_rows
    from analysis.tables import print_table

    for title, columns, rows in (
        along_line(measurements),
        flatness_rows(measurements),
        barriers(measurements),
    ):
        if rows:
            print_table(f"{title}, {labels.objective(measurements[0])}", columns, rows)


if __name__ == "__main__":
    run(main, Options)
