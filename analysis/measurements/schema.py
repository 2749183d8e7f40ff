"""A measurement, and what figures, tables and claims rely on in it, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lossgeometry.errors import InputError
from models.description import PYRAMIDS, SCORES, require, require_description, require_integer

LARGEST = 1e100  # of a finite value: more cannot be drawn
_KINDS = {"float": "fiu", "bool": "b", "text": "S", "bytes": "u"}
_METRICS = ("nll", "error")
_LINE = {"xs": "float m", "nll": "float m", "error": "float m", "done": "bool m"}
_SURFACE = {
    **{"xs": "float columns", "ys": "float rows", "attributes": "bytes length"},
    **dict.fromkeys(_METRICS, "float rows columns"),
    "done": "bool rows columns",
}
# The type of each array and what its axes are: numbers, or names of equal lengths.
_ARRAYS: dict[str, dict[str, str]] = {
    "history": dict.fromkeys(("epoch", *SCORES), "float epochs"),
    "outcomes": {
        f"{split}/{key}": f"{kind} {split}"
        for split in ("train", "test")
        for key, kind in (("nll", "float"), ("correct", "bool"))
    },
    "objective": dict.fromkeys(("nll", "error"), "float"),
    "robustness": {
        **{"error": "float 15 5", "corruptions": "text 15", "image_error": "float images"},
        **{"clean_error": "float", "mean_corruption_error": "float"},
    },
    "hessian": {
        **dict.fromkeys(("eigenvalues", "residuals", "errors"), "float batches k"),
        "converged": "bool batches k",
        **{f"density/{name}": "float n" for name in ("grid", "density")},
        **{f"density/{name}_error": "float n" for name in ("standard", "systematic")},
        "density/bandwidth": "float",
        **{"layers/names": "text layers", "layers/eigenvalues": "float layers top"},
        "layers/converged": "bool layers top",
        **dict.fromkeys(("nep", "ape", "trace"), "float"),
        **{f"{name}_standard_error": "float" for name in ("nep", "ape", "trace")},
    },
    "landscape": {
        **{"cut/extras/ts": "float ts"},
        **{f"cut/extras/{p}/{m}": "float ts" for p in ("linear", "bezier") for m in _METRICS},
        **{f"cut/extras/polar/{name}": "float snapshots" for name in ("angles", "distances")},
        "cut/extras/polar/turns": "float turns",
    },
}


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
    data: dict[str, str] = field(default_factory=dict)  # {split: fingerprint}, if it is known


class LackingError(InputError):
    """A measurement lacks what it is asked for."""

    def __init__(self, message: str, path: Path = Path()) -> None:
        super().__init__(message)
        self.path = path


class Found(dict[str, Any]):
    """What a file holds of a measurement; asking for what it lacks is a `LackingError`."""

    def __init__(self, path: Path, name: str, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self._where = path, name

    def __missing__(self, key: str) -> Any:
        path, name = self._where
        raise LackingError(
            f"{path}:/{name} has no {key}, expected it; measure again with --force", path
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Found, (*self._where, dict(self))


def require_usable(m: Measurement) -> None:
    """Raise `InputError` if a measurement lacks what the rest of the package relies on."""
    require_description(m.checkpoint)
    recipe = m.checkpoint["recipe"]
    for name in ("epochs", "warmup_epochs"):
        require_integer(name, recipe.get(name), 0, 10**6)
    unfinished = m.name.startswith("unfinished/")
    kind = m.name.removeprefix("unfinished/").partition("/")[0].partition("_")[0]
    _require_architecture(kind, m.checkpoint["architecture"])
    _require_options(kind, m.options)
    for name, array in m.arrays.items():
        if array.dtype.kind == "f":
            finite = array[np.isfinite(array)]
            largest = float(np.abs(finite).max(initial=0))
            require(largest <= LARGEST, name, largest, f"at most {LARGEST:g}")
        if array.dtype.kind == "S":
            for text in array.ravel().tolist():
                plain = text.decode(errors="replace")
                require(plain.isprintable() and "\ufffd" not in plain, name, text, "a plain text")
    if unfinished:
        return
    sizes: dict[str, int] = {}
    for name, form in _ARRAYS.get(kind, {}).items():
        _require_form(name, m.arrays.get(name), form, sizes)
    if kind == "history" and "epoch" in m.arrays:
        epochs = m.arrays["epoch"]
        require(bool((np.diff(epochs) > 0).all()), "epoch", "others", "increasing numbers")
    if kind == "landscape":
        _require_landscape(m.arrays)


def _require_architecture(kind: str, architecture: Mapping[str, Any]) -> None:
    """What labels are made of: of a network its range, of another model its spec."""
    if "model" in architecture and kind != "history":  # of others there is no history
        return
    named = "network" in architecture
    sizes: tuple[str, ...] = ("kernel_size",) if named else ("window", "head_window")
    if architecture.get("network") in PYRAMIDS:
        sizes = ()
    for name in (*sizes, "patch_size", "image_size"):
        require_integer(name, architecture.get(name), 1, 2**20)
    if "dilation" in architecture:
        require_integer("dilation", architecture["dilation"], 1, 2**20)
    patch, image = architecture["patch_size"], architecture["image_size"]
    require(image % patch == 0, "patch_size", patch, f"a divisor of {image}")
    words = ("network", *(("pooling",) if "pooling" in architecture else ()))
    for name in words if named else ("border", "pooling"):
        require(isinstance(architecture.get(name), str), name, architecture.get(name), "a word")


def _require_options(kind: str, options: Mapping[str, Any]) -> None:
    """The options that are shown or compared."""
    for name, value in options.items():
        plain = value is None or isinstance(value, bool | int | float | str | list)
        require(plain and len(repr(value)) < 1000, name, value, "a number or a text")
    if kind in ("hessian", "landscape"):
        for name, known in (("objective", ("train", "clean")), ("split", ("train", "test"))):
            require(options.get(name, known[0]) in known, name, options.get(name), f"of {known}")
    for name in ("batch_size", "batches", "k", "lines"):
        if options.get(name) is not None:
            require_integer(name, options[name], 0, 2**24)


def _require_form(name: str, array: np.ndarray | None, form: str, sizes: dict[str, int]) -> None:
    """One array is of the type and shape that `form` says; `sizes` are those found so far.

    One that is missing is complained of where it is used, see `Found`.
    """
    if array is None:
        return
    kind, *axes = form.split()
    fits = array.dtype.kind in _KINDS[kind] and array.ndim == len(axes)
    if fits:
        for axis, length in zip(axes, array.shape, strict=True):
            wanted = int(axis) if axis.isdigit() else sizes.setdefault(axis, length)
            fits = fits and length == wanted > 0
    require(fits, name, f"{array.dtype} {array.shape}", f"{form}, as long as the others")


def _require_landscape(arrays: Mapping[str, np.ndarray]) -> None:
    sizes: dict[str, int] = {}
    lines = {name.rpartition("/")[0] for name in arrays if name.startswith("lines/")}
    for part in ("line", "test_line", *lines):
        for name, form in _LINE.items():
            _require_form(f"{part}/{name}", arrays.get(f"{part}/{name}"), form, sizes)
    for name, form in _SURFACE.items():
        _require_form(f"surface/{name}", arrays.get(f"surface/{name}"), form, sizes)
    _require_form("line/l2", arrays.get("line/l2"), "float m", sizes)
    _require_form("surface/l2", arrays.get("surface/l2"), "float rows columns", sizes)
    for name in ("line/xs", "surface/xs", "surface/ys"):
        axis = arrays.get(name, np.arange(2))
        even = len(axis) > 1 and bool(np.isfinite(axis).all() and (np.diff(axis) > 0).all())
        require(even, name, axis, "increasing steps")
    marks = arrays.get("cut/marks", np.zeros((0, 2)))
    fits = marks.dtype.kind == "f" and marks.ndim == 2 and marks.shape[1] == 2
    require(fits, "cut/marks", marks, "points of the plane")
    names = _json("cut/ranges", arrays).get("names")
    plain = names is None or (
        isinstance(names, list) and len(names) == 2 and all(map(_plain, names))
    )
    require(plain, "cut/ranges", names, "names of two directions")
    how = _json("surface/attributes", arrays)
    if how.get("interpolated"):
        require_integer("evaluations", how.get("evaluations"), 0, 2**40)
        error = how.get("objective_error")
        require(isinstance(error, int | float), "objective_error", error, "a number")


def _plain(text: object) -> bool:
    return isinstance(text, str) and text.isprintable() and len(text) < 100


def _json(name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The dictionary that bytes hold."""
    array = arrays.get(name, np.frombuffer(b"{}", dtype=np.uint8))
    found: Any = json.loads(array.tobytes()) if array.dtype == np.uint8 else None
    require(isinstance(found, dict), name, found, "a dictionary")
    return found
