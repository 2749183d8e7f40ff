"""The options that every analysis command shares, and what they name."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from lossgeometry.errors import InputError
from models.cli import DataRoot, Device, Force, Seed, arg

if TYPE_CHECKING:
    from analysis.objective import Objective
    from models.checkpoint import Checkpoint
    from models.provenance import Provenance
    from models.recipes import Recipe

DEFAULT_CHECKPOINTS = "checkpoints/csan*.pt"
MOST = 10**6  # of anything that is counted

Out = Annotated[Path, arg(metavar="DIR", help="folder of the figures")]
Preset = Literal["digits", "cifar10", "cifar100", "paper-cifar100"]  # of models.recipes
Scale = Annotated[Literal["log", "linear"], arg(help="of the colours and heights of loss surfaces")]


@dataclass(frozen=True)
class CheckpointOptions:
    """Options of a command that looks at checkpoints."""

    ckpt: Annotated[
        tuple[Path, ...],
        arg(
            metavar="FILE [FILE ...]",
            help=f"checkpoints to measure; default: {DEFAULT_CHECKPOINTS}; with --model the "
            "weights of that model, saved by any framework with torch.save or as .safetensors, or "
            "a folder with model.safetensors or pytorch_model.bin",
        ),
    ] = ()
    model: Annotated[
        str | None,
        arg(
            metavar="SPEC",
            help="a model of your own: torchvision:NAME, timm:NAME or MODULE:FACTORY, a function "
            "in a Python module; with options as in "
            "timm:vit_tiny_patch16_224?img_size=32&patch_size=4",
        ),
    ] = None
    dataset: Annotated[
        str | None,
        arg(
            metavar="DATA",
            help="that the model of --model was trained on: digits, cifar10, cifar100, an HDF5 "
            "file, or a folder with train/CLASS/*.png and test/CLASS/*.png (or val/)",
        ),
    ] = None
    image_size: Annotated[
        int | None,
        arg(
            metavar="N",
            help="cut the centre of N x N pixels out of images of a folder, the shorter side "
            "resized to N / 0.875 (bilinear), or as timm's pretrained_cfg of the model says",
        ),
    ] = None
    mean: Annotated[
        tuple[float, ...],
        arg(
            metavar="M [M ...]",
            help="that the model of --model wants images normalised by, of each channel or of all, "
            "pixels from 0 to 1; default: as timm's pretrained_cfg of the model says, or that of "
            "the training images",
        ),
    ] = ()
    std: Annotated[
        tuple[float, ...], arg(metavar="S [S ...]", help="likewise; goes with --mean")
    ] = ()
    device: Device = "auto"
    data_root: DataRoot = None
    out: Out = Path("figures")
    force: Force = False

    def open(self) -> list[Provenance]:
        """What the checkpoints that ``--ckpt`` names say of themselves.

        Raises `InputError` if a checkpoint is unusable or there is none, or if results could not be
        written beside them or figures to the folder `out`: better now than after hours.
        """
        from analysis.measurements.files import load, measurement_file

        paths = self.ckpt
        if not paths and self.model:
            raise InputError("ckpt: none given, expected the weights of --model")
        paths = paths or tuple(sorted(Path().glob(DEFAULT_CHECKPOINTS)))
        if not paths:
            raise InputError(f"ckpt: there is no {DEFAULT_CHECKPOINTS} here, name a checkpoint")
        checkpoints = self.describe(dict.fromkeys(paths))
        require_writable("out", self.out)
        for checkpoint in checkpoints:
            assert checkpoint.path is not None
            require_writable("ckpt", checkpoint.path.parent)
            load(measurement_file(checkpoint.path), "history")  # a damaged file is found now
        if self.model:
            print(self.preparation(checkpoints[0]))
        return list(checkpoints)

    def describe(self, paths: Iterable[Path]) -> Sequence[Provenance]:
        """What checkpoints say of themselves; weights of the model of ``--model``, loaded."""
        from models.provenance import read_provenance

        if self.model is None:
            for option in ("dataset", "preset", "weight_decay", "image_size", "mean", "std"):
                if getattr(self, option, None) not in (None, ()):
                    raise InputError(
                        f"{option.replace('_', '-')}: {getattr(self, option)} found, but a "
                        "checkpoint says what it was trained on; expected --model, too"
                    )
            return [read_provenance(path) for path in paths]
        if self.dataset is None:
            raise InputError("dataset: none given, expected what --model was trained on")

        from models.data.arrays import form
        from models.data.preparation import prepared
        from models.foreign import load_foreign

        dataset = prepared(self.dataset, self.image_size, self.mean, self.std)
        classes, channels = form(dataset, data_root=self.data_root)
        load = partial(
            load_foreign,
            model=self.model,
            dataset=dataset,
            classes=classes,
            channels=channels,
            recipe=self.recipe(),
        )
        return [load(path) for path in paths]

    def load(self, known: Provenance) -> Checkpoint:
        """A checkpoint with its weights, from the file that has been described."""
        from models.checkpoint import Checkpoint, load_checkpoint

        if isinstance(known, Checkpoint):
            return known
        assert known.path is not None
        checkpoint = load_checkpoint(known.path)
        if checkpoint.sha256 != known.sha256:
            raise InputError(f"{known.path}: changed while it was read, expected it to stay")
        return checkpoint

    def preparation(self, checkpoint: Provenance) -> str:
        """In words, how images are brought to the model of ``--model``, and who says so."""
        from models.data.datasets import load_dataset
        from models.data.preparation import parse, prepared

        assert self.dataset is not None
        images = load_dataset(checkpoint.dataset, "test", data_root=self.data_root)
        mean, std = (" ".join(f"{n:.4g}" for n in s.tolist()) for s in (images.mean, images.std))
        _, asked = parse(prepared(self.dataset, self.image_size, self.mean, self.std))
        _, used = parse(checkpoint.dataset)
        if asked.mean is not None:
            source = "as given"
        elif used.mean is not None:
            source = "as timm's pretrained_cfg of the model says"
        else:
            source = "those of the training images; --mean and --std name the model's own"
        size = f"{used.resizing()}; " if used.image_size else ""
        return f"images of {images.name}: {size}normalised by mean {mean}, std {std}, {source}"

    def require(self, **least: int) -> None:
        """Raise `InputError` if one of the named options is out of range.

        What is given for a name is its least value; the largest is `MOST`, of the seed 2^63 - 1.
        """
        for name, bound in least.items():
            value, most = getattr(self, name), 2**63 - 1 if name == "seed" else MOST
            if not bound <= value <= most:
                which = f"least {bound}" if value < bound else f"most {most}"
                raise InputError(f"{name.replace('_', '-')}: {value} found, expected at {which}")

    def recipe(self) -> Recipe:
        """What the training of the model of ``--model`` minimised."""
        from models.recipes import PLAIN

        return PLAIN


@dataclass(frozen=True)
class MeasurementOptions(CheckpointOptions):
    """Options of a command that measures an objective."""

    objective: Annotated[
        Literal["train", "clean"],
        arg(
            help="train: what the training minimised (augmented, mixed, smoothed, NLL + L2), the "
            "model in training mode: BatchNorm normalises over each mini-batch; clean: NLL of the "
            "images as they are, in evaluation mode: BatchNorm has its running statistics",
        ),
    ] = "train"
    preset: Annotated[
        Preset | None,
        arg(
            help="augmentation, label smoothing and weight decay that the model of --model was "
            "trained with; default: none of them"
        ),
    ] = None
    weight_decay: Annotated[
        float | None,
        arg(help="that the model of --model was trained with; default: as the preset says, or 0"),
    ] = None
    split: Annotated[
        Literal["train", "test"], arg(help="the part of the dataset to measure on")
    ] = "train"
    batch_size: Annotated[int, arg(help="images in a mini-batch")] = 16
    seed: Seed = 0

    def open(self) -> list[Provenance]:
        """As above, and say what is measured of those without a recipe."""
        checkpoints = super().open()
        if self.model and not self.preset and self.objective == "train":
            print(
                f"measuring NLL without augmentation, weight decay {self.weight_decay or 0:g}: if "
                "that is not what was trained on, name it by --preset and --weight-decay; the "
                "landscape is another one"
            )
        return checkpoints

    def recipe(self) -> Recipe:
        """What the training of the model of ``--model`` minimised."""
        from models import recipes

        recipe = recipes.PRESETS[self.preset].recipe if self.preset else recipes.PLAIN
        if self.weight_decay is None:
            return recipe
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight-decay: {self.weight_decay} found, expected 0 or more")
        return replace(recipe, weight_decay=self.weight_decay)

    def group(self, measurement: str) -> str:
        """Where in the HDF5 file a measurement of this objective belongs."""
        name = f"{measurement}/{self.objective}"
        return name if self.split == "train" else f"{name}_{self.split}"

    def fingerprints(self, checkpoint: Provenance) -> dict[str, str]:
        """Of the images that a checkpoint is measured on, as they are now, if they are there."""
        from models.data.arrays import fingerprints

        images = checkpoint.images if self.split == "train" else None
        return fingerprints(checkpoint.dataset, {self.split: images}, data_root=self.data_root)

    def build(self, checkpoint: Checkpoint, batches: int) -> Objective:
        """The objective of a checkpoint on `batches` mini-batches of its dataset."""
        from analysis.objective import build_objective
        from lossgeometry.running.devices import choose_device
        from models.data.datasets import load_dataset

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


def require_writable(option: str, folder: Path) -> None:
    """Raise `InputError` if `folder` neither is nor can be made a folder to write to."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{option}: {existing} found, expected a folder that can be written to")
