"""``python -m analysis.nll``: train-NLL curves and the optimisation-regularisation plane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from analysis.options import CheckpointOptions
from lossgeometry.errors import InputError, raise_left_out
from models.cli import arg, run

if TYPE_CHECKING:
    from analysis.measurements.recording import Recording
    from analysis.measurements.schema import Measurement
    from models.checkpoint import Checkpoint
    from models.data.arrays import Split
    from models.provenance import Provenance


@dataclass(frozen=True)
class Options(CheckpointOptions):
    """Draw train NLL over the epochs, and train NLL against test error at the end.

    The histories of the given checkpoints are stored in their HDF5 files, and the NLL of every
    single image, clean, which analysis.claims needs, and the mean over an epoch of augmented images
    (the objective of the training); drawn are the histories of these and all others in the same
    folders and below, with the mean and the 95 % interval over seeds. A second table has NEP and
    APE, where analysis.hessian has measured them. Of the weights of --model there is no history:
    what they make of every clean image is stored and its mean printed.
    """

    history_only: Annotated[
        bool, arg(help="leave out single images and the objective; does not need the dataset")
    ] = False


def main(options: Options) -> None:
    """Store the histories, print tables of the end points, draw, and name the files."""
    if options.history_only and options.model:
        raise InputError("history-only: the weights of --model have no history, leave it out")

    from analysis.drawing.nll import draw_nll, draw_windows
    from analysis.measurements import labels
    from analysis.measurements.files import collect_each, sparing
    from analysis.measurements.recording import Recording, complete
    from analysis.tables.nll import print_end_points, print_outcomes
    from lossgeometry.running.distributed import join
    from models.data.arrays import fingerprints

    team = join(options.device)
    checkpoints = options.open()

    def stored(
        name: str, known: Provenance, splits: Mapping[Split, int | None], **settings: Any
    ) -> Recording:
        now = partial(fingerprints, known.dataset, splits, data_root=options.data_root)
        return Recording(name, known, settings, now, team=team, force=options.force)

    def outcomes() -> list[Measurement]:
        recordings = [stored("outcomes", c, {"train": c.images, "test": None}) for c in checkpoints]
        return complete(recordings, options.load, partial(_measure, options))

    if options.model:
        measurements = outcomes()
        if not team.rank:
            print_outcomes(measurements)
        return
    for checkpoint in checkpoints:
        if not checkpoint.history:
            raise InputError(f"{checkpoint.path}: has no history, expected one of a training")
        if checkpoint.epoch < checkpoint.recipe.epochs:
            raise InputError(
                f"{checkpoint.path}: a snapshot of epoch {checkpoint.epoch}, expected the end of "
                f"training, epoch {checkpoint.recipe.epochs}"
            )
    for checkpoint in checkpoints:
        history = stored("history", checkpoint, {})
        if history.found is None:
            history.finish(checkpoint.history)
    if not options.history_only:
        outcomes()
        objectives = [
            stored("objective", c, {"train": c.images}, seed=0, batch_size=c.recipe.batch_size)
            for c in checkpoints
        ]
        complete(objectives, options.load, partial(_measure, options))
    if team.rank:
        return
    folders = {checkpoint.path.parent for checkpoint in checkpoints if checkpoint.path}
    left_out: list[InputError] = []
    histories, of_training, spectra = collect_each(
        folders, ("history", "objective", "hessian/train"), left_out
    ).values()
    sparing(
        lambda found: print_end_points(found, of_training, spectra),
        histories,
        left_out,
    )
    origin = labels.origin(histories)
    for draw in (draw_nll, draw_windows):
        for path in sparing(partial(draw, out=options.out, origin=origin), histories, left_out):
            print(f"wrote {path}")
    raise_left_out(left_out)


def _measure(options: Options, recording: Recording, checkpoint: Checkpoint) -> Mapping[str, Any]:
    from analysis.outcomes import measure_objective, measure_outcomes

    measure = measure_outcomes if recording.name == "outcomes" else measure_objective
    return measure(recording, checkpoint, data_root=options.data_root, device=options.device)


if __name__ == "__main__":
    run(main, Options)
