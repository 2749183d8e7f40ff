"""Measurements: one HDF5 file beside each checkpoint, one group a measurement, written whole.

A group holds the arrays of one measurement; its attributes say how it was made: the options and the
seed, the versions, the checkpoint it belongs to and that file's hash, and the date. This module
needs no PyTorch, so that figures can be drawn where there is none.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from filelock import FileLock

from models.errors import InputError
from models.files import replacing

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Measurement:
    """One group of a measurement file."""

    path: Path  # of the HDF5 file
    name: str  # of the group
    arrays: dict[str, np.ndarray]
    options: dict[str, Any]  # that decide the result
    checkpoint: dict[str, Any]  # architecture, recipe, dataset, images, epoch, seed, sha256
    versions: dict[str, str]
    date: str  # ISO 8601, UTC


def measurement_file(checkpoint: Path) -> Path:
    """``NAME.h5`` beside ``NAME.pt``."""
    return checkpoint.with_suffix(".h5")


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a measurement remembers of the checkpoint it was made of."""
    return {
        "architecture": checkpoint.architecture,
        "recipe": dataclasses.asdict(checkpoint.recipe),
        "dataset": checkpoint.dataset,
        "images": checkpoint.images,
        "epoch": checkpoint.epoch,
        "seed": checkpoint.seed,
        "sha256": checkpoint.sha256,
    }


def store(
    name: str,
    arrays: Mapping[str, np.ndarray],
    *,
    checkpoint: Checkpoint,
    options: Mapping[str, Any],
    in_place_of: str | None = None,
) -> Measurement:
    """Write a measurement of a loaded `checkpoint` to its file, in place of one of the same name.

    The saved progress that it completes, if any, is named by `in_place_of` and goes. Other groups
    stay as they are. A copy of the file is changed, brought to disk and renamed,
    under a lock: the file is never half-written, whatever happens.
    """
    from models.checkpoint import versions

    assert checkpoint.path is not None, "a checkpoint is saved before it is measured"
    path = measurement_file(checkpoint.path)
    attributes = {
        "options": json.dumps(dict(options), sort_keys=True),
        "checkpoint": json.dumps(describe(checkpoint), sort_keys=True),
        "versions": json.dumps(versions()),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    with FileLock(path.with_name(f".{path.name}.lock")), replacing(path) as partial:
        if path.exists():
            shutil.copyfile(path, partial)
        else:
            partial.unlink()
        try:
            with h5py.File(partial, "a") as file:
                for old in filter(None, (name, in_place_of)):
                    if old in file:
                        del file[old]
                group = file.create_group(name)
                for key, array in arrays.items():
                    large = np.size(array) > 1000
                    group.create_dataset(key, data=array, compression="gzip" if large else None)
                group.attrs.update(attributes)
        except OSError as error:
            raise InputError(f"{path}: not a usable HDF5 file ({error})") from error
    measurement = load(path, name)
    assert measurement is not None
    return measurement


def load(path: Path, name: str) -> Measurement | None:
    """Read the measurement `name` of an HDF5 file; None if the file does not hold it.

    Raises
    ------
    InputError
        If the file is not a measurement file.
    """
    if not path.exists():
        return None
    try:
        with h5py.File(path) as file:
            group = file.get(name)
            if group is None:
                return None
            arrays: dict[str, np.ndarray] = {}
            group.visititems(
                lambda key, item: (
                    arrays.__setitem__(key, item[()]) if isinstance(item, h5py.Dataset) else None
                )
            )
            attributes = {key: group.attrs[key] for key in ("options", "checkpoint", "versions")}
            return Measurement(
                path=path,
                name=name,
                arrays=arrays,
                **{key: json.loads(text) for key, text in attributes.items()},
                date=str(group.attrs["date"]),
            )
    except (OSError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: not a usable measurement file ({error})") from error


def stored(name: str, *, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Measurement | None:
    """The measurement of exactly this checkpoint with exactly these options, if there is one."""
    assert checkpoint.path is not None, "a checkpoint is saved before it is measured"
    found = load(measurement_file(checkpoint.path), name)
    if found is None or found.checkpoint["sha256"] != checkpoint.sha256:
        return None
    return found if found.options == json.loads(json.dumps(dict(options))) else None


def collect(folders_and_files: Iterable[Path], name: str) -> list[Measurement]:
    """Every measurement `name` in the given HDF5 files and, recursively, folders.

    Each file counts once, however often it is named.
    """
    paths: dict[Path, Path] = {}
    for place in folders_and_files:
        for path in sorted(place.rglob("*.h5")) if place.is_dir() else [place]:
            paths.setdefault(path.resolve(), path)
    found = (load(path, name) for path in paths.values())
    return [measurement for measurement in found if measurement]
