"""How results lie in HDF5 files: the name, type, axes, meaning and units of every array.

The forms below are what is written into the files, what is checked when they are read, and what
the documentation shows. Arrays of a name that has no form are stored as they are. Needs no PyTorch.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import h5py
import numpy as np

from lossgeometry.errors import InputError

FORMAT = "lossgeometry, version 2"

_KINDS = {"float": "fiu", "int": "iu", "bool": "b", "text": "S", "json": "S"}
_LOSS, _CURVATURE = "loss", "loss / weight^2"
_OPERATOR = "operator"  # those of the operator: of a Hessian the same


class Form(NamedTuple):
    """What an array is.

    `shape` is its type and its axes: "float ys xs". Axes of one name are equally long; "xy=2" is of
    length 2, "point*" may be empty, "entry?" may be missing. The coordinates along an axis are the
    array of its name, in the same group or in one around it. A "json" is a text.
    """

    shape: str
    description: str
    units: str = ""

    @property
    def axes(self) -> list[str]:
        """The names of the axes."""
        return re.findall(r" (\w+)", self.shape)


Forms = Mapping[str, Form]  # by the path in the group, in which * stands for any text


def _grid(axes: str) -> dict[str, Form]:
    return {
        "evaluated": Form(
            f"bool {axes}",
            "which points were evaluated; others are NaN, or interpolated if the settings say so",
        ),
        "settings": Form("json", "how it was measured"),
        "l2": Form(f"float {axes}", "penalty: weight decay / 2 * |weights|^2", _LOSS),
        "*": Form(f"float {axes}", "the metric of this name"),
    }


LINE: dict[str, Form] = {"xs": Form("float xs", "steps along the direction"), **_grid("xs")}
SURFACE: dict[str, Form] = {
    "xs": Form("float xs", "steps along the first direction"),
    "ys": Form("float ys", "steps along the second direction"),
    **_grid("ys xs"),
}
PARAMETERS = Form(
    "json",
    "names and shapes of the parameters, in the order in which a vector of all of them has them",
)


def _eigenvalues(axes: str, what: str, units: str) -> dict[str, Form]:
    bounds = "bounds: an eigenvalue of the operator is at most so far away"
    return {
        "eigenvalues": Form(f"float {axes}", f"eigenvalues, {what}", units),
        "residuals": Form(f"float {axes}", "norms of the residuals, |A x - lambda x|", units),
        "errors": Form(f"float {axes}", bounds, units),
        "converged": Form(f"bool {axes}", "whether the error is within the tolerance"),
    }


_ESTIMATE: Forms = {
    "estimate": Form("float entry?", "what was estimated from random vectors"),
    "standard_error": Form("float entry?", "standard error of the estimate, by chance"),
    "degrees_of_freedom": Form("float entry?", "of the standard error; infinite where it is exact"),
    "systematic_error": Form("float entry?", "error besides: of rounding, or of a quadrature"),
    "matvecs": Form("int", "products with the operator"),
}
RESULTS: dict[str, Forms] = {
    "Line": LINE,
    "Surface": SURFACE,
    "Eigenpairs": {
        **_eigenvalues("rank", "the most wanted first", _OPERATOR),
        "eigenvectors": Form("float parameter rank", "eigenvectors, orthonormal columns"),
        "matvecs": Form("int", "products with the operator"),
    },
    "MaxEigenvalueSpectrum": {
        **_eigenvalues("batch rank", "of each mini-batch, largest magnitude first", _CURVATURE),
        "matvecs": Form("int batch", "Hessian-vector products of each mini-batch"),
        "batches_at_a_time": Form("int", "mini-batches that were solved in lock-step"),
        "nep": Form("float", "negative max eigenvalue proportion: share below zero", "fraction"),
        "nep_standard_error": Form("float", "of nep, over mini-batches", "fraction"),
        "ape": Form("float", "average of the positive max eigenvalues", _CURVATURE),
        "ape_standard_error": Form("float", "of ape, over mini-batches", _CURVATURE),
    },
    "SpectralDensity": {
        "diagonals": Form("float probe step", "diagonals of Lanczos' matrices", _OPERATOR),
        "off_diagonals": Form(
            "float probe step",
            "beside the diagonals; the last to the step that was not made",
            _OPERATOR,
        ),
        "size": Form("int", "number of eigenvalues"),
        "eps": Form("float", "relative precision of the products"),
        "nodes": Form("float probe step", "nodes of the quadrature, ascending", _OPERATOR),
        "weights": Form("float probe step", "their weights; of a probe they add up to 1"),
        "grid": Form("float grid", "eigenvalues at which the density is given", _OPERATOR),
        "density": Form(
            "float grid", "density of all eigenvalues, smoothed by a Gaussian", "1 / operator"
        ),
        "standard_error": Form("float grid", "of the density, by chance", "1 / operator"),
        "systematic_error": Form("float grid", "of the density, of quadrature", "1 / operator"),
        "bandwidth": Form("float", "standard deviation of the Gaussian", _OPERATOR),
    },
    "Estimate": _ESTIMATE,
    "NormEstimate": _ESTIMATE,
    "Flatness": {
        "curvature": Form("float direction", "second derivative at the weights", "loss / step^2"),
        "width": Form("float direction", "between the points where the loss has risen", "steps"),
        "asymmetry": Form("float direction", "odd part of the rise over its even part", "fraction"),
        "sharpness": Form("float direction", "largest rise nearby, over 1 + loss", "percent"),
    },
    "CurvatureHistory": {
        "steps": Form("int steps*", "steps that the optimizer had made"),
        "eigenvalues": Form("float steps* rank", "the largest, descending", _OPERATOR),
        "errors": Form("float steps* rank", "stated errors of the eigenvalues", _OPERATOR),
        "loss": Form("float steps*", "the objective on the probe", _LOSS),
        "gradient_norm": Form("float steps*", "Euclidean norm of its gradient", "loss / weight"),
        "gradient_curvature": Form(
            "float steps*", "second derivative along the normalised gradient", _OPERATOR
        ),
        "threshold": Form(
            "float steps*", "curvature at which the step that comes next is unstable", _OPERATOR
        ),
        "trace": Form("float steps*", "sum of all eigenvalues", _OPERATOR),
        "trace_error": Form("float steps*", "standard error of the trace", _OPERATOR),
        "width": Form("float steps*", "of the loss along the direction: flatness", "steps"),
        "sharpness": Form("float steps*", "of the loss along the direction", "percent"),
        "asymmetry": Form("float steps*", "of the loss along the direction", "fraction"),
        "matvecs": Form("int steps*", "products that the eigenvalues took"),
    },
    "Path": {
        "ts": Form("float ts", "from the model, 0, to the other, 1"),
        "*": Form("float ts", "the metric of this name along the path"),
    },
    "Bezier": {
        "bend": Form("float parameter", "weights of the control point"),
        "losses": Form("float fit", "losses at the random points of the fit", _LOSS),
        "parameters": PARAMETERS,
    },
    "Plane": {
        "directions": Form("float direction=2 parameter", "orthonormal directions of the plane"),
        "points": Form("float point=3 direction=2", "where the three points of weight space lie"),
        "parameters": PARAMETERS,
    },
    "Trajectory": {
        "directions": Form("float direction=2 parameter", "principal directions, orthonormal"),
        "explained_variance": Form("float direction=2", "shares of the variance", "fraction"),
        "coordinates": Form("float snapshot direction=2", "steps along them to each snapshot"),
        "parameters": PARAMETERS,
    },
    "PolarTrajectory": {
        "distances": Form("float snapshot", "of each snapshot to the last", "weight"),
        "angles": Form("float snapshot", "to the first snapshot, seen from the last", "radians"),
        "turns": Form("float turn*", "angles between successive updates", "radians"),
    },
}


def form_of(name: str, forms: Forms) -> Form | None:
    """The form of an array, if it has one."""
    fits = (form for pattern, form in forms.items() if fnmatch.fnmatchcase(name, pattern))
    return forms.get(name) or next(fits, None)


def require_forms(arrays: Mapping[str, np.ndarray], forms: Forms) -> None:
    """Raise `InputError` unless arrays have their types and axes; some may be missing."""
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        form = form_of(name, forms)
        if form is None:
            continue
        kind, *axes = form.shape.split()
        fits = array.dtype.kind in _KINDS[kind]
        fits = fits and array.ndim in (len(axes), len(axes) - form.shape.endswith("?"))
        for axis, length in zip(axes, array.shape if fits else (), strict=False):
            own, _, wanted = axis.rstrip("*?").partition("=")
            place = _coordinates(name, own, arrays) or f"{name.rpartition('/')[0]}/{own}"
            fits = fits and length == (int(wanted) if wanted else sizes.setdefault(place, length))
            fits = fits and (length > 0 or axis.endswith("*"))
        if not fits:
            raise InputError(
                f"{name}: '{array.dtype} {array.shape}' is not usable, expected {form.shape}, as "
                "long as the others"
            )


def _coordinates(name: str, axis: str, arrays: Mapping[str, Any]) -> str | None:
    """The array that has the coordinates of an axis of another one."""
    folder = name
    while folder:
        folder = folder.rpartition("/")[0]
        place = f"{folder}/{axis}".lstrip("/")
        if place in arrays:
            return place
    return None


def write(group: h5py.Group, arrays: Mapping[str, Any], forms: Forms) -> None:
    """Put arrays into a group, and `label` them."""
    for name, array in arrays.items():
        large = np.size(array) > 1000
        group.create_dataset(name, data=array, compression="gzip" if large else None)
    label(group, forms)


def label(group: h5py.Group, forms: Forms) -> None:
    """Give the arrays of a group their descriptions and units, and names to their axes.

    Coordinates become dimension scales. Nothing must have been labelled before.
    """
    arrays: dict[str, h5py.Dataset] = {}
    group.visititems(lambda k, v: arrays.update({k: v}) if isinstance(v, h5py.Dataset) else None)
    for name, array in arrays.items():
        form = form_of(name, forms)
        if form is None:
            continue
        array.attrs["description"] = form.description
        if form.units:
            array.attrs["units"] = form.units
        for axis, dimension in zip(form.axes, array.dims, strict=False):
            dimension.label = axis
            place = _coordinates(name, axis, arrays)
            if place is not None:
                if not arrays[place].is_scale:
                    arrays[place].make_scale(axis)
                if place != name:
                    dimension.attach_scale(arrays[place])


def image(fill: Callable[[h5py.File], None]) -> bytes:
    """The content of a new HDF5 file.

    Composed in memory, for a full disk leaves HDF5 in a state that it does not recover from.
    """
    how: dict[str, Any] = dict(driver="core", backing_store=False, libver="v108")
    with h5py.File("new", "w", **how) as file:
        fill(file)
        file.flush()
        return file.id.get_file_image()
