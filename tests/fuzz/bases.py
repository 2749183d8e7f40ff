"""Small valid files, as bytes, for mutations to start from."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import functools
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from analysis.measurements.schema import described
from lossgeometry import layout
from models.csan import CSAN
from models.provenance import FORMAT, versions
from models.recipes import Recipe
from models.resuming import identity

ARCHITECTURE: dict[str, Any] = dict(
    image_size=2, channels=1, classes=2, patch_size=1, dim=2, depth=1, heads=1, mlp_ratio=1.0
)
ARCHITECTURE |= dict(window=1, head_window=1, border="clamp", pooling="gap", stochastic_depth=0.0)
RECIPE = dict(dataclasses.asdict(Recipe(epochs=2, warmup_epochs=1, learning_rate=1e-3)))
COLUMNS = ("epoch", "train_nll", "train_error", "test_nll", "test_error")
HISTORY = {name: [0.0, 1.0, 2.0] for name in COLUMNS}
TABLE = "".join(
    f"{x},{y},1,{x * x + y * y},{1 + abs(x)},0.5\n" for x in (-1, 0, 1) for y in (-1, 0, 1)
)
STUDY = """folder = "here"
figures = "figures/small"
threads = 1

[train]
dataset = "digits"
dim = 6
depth = 1

[[grid]]
window = [3, 8]
seed = [0, 1]
snapshots = [5, 10]
out = "here/seed{seed}/csan{window}.pt"
measure = ["nll"]

[[measure]]
command = "nll"

[[measure]]
command = "landscape"
points = 5
span = 0.5
"""


def description() -> dict[str, Any]:
    """What a measurement remembers of its checkpoint."""
    return {
        "architecture": ARCHITECTURE,
        "recipe": RECIPE,
        "dataset": "digits",
        "images": None,
        "epoch": 2,
        "seed": 0,
        "sha256": "0" * 64,
    }


def checkpoint_content() -> dict[str, Any]:
    """What `Checkpoint.save` writes."""
    torch.manual_seed(0)
    return {
        "format": FORMAT,
        **{k: v for k, v in description().items() if k != "sha256"},
        "history": HISTORY,
        "versions": versions(),
        "state_dict": dict(CSAN(**ARCHITECTURE).state_dict()),
    }


def resume_content(start: Any) -> dict[str, Any]:
    """What a training saves to go on from."""
    count = sum(p.numel() for p in start.model.parameters())
    return {
        "run": identity(start),
        "data": [],
        "epoch": 1,
        "history": HISTORY,
        "step": torch.ones(()),
        **{name: torch.rand(count) for name in ("weights", "exp_avg", "exp_avg_sq")},
    }


def foreign_contents() -> list[object]:
    """What other frameworks save: weights beside objects of many classes, or a whole module."""
    torch.manual_seed(0)
    layer = torch.nn.BatchNorm2d(2)
    beside = {
        "args": argparse.Namespace(out=Path("x"), date=datetime.date(2020, 1, 1), rate=0.1),
        "counts": [collections.defaultdict(list, {"a": [1]}), collections.deque([1, 2]), {1}],
        "numbers": [np.float64(1.5), np.arange(3), 2**80, 1j, b"bytes"],
        "functions": [functools.partial(int, base=2), torch.nn.functional.relu, torch.float16],
        "keys": {(1, 2): 3, None: 4, 1.5: 5},
    }
    return [{"state_dict": layer.state_dict(), **beside}, {"model": torch.nn.Sequential(layer)}]


def saved(content: object) -> bytes:
    """As `torch.save` writes it."""
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def measurement_arrays() -> dict[str, dict[str, Any]]:
    """The arrays of one measurement of each kind, by group."""
    rng = np.random.default_rng(0)
    line = {"xs": np.linspace(-1, 1, 5), "nll": rng.random(5) + 1, "error": rng.random(5)}
    line |= {"l2": rng.random(5), "evaluated": np.ones(5, dtype=bool)}
    line |= {"settings": _text({"seed": 0})}
    grid = {name: rng.random((3, 3)) for name in ("nll", "error", "l2")}
    grid |= {"xs": np.linspace(-1, 1, 3), "ys": np.linspace(-1, 1, 3)}
    grid |= {"evaluated": np.ones((3, 3), dtype=bool), "settings": _text({"interpolated": False})}
    parts = {"line": line, "test_line": line, "lines/0": line, "lines/1": line, "surface": grid}
    landscape = {f"{part}/{k}": v for part, arrays in parts.items() for k, v in arrays.items()}
    landscape |= {"cut/points": np.zeros((0, 2)), "cut/names": np.array([b"random 1", b"random 2"])}
    landscape |= {"cut/directions": np.zeros((2, 7), np.float32)}
    hessian = {key: np.float64(0.5) for key in ("nep", "ape", "trace")}
    hessian |= {f"{key}_standard_error": np.float64(0.1) for key in hessian}
    hessian |= {"eigenvalues": rng.normal(size=(4, 2)), "residuals": rng.random((4, 2))}
    hessian |= {"converged": np.ones((4, 2), dtype=bool), "matvecs": np.arange(4)}
    hessian |= {f"density/{k}": rng.random(6) for k in ("grid", "density", "standard_error")}
    outcomes = {f"{split}/nll": rng.random(8) for split in ("train", "test")}
    outcomes |= {f"{split}/correct": rng.random(8) > 0.5 for split in ("train", "test")}
    robustness = {"error": rng.random((15, 5)), "nll": rng.random((15, 5)), "clean_error": 0.1}
    robustness |= {"mean_corruption_error": 0.2, "image_error": rng.random(8), "clean_nll": 0.3}
    robustness |= {"corruptions": np.array([f"c{i}" for i in range(15)], dtype=bytes)}
    return {
        "history": {name: np.array(values) for name, values in HISTORY.items()},
        "outcomes": outcomes,
        "objective": {"nll": 1.5, "error": 0.5},
        "robustness": robustness,
        "hessian/train": hessian,
        "landscape/train": landscape,
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "history": {},
    "outcomes": {},
    "objective": {},
    "robustness": {"images": 8, "seed": 0, "source": "generated"},
    "hessian/train": {"objective": "train", "split": "train", "batch_size": 16},
    "landscape/train": {"objective": "train", "split": "train", "batch_size": 16},
}
OPTIONS["hessian/train"] |= {"k": 2, "batches": 4}
OPTIONS["landscape/train"] |= {"lines": 2, "directions": "random"}


def _text(value: object) -> np.ndarray:
    return np.array(json.dumps(value).encode())


def measurement_file(
    libver: str = "earliest", groups: Iterable[str] = OPTIONS, **changes: Any
) -> bytes:
    """A measurement file; `changes` are of what it remembers of its checkpoint."""
    with h5py.File("base", "w", driver="core", backing_store=False, libver=libver) as file:
        for name in groups:
            arrays, group = measurement_arrays()[name], file.create_group(name)
            for key, array in arrays.items():
                large = np.size(array) > 70
                group.create_dataset(key, data=array, compression="gzip" if large else None)
            layout.label(group, described(name)[1])
            group.attrs["format"] = layout.FORMAT
            group.attrs["options"] = json.dumps(OPTIONS[name])
            group.attrs["checkpoint"] = json.dumps(description() | changes)
            group.attrs["versions"] = json.dumps(versions())
            group.attrs["date"] = "2026-01-01T00:00:00+00:00"
        file.flush()
        return file.id.get_file_image()


def dataset_file(libver: str = "earliest") -> bytes:
    """A dataset file."""
    rng = np.random.default_rng(0)
    with h5py.File("base", "w", driver="core", backing_store=False, libver=libver) as file:
        file.attrs.update(name="small", classes=["a", "b", "c"])
        for split in ("train", "test"):
            images = rng.integers(0, 256, (6, 2, 2, 1), dtype=np.uint8)
            file.create_dataset(
                f"{split}/images", data=images, chunks=(3, 2, 2, 1), compression="gzip"
            )
            file.create_dataset(f"{split}/labels", data=np.arange(6, dtype=np.uint8) % 3)
        file.flush()
        return file.id.get_file_image()


def write_measurements(folder: Path) -> None:
    """Files of three windows, enough for every figure and claim."""
    for window in (3, 5):
        architecture = ARCHITECTURE | {"window": window}
        (folder / f"csan{window}.h5").write_bytes(measurement_file(architecture=architecture))
