"""``python -m analysis.hessian``: Hessian spectra of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from analysis.options import MeasurementOptions
from lossgeometry.errors import InputError, raise_left_out
from models.cli import arg, run

if TYPE_CHECKING:
    import numpy as np

    from analysis.measurements.recording import Recording
    from analysis.measurements.schema import Measurement
    from models.checkpoint import Checkpoint

_SETTINGS = (  # that decide the result
    *("objective", "split", "batch_size", "seed", "k", "batches", "tol"),
    *("density_batches", "probes", "steps", "layers", "float64"),
)


@dataclass(frozen=True)
class Options(MeasurementOptions):
    """Measure the Hessian of a checkpoint's training objective.

    For each of many mini-batches of augmented training images, the eigenvalues of largest magnitude
    of the Hessian of NLL + L2 (the max eigenvalue spectrum of Park and Kim 2022), with NEP, the
    share of negative ones, and APE, the mean of the positive ones. For some of the mini-batches
    taken together, the density of all eigenvalues and the trace. Several snapshots of one training
    are also drawn against the epoch:

      python -m analysis.hessian --ckpt checkpoints/csan8.pt checkpoints/csan8/*.pt
    """

    at_least: ClassVar = ("batches", "layers")  # what was measured of more than asked for will do

    k: Annotated[int, arg(help="eigenvalues for each mini-batch")] = 5
    batches: Annotated[
        int, arg(help="mini-batches; what is stored of more of them counts, too")
    ] = 40
    tol: Annotated[float, arg(help="relative error of the eigenvalues")] = 1e-3
    density_batches: Annotated[
        int, arg(help="the first mini-batches, that density and trace are of, taken together")
    ] = 4
    probes: Annotated[int, arg(help="random vectors for the spectral density")] = 4
    steps: Annotated[int, arg(help="Lanczos steps for the spectral density")] = 40
    layers: Annotated[
        bool, arg(help="also the top eigenvalues of each layer's block of the Hessian")
    ] = False
    float64: Annotated[bool, arg(help="compute in double precision")] = False
    compile: Annotated[
        bool,
        arg(
            help="compile Hessian-vector products: a minute or two for each checkpoint, which "
            "networks of a million parameters repay with some thousand products"
        ),
    ] = False
    memory: Annotated[
        float | None,
        arg(
            metavar="GIB",
            help="budget for what Hessian-vector products have in common and for their threads; "
            "default: 2, on a GPU half of what is free",
        ),
    ] = None


def main(options: Options) -> None:
    """Measure each checkpoint, print a table, draw, and name the files."""
    options.require(seed=0, batch_size=1, k=1, batches=1, density_batches=1, probes=2, steps=2)
    if options.memory is not None and not 0 <= options.memory < math.inf:
        raise InputError(f"memory: {options.memory} found, expected 0 GiB or more")
    if not 0 <= options.tol < 1:
        raise InputError(f"tol: {options.tol} found, expected a relative error from 0 to below 1")

    from analysis.measurements.recording import Recording, complete
    from analysis.tables.hessians import print_spectra
    from lossgeometry.running.distributed import join

    team = join(options.device)
    recordings = []
    for known in options.open():
        recording = Recording(
            options.group("hessian"),
            known,
            {key: getattr(options, key) for key in _SETTINGS},
            partial(options.fingerprints, known),
            team=team,
            at_least=options.at_least,
            force=options.force,
        )
        recording.announce()
        recordings.append(recording)
    measurements = complete(recordings, options.load, partial(_measure, options))
    if team.rank:
        return
    print_spectra(measurements)
    draw(measurements, options.out)


def draw(measurements: Sequence[Measurement], out: Path) -> None:
    """Draw each measurement, and those of several checkpoints with all others in their folders."""
    from analysis.drawing import hessians
    from analysis.measurements import labels
    from analysis.measurements.comparisons import with_siblings
    from analysis.measurements.files import sparing

    left_out: list[InputError] = []
    written = [*hessians.draw_hessians(measurements, out), *hessians.draw_layers(measurements, out)]
    if len(measurements) > 1:
        every = with_siblings(measurements, left_out)
        epochs = {(labels.comparable(m), m.checkpoint["epoch"]) for m in measurements}
        same = [m for m in every if (labels.comparable(m), m.checkpoint["epoch"]) in epochs]
        how: dict[str, Any] = dict(out=out, origin=labels.origin(measurements))
        written += sparing(partial(hessians.draw_hessian_comparison, **how), same, left_out)
        written += sparing(partial(hessians.draw_hessian_training, **how), every, left_out)
    for path in written:
        print(f"wrote {path}")
    raise_left_out(left_out)


def _measure(
    options: Options, recording: Recording, checkpoint: Checkpoint
) -> dict[str, np.ndarray]:
    from analysis.spectra import spectra

    objective = options.build(checkpoint, options.batches)
    recording.data = {options.split: objective.fingerprint}
    return spectra(
        objective.double() if options.float64 else objective,
        recording,
        k=options.k,
        tol=options.tol,
        density_batches=options.density_batches,
        probes=options.probes,
        steps=options.steps,
        layers=options.layers,
        seed=options.seed,
        memory=None if options.memory is None else int(options.memory * 2**30),
        compile=options.compile,
    )


if __name__ == "__main__":
    run(main, Options)
