"""A measurement, and what figures, tables and claims rely on in it, whoever wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lossgeometry.errors import InputError
from lossgeometry.layout import LINE, PARAMETERS, RESULTS, SURFACE, Form, Forms, require_forms
from lossgeometry.running.saving import below
from models.description import PYRAMIDS, require, require_description, require_integer

LARGEST = 1e100  # of a finite value: more cannot be drawn


def _scores(axes: str, where: str = "") -> dict[str, Form]:
    return {
        "nll": Form(f"float {axes}".strip(), f"negative log-likelihood{where}", "nats"),
        "error": Form(f"float {axes}".strip(), f"share of images misclassified{where}", "fraction"),
    }


_MEAN = ", the mean over images"
_SPECTRUM, _DENSITY = RESULTS["MaxEigenvalueSpectrum"], RESULTS["SpectralDensity"]
_LINE, _SURFACE = (_scores("xs", _MEAN) | LINE, _scores("ys xs", _MEAN) | SURFACE)
_CURVATURE = _SPECTRUM["eigenvalues"].units

# What each kind of measurement is, and the forms of its arrays.
MEASUREMENTS: dict[str, tuple[str, Forms]] = {
    "history": (
        "The training, epoch by epoch.",
        {
            "epoch": Form("float epoch", "epochs of training"),
            "objective": Form("float epoch", "mean NLL during the epoch, penalty at its end"),
            "learning_rate": Form("float epoch", "learning rate of the last step"),
            "seconds": Form("float epoch", "duration of the last epoch", "s"),
            **{
                f"{split}_{score}": form
                for split in ("train", "test")
                for score, form in _scores("epoch", f", of the {split} images").items()
            },
        },
    ),
    "outcomes": (
        "What becomes of every clean image.",
        {
            f"{split}/{name}": form
            for split in ("train", "test")
            for name, form in (
                ("nll", Form("float image", f"of each {split} image", "nats")),
                ("correct", Form("bool image", "whether it is classified correctly")),
            )
        },
    ),
    "objective": (
        "What training sees at the weights: augmented images, the model in training mode.",
        _scores("", _MEAN),
    ),
    "robustness": (
        "Errors on corrupted images.",
        {
            "corruptions": Form("text corruptions=15", "names of the corruptions"),
            **_scores("corruptions=15 severity=5", " on corrupted images"),
            "image_error": Form("float image", "share of the 75 that mislead", "fraction"),
            "wrong": Form("int image corruptions=15", "severities, of 5, that mislead"),
            "clean_nll": Form("float", "negative log-likelihood of clean images", "nats"),
            "clean_error": Form("float", "share of clean images misclassified", "fraction"),
            "mean_corruption_error": Form("float", "mean of the errors", "fraction"),
        },
    ),
    "hessian": (
        "Eigenvalues of the Hessian: of mini-batches, and of several of them as one.",
        {
            **_SPECTRUM,
            **below("density", _DENSITY),
            "trace": Form("float", "trace of the Hessian", _CURVATURE),
            "trace_standard_error": Form("float", "of the trace, by chance", _CURVATURE),
            "layers/names": Form("text names", "names of the layers"),
            "layers/eigenvalues": Form(
                "float names top", "of the block of each layer, largest magnitude first", _CURVATURE
            ),
            "layers/converged": Form("bool names top", _SPECTRUM["converged"].description),
            "check/symmetry": Form("float", "|(H - H^T) v| / |H v|, estimated"),
            "check/finite_difference": Form("float", "|H v - finite difference| / |H v|"),
            "check/tolerance": Form("float", "of both"),
            "check/smooth": Form("bool", "whether finite differences tend to a derivative"),
        },
    ),
    "landscape": (
        "The loss along lines and on a surface through the weights.",
        {
            **below("line", _LINE),
            **below("test_line", _LINE),
            **below("lines/*", _LINE),
            **below("surface", _SURFACE),
            "cut/directions": Form("float direction=2 parameter", "the directions of the surface"),
            "cut/parameters": PARAMETERS,
            "cut/names": Form("text direction=2", "names of the directions"),
            "cut/low": Form("float direction=2", "least step along each"),
            "cut/high": Form("float direction=2", "largest step along each"),
            "cut/points": Form("float point* direction=2", "what is marked: steps to each point"),
            "cut/extras/epochs": Form("int point*", "epochs of the marked snapshots"),
            "cut/extras/ts": Form("float ts", "places on the path to the other checkpoint"),
            **below("cut/extras/linear", _scores("ts", " on the straight path")),
            **below("cut/extras/bezier", _scores("ts", " on the curve of low loss")),
            **below("cut/extras/polar", RESULTS["PolarTrajectory"]),
            "cut/extras/explained_variance": RESULTS["Trajectory"]["explained_variance"],
            "cut/extras/eigenvalues": Form("float direction=2", "of the directions", _CURVATURE),
            "cut/extras/residuals": Form("float direction=2", "of the eigenvectors", _CURVATURE),
            "cut/extras/gradient_norm": Form("float", "length of the gradient", "loss / weight"),
            "cut/extras/fit/losses": RESULTS["Bezier"]["losses"],
        },
    ),
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
    kind = _kind(m.name)
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
    if m.name.startswith("unfinished/"):
        return
    require_forms(m.arrays, described(m.name)[1])
    if kind == "history" and "epoch" in m.arrays:
        epochs = m.arrays["epoch"]
        require(bool((np.diff(epochs) > 0).all()), "epoch", "others", "increasing numbers")
    if kind == "landscape":
        _require_landscape(m.arrays)


def _kind(name: str) -> str:
    return name.removeprefix("unfinished/").partition("/")[0].partition("_")[0]


def described(name: str) -> tuple[str, Forms]:
    """What a measurement of this name is, and the forms of its arrays."""
    return MEASUREMENTS.get(_kind(name), ("", {}))


_ON_A_LINE = re.compile(r"(?:line|test_line|lines/\w+)/(?:xs|nll|error|l2)")

# What was called otherwise before there was a format.
_NAMES = {
    **{"marks": "points", "done": "evaluated", "attributes": "settings"},
    "together": "batches_at_a_time",
}
_RENAMED = re.compile(r"together|((line|test_line|lines/\d+|surface|cut)/)(done|attributes|marks)")


def renamed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of files that were written before there was a format, as they are called now."""
    found: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        folder, slash, last = name.rpartition("/")
        if name == "cut/ranges":
            ranges = json.loads(array.tobytes())
            for key, values in ranges.items():
                plain = [v.encode() if isinstance(v, str) else v for v in values]
                found[f"cut/{key}"] = np.array(plain)
        elif _RENAMED.fullmatch(name):
            text = last == "attributes"
            found[f"{folder}{slash}{_NAMES[last]}"] = np.array(array.tobytes()) if text else array
        else:
            found[name] = array
    return found


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


def _require_landscape(arrays: Mapping[str, np.ndarray]) -> None:
    lines = [array for name, array in arrays.items() if _ON_A_LINE.fullmatch(name)]
    lengths = [len(array) for array in lines]
    require(len({*lengths}) < 2, "lines", lengths, "equal lengths")
    for name in ("line/xs", "surface/xs", "surface/ys"):
        axis = arrays.get(name, np.arange(2))
        even = len(axis) > 1 and bool(np.isfinite(axis).all() and (np.diff(axis) > 0).all())
        require(even, name, axis, "increasing steps")
    for name in arrays.get("cut/names", np.zeros(0, "S")).tolist():
        require(len(name) < 100, "cut/names", name, "a name")
    how = json.loads(arrays.get("surface/settings", np.array(b"{}")).tobytes())
    require(isinstance(how, dict), "surface/settings", how, "a dictionary")
    if how.get("interpolated"):
        require_integer("evaluations", how.get("evaluations"), 0, 2**40)
        error = how.get("objective_error")
        require(isinstance(error, int | float), "objective_error", error, "a number")
