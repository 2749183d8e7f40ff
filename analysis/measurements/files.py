"""Measurements: one HDF5 file beside each checkpoint, one group a measurement, written whole.

A group holds the arrays of one measurement; its attributes say how it was made: the options and the
seed, the versions, the checkpoint it belongs to and that file's hash, and the date. This module
needs no PyTorch, so that figures can be drawn where there is none.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import h5py
import numpy as np

from analysis.measurements.schema import Found, LackingError, Measurement, require_usable
from lossgeometry.errors import InputError, shown
from models.files import locked, patiently, replacing
from models.reading.hdf5 import opened

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint

Result = TypeVar("Result")


def measurement_file(checkpoint: Path) -> Path:
    """``NAME.h5`` beside ``NAME.pt``; of other files ``NAME.safetensors.h5`` and so on."""
    name = checkpoint.stem if checkpoint.suffix == ".pt" else checkpoint.name
    return checkpoint.with_name(f"{name}.h5")


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a measurement remembers of the checkpoint it was made of."""
    return {
        "architecture": checkpoint.architecture,
        "recipe": checkpoint.recipe.options(),
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
    data: Mapping[str, str] | None = None,
    in_place_of: str | None = None,
) -> Measurement:
    """Write a measurement of a loaded `checkpoint` to its file, in place of one of the same name.

    `data` are the fingerprints of the splits of the dataset that it was made on. The saved progress
    that it completes, if any, is named by `in_place_of` and goes. Other groups stay as they are. A
    changed copy of the file is brought to disk and renamed, under a lock: the file is never
    half-written, whatever happens.

    Raises
    ------
    InputError
        If the file is there and is damaged: it is left as it is.
    OSError
        If it cannot be written.
    """
    from models.checkpoint import versions

    assert checkpoint.path is not None, "a checkpoint is saved before it is measured"
    path = measurement_file(checkpoint.path)
    attributes = {
        "options": json.dumps(dict(options), sort_keys=True),
        "checkpoint": json.dumps(describe(checkpoint), sort_keys=True),
        "versions": json.dumps(versions()),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "data": json.dumps(dict(data or {}), sort_keys=True),
    }
    with locked(path):
        # Composed in memory, for a full disk leaves HDF5 in a state that it does not recover from;
        # and of what stays, for a file would keep the room of all that was ever deleted.
        with h5py.File("new", "w", driver="core", backing_store=False) as new:
            if path.exists():
                _copy_all_but((name, in_place_of), path, new)
            group = new.create_group(name)
            for key, array in arrays.items():
                large = np.size(array) > 1000
                group.create_dataset(key, data=array, compression="gzip" if large else None)
            group.attrs.update(attributes)
            new.flush()
            content = new.id.get_file_image()
        with replacing(path) as partial:
            partial.write_bytes(content)
        measurement = load(path, name)
    assert measurement is not None
    return measurement


def _copy_all_but(left_out: Collection[str | None], path: Path, new: h5py.File) -> None:
    def copy(source: h5py.Group, target: h5py.Group) -> None:
        target.attrs.update(source.attrs)
        for key, item in source.items():
            name = item.name.removeprefix("/")
            if any(other and other.startswith(f"{name}/") for other in left_out):
                copy(item, target.create_group(key))
            elif name not in left_out:
                source.copy(item, target, key)

    try:
        with _opened(path) as file:
            copy(file, new)
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


_EXPECTED = "expected one of analysis; it is left as it is: move it away, and measure again"


def _opened(path: Path) -> h5py.File:
    """An HDF5 file to read from, once no other program has it open for writing."""
    return patiently(lambda: h5py.File(path), BlockingIOError, path)


def _damaged(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(
        f"{path}: not a usable measurement file ({reason}); it is left as it is: move it away, and "
        "measure again"
    )


def load(path: Path, name: str) -> Measurement | None:
    """Read the measurement `name` of an HDF5 file; None if the file does not hold it.

    Raises
    ------
    InputError
        If the file is not a measurement file.
    """
    if not path.exists():
        return None
    with opened(path, _EXPECTED) as file:
        group = file.find(name)
        if group is None:
            return None
        attributes = {
            key: _dictionary(key, file.text(key, group))
            for key in ("options", "checkpoint", "versions")
        }
        found = Measurement(
            path=path,
            name=name,
            arrays=Found(path, name, file.arrays(group)),
            **{key: Found(path, name, value) for key, value in attributes.items()},
            date=file.text("date", group),
            data=_dictionary("data", file.text("data", group, default="{}")),
        )
        require_usable(found)
        return found


def _dictionary(key: str, text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"{key}: {shown(found)} found, expected a dictionary")
    return found


def stored(
    name: str,
    *,
    checkpoint: Checkpoint,
    options: Mapping[str, Any],
    data: Callable[[], Mapping[str, str]] | None = None,
    at_least: Collection[str] = (),
) -> Measurement | None:
    """The measurement of exactly this checkpoint with exactly these options, if there is one.

    Of the options `at_least`, numbers or flags, it may have more.
    `data` gives the fingerprints of the splits of the dataset as it is now, as far as it is there.
    If the measurement was made on others, that is printed, and it does not count.
    """
    assert checkpoint.path is not None, "a checkpoint is saved before it is measured"
    path, older = measurement_file(checkpoint.path), checkpoint.path.with_suffix(".h5")
    found = load(path, name)
    if found is None and path != older:  # all files of a name had one measurement file once
        found = load(older, name)
    if found is None or found.checkpoint != json.loads(json.dumps(describe(checkpoint))):
        return None
    if not fits(found.options, json.loads(json.dumps(dict(options))), at_least):
        return None
    if data is not None and not same_data(found, data):
        print(f"{found.path}:/{name} is of other images: {checkpoint.dataset} has changed since")
        return None
    return found


def fits(
    found: Mapping[str, Any], asked: Mapping[str, Any], at_least: Collection[str] = ()
) -> bool:
    """Whether a measurement with the options `found` is what is `asked` for, or more of it."""
    more = {key: found[key] for key in at_least if found.get(key, -1) > asked[key]}
    return found == {**asked, **more}


def same_data(found: Measurement, data: Callable[[], Mapping[str, str]]) -> bool:
    """Whether a measurement was made on the images that `data` tells the fingerprints of.

    What is not known, of old measurements or because the dataset is not there, counts as the same.
    """
    now = data() if found.data else {}
    return all(now.get(split, known) == known for split, known in found.data.items())


def collect(
    folders_and_files: Iterable[Path], name: str, left_out: list[InputError] | None = None
) -> list[Measurement]:
    """Every measurement `name` in the given HDF5 files and, recursively, folders.

    Each file counts once, however often it is named. What is wrong with those that cannot be used
    is added to `left_out`; without it, it is raised.

    Raises
    ------
    InputError
        If a file is damaged, and there is no `left_out`.
    """
    paths: dict[Path, Path] = {}
    for place in folders_and_files:
        for path in sorted(place.rglob("*.h5")) if place.is_dir() else [place]:
            paths.setdefault(path.resolve(), path)
    found = []
    for path in paths.values():
        try:
            found.append(load(path, name))
        except InputError as error:
            _leave_out(error, left_out)
    return [measurement for measurement in found if measurement]


def sparing(
    work: Callable[[list[Measurement]], Result],
    measurements: Iterable[Measurement],
    left_out: list[InputError] | None = None,
) -> Result:
    """Result of `work` on the measurements but for those that lack what it needs of them.

    What they lack is added to `left_out`; without it, it is raised.
    """
    remaining = list(measurements)
    while True:
        try:
            return work(remaining)
        except LackingError as error:
            kept = [m for m in remaining if m.path != error.path]
            if len(kept) == len(remaining):
                raise
            _leave_out(error, left_out)
            remaining = kept


def _leave_out(error: InputError, left_out: list[InputError] | None) -> None:
    if left_out is None:
        raise error
    if str(error) not in map(str, left_out):
        left_out.append(error)
