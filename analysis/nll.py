"""``python -m analysis.nll``: train-NLL curves and the optimisation-regularisation plane."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from analysis.options import CheckpointOptions
from lossgeometry.errors import InputError, raise_left_out
from models.cli import run

if TYPE_CHECKING:
    import numpy as np
    import torch

    from analysis.measurements.schema import Measurement
    from lossgeometry.running.distributed import Team
    from models.checkpoint import Checkpoint
    from models.data.datasets import ImageDataset, Split


SPLITS: tuple[Split, ...] = ("train", "test")


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
    from analysis.drawing.nll import draw_nll, draw_windows
    from analysis.measurements import labels
    from analysis.measurements.files import collect, sparing
    from lossgeometry.running.devices import choose_device
    from lossgeometry.running.distributed import join

    if options.history_only and options.model:
        raise InputError("history-only: the weights of --model have no history, leave it out")
    device = choose_device(options.device)
    team = join(device.type)
    checkpoints = options.open()
    if options.model:
        measurements = [measure_outcomes(c, options, device, team) for c in checkpoints]
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
        measure(checkpoint, options, device, team)
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


def measure(checkpoint: Checkpoint, options: Options, device: torch.device, team: Team) -> None:
    """Store the history of a trained checkpoint, and what it makes of its images."""
    import numpy as np

    from analysis.measurements.files import store

    if not _stored("history", checkpoint, options, team):
        history = {name: np.array(values) for name, values in checkpoint.history.items()}
        team.first(lambda: store("history", history, checkpoint=checkpoint, options={}))
    if not options.history_only:
        measure_outcomes(checkpoint, options, device, team)
        measure_objective(checkpoint, options, device, team)


def measure_outcomes(
    checkpoint: Checkpoint, options: Options, device: torch.device, team: Team
) -> Measurement:
    """What a checkpoint makes of every image, stored, or as it was stored before."""
    from analysis.measurements.files import store
    from analysis.outcomes import outcomes
    from analysis.tables import working

    found = _stored("outcomes", checkpoint, options, team)
    if found:
        return found
    arrays: dict[str, np.ndarray] = {}
    data: dict[str, str] = {}
    for split in SPLITS:
        dataset = _dataset(checkpoint, split, options)
        with working(f"{checkpoint.path}: NLL of every {split} image"):
            nll, correct = outcomes(checkpoint, dataset, device, team)
        arrays |= {f"{split}/nll": nll, f"{split}/correct": correct}
        data[split] = dataset.fingerprint
    return team.first(
        lambda: store("outcomes", arrays, checkpoint=checkpoint, options={}, data=data)
    )


def measure_objective(
    checkpoint: Checkpoint, options: Options, device: torch.device, team: Team
) -> None:
    """Store NLL and error of the augmented images that training sees, unless they are there."""
    import numpy as np

    from analysis.measurements.files import store
    from analysis.outcomes import objective_outcomes

    settings = {"seed": 0, "batch_size": checkpoint.recipe.batch_size}
    if _stored("objective", checkpoint, options, team, settings):
        return
    dataset = _dataset(checkpoint, "train", options)
    nll, error = objective_outcomes(checkpoint, dataset, device, team, seed=settings["seed"])
    arrays = {"nll": np.array(nll), "error": np.array(error)}
    data = {"train": dataset.fingerprint}
    team.first(
        lambda: store("objective", arrays, checkpoint=checkpoint, options=settings, data=data)
    )


def _dataset(checkpoint: Checkpoint, split: Split, options: Options) -> ImageDataset:
    """The images of a split, those of training alone that were trained on."""
    from models.data.datasets import load_dataset

    dataset = load_dataset(checkpoint.dataset, split, data_root=options.data_root)
    if split == "train" and checkpoint.images is not None:
        return dataset.first(checkpoint.images)
    return dataset


def _stored(
    name: str,
    checkpoint: Checkpoint,
    options: Options,
    team: Team,
    settings: Mapping[str, int] | None = None,
) -> Measurement | None:
    """What was stored before with these `settings`, unless it is to be measured again."""
    from analysis.measurements.files import stored
    from models.data.datasets import fingerprints

    def now() -> dict[str, str]:
        splits: dict[Split, int | None] = {"train": checkpoint.images, "test": None}
        return fingerprints(checkpoint.dataset, splits, data_root=options.data_root)

    if options.force:
        return None
    return team.first(lambda: stored(name, checkpoint=checkpoint, options=settings or {}, data=now))


def print_outcomes(measurements: Sequence[Measurement]) -> None:
    """Table of NLL and error of weights without a history, and where they are."""
    from analysis.measurements import labels
    from analysis.tables import print_table

    rows = []
    for name, m in zip(labels.names(measurements), measurements, strict=True):
        row = [name, labels.label(m)]
        for split in SPLITS:
            row.append(f"{m.arrays[f'{split}/nll'].mean(dtype=float):.4f}")
            row.append(f"{100 * (1 - m.arrays[f'{split}/correct'].mean()):.2f}")
        rows.append(row)
    columns = [f"{split} {what}" for split in SPLITS for what in ("NLL", "error %")]
    print_table("Clean images", ["checkpoint", labels.kind(measurements), *columns], rows)
    for m in measurements:
        print(f"stored in {m.path}:/{m.name}; no history of the training, so nothing to draw")


def print_end_points(
    histories: Iterable[Measurement],
    objectives: Iterable[Measurement],
    spectra: Iterable[Measurement],
) -> None:
    """Tables over seeds: NLL and error at the end; NEP and APE there and at the end of warm-up."""
    from analysis.measurements import labels
    from analysis.tables import print_table

    objective = {m.checkpoint["sha256"]: m.arrays for m in objectives}
    spectrum = {(labels.training(m), m.checkpoint["epoch"]): m.arrays for m in spectra}
    datasets: dict[str, list[Measurement]] = defaultdict(list)
    for m in histories:
        datasets[labels.dataset(m)].append(m)
    groups = [
        (dataset, label, members)
        for dataset, measurements in sorted(datasets.items())
        for label, members in labels.by_architecture(measurements).items()
    ]
    scores, eigenvalues = [], []
    for dataset, label, members in groups:
        recipe, trainings = members[0].checkpoint["recipe"], [*map(labels.training, members)]
        start = [dataset, label, str(recipe["epochs"]), str(len(members))]
        weights = [m.checkpoint["sha256"] for m in members]
        augmented = [objective[sha256] for sha256 in weights if sha256 in objective]
        row = []
        for split in ("train", "objective", "test"):
            for key, digits, scale in (("nll", ".4f", 1), ("error", ".2f", 100)):
                values = (
                    [float(arrays[key]) for arrays in augmented]
                    if split == "objective"
                    else [float(m.arrays[f"{split}_{key}"][-1]) for m in members]
                )
                row.append(_over_seeds(values, digits, scale, of=len(members)))
        scores.append([*start, *row])
        row = []
        for epoch in (recipe["warmup_epochs"], recipe["epochs"]):
            measured = [spectrum[t, epoch] for t in trainings if (t, epoch) in spectrum]
            for key, scale in (("nep", 100), ("ape", 1)):
                values = [float(arrays[key]) for arrays in measured]
                row.append(_over_seeds(values, ".1f", scale, of=len(members)))
        eigenvalues.append([*start, *row])
    first = ["dataset", "window", "epochs", "seeds"]
    print_table(
        "Mean ± half of the 95 % interval over seeds, at the end of training; "
        "objective: of augmented training images, as it is minimised, without L2",
        [
            *first,
            *("train NLL", "train error %", "objective NLL", "objective error %"),
            *("test NLL", "test error %"),
        ],
        scores,
    )
    if spectrum:
        print_table(
            "Max eigenvalues at the end of warm-up (early) and of training; ± as above",
            [*first, "NEP %, early", "APE, early", "NEP %", "APE"],
            eigenvalues,
        )


def _over_seeds(values: Sequence[float], digits: str, scale: float, *, of: int) -> str:
    """Mean and interval; how many seeds, if it is of fewer than those of the row."""
    from lossgeometry.statistics import across_seeds

    if not values:
        return "–"
    text = across_seeds(values).format(digits, scale)
    return text if len(values) == of else f"{text} (n = {len(values)})"


if __name__ == "__main__":
    run(main, Options)
