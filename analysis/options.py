"""The options that every analysis command shares, and what they name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from models.cli import DataRoot, Device, Force, Seed
from models.errors import InputError

if TYPE_CHECKING:
    from analysis.objective import Objective
    from models.checkpoint import Checkpoint

DEFAULT_CHECKPOINTS = "checkpoints/csan*.pt"
MOST = 10**6  # of anything that is counted

Ckpt = Annotated[
    tuple[Path, ...],
    arg(metavar="FILE [FILE ...]", help=f"checkpoints to measure; default: {DEFAULT_CHECKPOINTS}"),
]
Out = Annotated[Path, arg(metavar="DIR", help="folder of the figures")]
ObjectiveKind = Annotated[
    Literal["train", "clean"],
    arg(
        name="objective",
        help="train: what the training minimised (augmented, mixed, smoothed, NLL + L2); "
        "clean: NLL of the images as they are",
    ),
]
Scale = Annotated[Literal["log", "linear"], arg(help="of the colours and heights of loss surfaces")]
SplitName = Annotated[Literal["train", "test"], arg(help="the part of the dataset to measure on")]
BatchSize = Annotated[int, arg(help="images in a mini-batch")]


@dataclass(frozen=True)
class MeasurementOptions:
    """Options of a command that measures checkpoints."""

    ckpt: Ckpt = ()
    objective: ObjectiveKind = "train"
    split: SplitName = "train"
    batch_size: BatchSize = 16
    seed: Seed = 0
    device: Device = "auto"
    data_root: DataRoot = None
    out: Out = Path("figures")
    force: Force = False

    def group(self, measurement: str) -> str:
        """Where in the HDF5 file a measurement of this objective belongs."""
        name = f"{measurement}/{self.objective}"
        return name if self.split == "train" else f"{name}_{self.split}"

    def require(self, **least: int) -> None:
        """Raise `InputError` if one of the named options is out of range.

        What is given for a name is its least value; the largest is `MOST`.
        """
        from models.seeds import derive_seed

        derive_seed(self.seed)  # is it usable?
        for name, bound in {"batch_size": 1, **least}.items():
            value = getattr(self, name)
            if not bound <= value <= MOST:
                which = f"least {bound}" if value < bound else f"most {MOST}"
                raise InputError(f"{name.replace('_', '-')}: {value} found, expected at {which}")

    def fingerprints(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Of the images that a checkpoint is measured on, as they are now, if they are there."""
        from models.datasets import fingerprints

        images = checkpoint.images if self.split == "train" else None
        return fingerprints(checkpoint.dataset, {self.split: images}, data_root=self.data_root)

    def build(self, checkpoint: Checkpoint, batches: int) -> Objective:
        """The objective of a checkpoint on `batches` mini-batches of its dataset."""
        from analysis.objective import build_objective
        from models.datasets import load_dataset
        from models.devices import choose_device

        dataset = load_dataset(checkpoint.dataset, self.split, data_root=self.data_root)
        if self.split == "train" and checkpoint.images is not None:
            dataset = dataset.first(checkpoint.images)
        return build_objective(
            checkpoint,
            dataset,
            kind=self.objective,
            batch_size=self.batch_size,
            batches=batches,
            seed=self.seed,
            device=choose_device(self.device),
        )


def open_checkpoints(paths: tuple[Path, ...], out: Path) -> list[Checkpoint]:
    """Load the checkpoints that ``--ckpt`` names.

    Raises `InputError` if a checkpoint is unusable or there is none, or if results could not be
    written beside them or figures to the folder `out`: better now than after hours.
    """
    from analysis.measurements import load, measurement_file
    from models.checkpoint import load_checkpoint

    paths = paths or tuple(sorted(Path().glob(DEFAULT_CHECKPOINTS)))
    if not paths:
        raise InputError(f"ckpt: there is no {DEFAULT_CHECKPOINTS} here, name a checkpoint")
    checkpoints = [load_checkpoint(path) for path in paths]
    require_writable("out", out)
    for path in paths:
        require_writable("ckpt", path.parent)
        load(measurement_file(path), "history")  # a damaged file is found now
    return checkpoints


def require_writable(option: str, folder: Path) -> None:
    """Raise `InputError` if `folder` neither is nor can be made a folder to write to."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{option}: {existing} found, expected a folder that can be written to")
