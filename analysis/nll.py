"""``python -m analysis.nll``: train-NLL curves and the optimisation-regularisation plane."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from tyro.conf import arg

from analysis.options import CheckpointOptions
from lossgeometry.errors import InputError, raise_left_out
from models.cli import run


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
    from analysis.measurements.files import collect, sparing
    from analysis.outcomes import record_history, record_objective, record_outcomes
    from analysis.tables.nll import print_end_points, print_outcomes
    from lossgeometry.running.devices import choose_device
    from lossgeometry.running.distributed import join

    device = choose_device(options.device)
    team = join(device.type)
    how: dict[str, Any] = dict(force=options.force, team=team)
    on = how | dict(data_root=options.data_root, device=device)
    checkpoints = options.open()
    if options.model:
        measurements = [record_outcomes(checkpoint, **on) for checkpoint in checkpoints]
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
        record_history(checkpoint, **how)
        if not options.history_only:
            record_outcomes(checkpoint, **on)
            record_objective(checkpoint, **on)
    if team.rank:
        return
    folders = {checkpoint.path.parent for checkpoint in checkpoints if checkpoint.path}
    left_out: list[InputError] = []
    histories, objectives, spectra = (
        collect(folders, name, left_out) for name in ("history", "objective", "hessian/train")
    )
    sparing(
        lambda found: print_end_points(found, objectives, spectra),
        histories,
        left_out,
    )
    origin = labels.origin(histories)
    for draw in (draw_nll, draw_windows):
        for path in sparing(partial(draw, out=options.out, origin=origin), histories, left_out):
            print(f"wrote {path}")
    raise_left_out(left_out)


if __name__ == "__main__":
    run(main, Options)
