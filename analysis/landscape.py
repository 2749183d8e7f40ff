"""``python -m analysis.landscape``: lines and surfaces of checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from analysis.options import MeasurementOptions, Scale
from lossgeometry.errors import InputError, raise_left_out
from models.cli import arg, run

if TYPE_CHECKING:
    import numpy as np

    from analysis.measurements.recording import Recording
    from models.checkpoint import Checkpoint
    from models.provenance import Provenance


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
    require_usable(options)

    from analysis.drawing.landscapes import draw_landscapes
    from analysis.measurements import labels
    from analysis.measurements.comparisons import with_siblings
    from analysis.measurements.files import sparing
    from analysis.measurements.recording import Recording, complete
    from analysis.tables.landscapes import print_landscapes
    from lossgeometry.running.distributed import join

    team = join(options.device)
    others = options.describe(options.towards) if options.towards else []
    checkpoints = options.open()
    require_comparable(checkpoints, others)
    settings = {key: getattr(options, key) for key in _SETTINGS}
    settings["towards"] = [other.sha256 for other in others]
    # Among the settings only where asked for: measurements from before these options are as good.
    settings |= {key: True for key in ("recalibrate", "bf16") if getattr(options, key)}
    random = options.directions == "random"
    group = options.group("landscape" if random else f"landscape_{options.directions}")
    clean = replace(options, objective="clean", split="test")

    def now(known: Provenance) -> dict[str, str]:
        return options.fingerprints(known) | clean.fingerprints(known)

    recordings = []
    for known in checkpoints:
        recording = Recording(
            group, known, settings, partial(now, known), team=team, force=options.force
        )
        recording.announce()
        recordings.append(recording)
    done = all(recording.found for recording in recordings)
    ends = [] if done else [_load(options, other) for other in others]
    measure = partial(_measure, options, clean, ends)
    measurements = complete(recordings, partial(_load, options), measure)
    if team.rank:
        return
    print_landscapes(measurements)
    left_out: list[InputError] = []
    draw = partial(
        draw_landscapes,
        out=options.out,
        scale=options.scale,
        origin=labels.origin(measurements),
    )
    for path in sparing(draw, with_siblings(measurements, left_out), left_out):
        print(f"wrote {path}")
    raise_left_out(left_out)


def _load(options: Options, known: Provenance) -> Checkpoint:
    """A checkpoint, whose weights have to be finite."""
    from lossgeometry.landscape.directions import require_finite

    checkpoint = options.load(known)
    require_finite(str(checkpoint.path), dict(checkpoint.model.named_parameters()))
    return checkpoint


def _measure(
    options: Options,
    clean: Options,
    ends: Sequence[Checkpoint],
    recording: Recording,
    checkpoint: Checkpoint,
) -> dict[str, np.ndarray]:
    from analysis.cuts import chosen_cut, snapshots
    from analysis.sections import sections
    from lossgeometry.landscape.evaluation import batch_norms

    objective = options.build(checkpoint, options.batches)
    calibration = objective.batches if options.recalibrate else None
    if calibration and all(norm.training for norm in batch_norms(objective.model)):
        raise InputError(
            f"recalibrate: {checkpoint.path} has no BatchNorm with running statistics under "
            f"--objective {options.objective}, expected one"
        )
    own = replace(checkpoint, model=copy.deepcopy(checkpoint.model))
    test = clean.build(own, options.batches)
    recording.data = {options.split: objective.fingerprint, "test": test.fingerprint}
    drawn: dict[str, Any] = dict(
        normalization=options.normalization, include=options.include, seed=options.seed
    )

    def kept(paths: list[Path]) -> list[Checkpoint]:
        return [options.load(known) for known in options.describe(paths)]

    choose = partial(
        chosen_cut,
        options.directions,
        objective,
        [end.model.state_dict() for end in ends],
        lambda: snapshots(checkpoint, kept, in_order=bool(options.model)),
        span=options.span,
        recalibrate=calibration,
        **drawn,
    )
    return sections(
        objective,
        test,
        recording,
        choose,
        points=options.points,
        line_points=options.line_points,
        lines=options.lines if options.directions == "random" else 0,
        adaptive=options.adaptive,
        recalibrate=calibration,
        bf16=options.bf16,
        **drawn,
    )


def require_comparable(checkpoints: Sequence[Provenance], others: Sequence[Provenance]) -> None:
    """Raise `InputError` unless all are of one architecture with `others`."""
    for checkpoint, other in product(checkpoints, others):
        if other.architecture != checkpoint.architecture:
            raise InputError(
                f"towards: {other.path} is another architecture than {checkpoint.path}, expected "
                "the same"
            )


def require_usable(options: Options) -> None:
    """Raise `InputError` where options do not go together."""
    options.require(seed=0, batch_size=1, batches=1, points=3, line_points=5, lines=0)
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


if __name__ == "__main__":
    run(main, Options)
