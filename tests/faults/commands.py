"""The commands that faults are injected into, and the small folder they work in."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from models import load_dataset
from models.train import Options, untrained

CKPT = ("--ckpt", "checkpoints/csan3.pt")
TINY = ("--dim", "6", "--depth", "1", "--epochs", "7", "--images", "40", "--dataset", "data.h5")
HESSIAN = ("--k=1", "--batches=3", "--batch-size=4", "--density-batches=1", "--steps=2")
LANDSCAPE = ("--batches=1", "--batch-size=8", "--points=3", "--line-points=5", "--lines=1")
STUDY = """
folder = "checkpoints"
figures = "figures"
[train]
dataset = "data.h5"
preset = "digits"
dim = 6
depth = 1
epochs = 6
images = 40
[[grid]]
window = [3, 8]
out = "checkpoints/study{window}.pt"
[[measure]]
command = "nll"
[[measure]]
command = "robustness"
images = 4
"""
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train": ("models.train", ("--out", "checkpoints/new.pt", "--preset", "digits", *TINY)),
    "hessian": ("analysis.hessian", (*CKPT, *HESSIAN)),
    "landscape": ("analysis.landscape", (*CKPT, *LANDSCAPE)),
    "robustness": ("analysis.robustness", (*CKPT, "--images", "8")),
    "nll": ("analysis.nll", CKPT),
    "study": ("analysis.study", ("study.toml",)),
}
WARM = (  # imported before the processes are forked, for it takes longer than what they do
    *(name for name, _ in COMMANDS.values()),
    *("analysis.claims", "analysis.figures", "analysis.corrupted", "analysis.execution"),
    *("analysis.spectra", "analysis.sections", "analysis.tables.hessians"),
    *("analysis.tables.landscapes", "analysis.tables.claims", "lossgeometry.algorithms.spectrum"),
    *(f"analysis.drawing.{name}" for name in ("claims", "hessians", "landscapes", "nll")),
    *("analysis.drawing.robustness", "models.data.corruptions", "matplotlib.backends.backend_agg"),
)
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def write_dataset(path: Path, seed: int = 0) -> None:
    """Some digits; `seed` decides their order."""
    order = np.random.default_rng(seed).permutation(300)
    digits = load_dataset("digits")
    with h5py.File(path, "w") as file:
        for split, part in (("train", order[:48]), ("test", order[48:72])):
            file[f"{split}/images"] = digits.images.numpy()[part]
            file[f"{split}/labels"] = digits.labels.numpy()[part]
        file.attrs["classes"] = [str(i) for i in range(10)]


def make_template(folder: Path) -> None:
    """What every scene begins with: a dataset, a study, and a checkpoint to measure."""
    write_dataset(folder / "data.h5")
    (folder / "study.toml").write_text(STUDY)
    options = Options(out=Path("csan3.pt"), window=3, dim=6, depth=1, preset="digits")
    dataset = load_dataset(folder / "data.h5")
    start = replace(untrained(options, dataset), dataset="data.h5")
    names = ("train_nll", "train_error", "test_nll", "test_error")
    start.history.update(epoch=[0.0], **{name: [0.5] for name in names})
    replace(start, epoch=start.recipe.epochs).save(folder / "checkpoints/csan3.pt")
