"""Measurements: one HDF5 file beside each checkpoint, one group a measurement, written whole.

A group holds the arrays of one measurement; its attributes say how it was made: the options and the
seed, the versions, the checkpoint it belongs to and that file's hash, and the date. This module
only reads and needs no PyTorch, so that figures can be drawn where there is none.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from analysis.measurements.schema import (
    Found,
    LackingError,
    Measurement,
    renamed,
    require_usable,
)
from lossgeometry.errors import InputError, shown
from lossgeometry.layout import FORMAT
from models.reading.hdf5 import HostileFile, opened

Result = TypeVar("Result")


def measurement_file(checkpoint: Path) -> Path:
    """``NAME.h5`` beside ``NAME.pt``; of other files ``NAME.safetensors.h5`` and so on."""
    name = checkpoint.stem if checkpoint.suffix == ".pt" else checkpoint.name
    return checkpoint.with_name(f"{name}.h5")


_EXPECTED = "expected one of analysis; it is left as it is: move it away, and measure again"


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
        return _read(file, path, name)


def _read(file: HostileFile, path: Path, name: str) -> Measurement | None:
    group = file.find(name)
    if group is None:
        return None
    attributes = {
        key: _dictionary(key, file.text(key, group))
        for key in ("options", "checkpoint", "versions")
    }
    arrays, form = file.arrays(group), file.text("format", group, default="")
    if form not in (FORMAT, ""):
        raise InputError(f"{path}:/{name}: {shown(form)} found, expected {FORMAT!r}")
    found = Measurement(
        path=path,
        name=name,
        arrays=Found(path, name, arrays if form else renamed(arrays)),
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

    See `collect_each`.
    """
    return collect_each(folders_and_files, [name], left_out)[name]


def collect_each(
    folders_and_files: Iterable[Path],
    names: Iterable[str],
    left_out: list[InputError] | None = None,
) -> dict[str, list[Measurement]]:
    """By each of `names` the measurements in the given HDF5 files and, recursively, folders.

    Each file is read once, however often it is named. What is of other weights than the checkpoint
    beside it is left out, and said to be. What is wrong with those that cannot be used
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
    found: dict[str, list[Measurement]] = {name: [] for name in names}
    for path in filter(Path.exists, paths.values()):
        for measurement in _usable(path, list(found), left_out):
            if weights := _other_weights(measurement):
                what = f"{path}:/{measurement.name}"
                print(f"{what} is left out: of other weights than {weights}", file=sys.stderr)
            else:
                found[measurement.name].append(measurement)
    return found


def _usable(
    path: Path, names: Sequence[str], left_out: list[InputError] | None
) -> list[Measurement]:
    """Those of the measurements `names` that a file holds, but for damaged ones."""
    try:
        with opened(path, _EXPECTED) as file:
            return [m for name in names if (m := _read(file, path, name))]
    except InputError as error:
        if len(names) > 1:
            return [m for name in names for m in _usable(path, [name], left_out)]
        _leave_out(error, left_out)
        return []


def _other_weights(measurement: Measurement) -> Path | None:
    """The checkpoint beside a measurement, if it is there and is not what was measured."""
    own = measurement.path.with_suffix("")
    weights = own if own.suffix else own.with_suffix(".pt")
    if not weights.is_file():
        return None
    state = weights.stat()
    now = _sha256(weights.resolve(), state.st_ino, state.st_size, state.st_mtime_ns)
    return weights if now != measurement.checkpoint.get("sha256") else None


@cache
def _sha256(path: Path, *_: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
