"""A report of what the engine returned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lossgeometry.algorithms.density import SpectralDensity
from lossgeometry.algorithms.eigensolver import Eigenpairs
from lossgeometry.algorithms.estimate import Estimate
from lossgeometry.algorithms.spectrum import MaxEigenvalueSpectrum
from lossgeometry.errors import InputError
from lossgeometry.landscape.flatness import Flatness
from lossgeometry.landscape.sampling import Slice
from lossgeometry.pages.charts import (
    GRAY,
    Curve,
    Key,
    Legend,
    Plot,
    Surface,
    curves,
    densities,
    max_eigenvalues,
    surfaces,
)
from lossgeometry.pages.page import Section, Table, write_page
from lossgeometry.tracking import CurvatureHistory

Result: TypeAlias = (
    Slice
    | MaxEigenvalueSpectrum
    | SpectralDensity
    | Eigenpairs
    | Estimate
    | Flatness
    | CurvatureHistory
)
Named: TypeAlias = "Result | Sequence[Result]"

OF, OVER = "model", "step"


def report(
    results: Named | Mapping[str, Named | Mapping[int, Named]],
    path: str | Path,
    *,
    title: str = "Curvature and loss landscape",
) -> Path:
    """Write results as one HTML file that stands alone, to look into and to send.

    Surfaces can be rotated, values show under the pointer, models are switched on and off on one
    scale, a slider goes through the training. Needs no network, but plotly for writing it.

    Parameters
    ----------
    results
        What `surface`, `line`, `max_eigenvalue_spectrum`, `spectral_density`, `eigsh`, `trace`,
        `flatness` and so on returned, or `CurvatureTracker.result`: one or a sequence of them; of
        several models, a mapping of their names to those; of a training, the name of a model to a
        mapping of the step to those. Results of one kind share a chart, and numbers a table.
    path
        Of the file, which is written whole or not at all.
    title
        Of the page.

    Returns
    -------
    Path
        That of the file.

    Raises
    ------
    InputError
        There are no results, there is something else among them, or two for one place in a chart;
        or plotly is not installed.

    See Also
    --------
    open_measurement : results from files, as labelled arrays.
    Slice.plot : one result as a picture; most results have it.

    Examples
    --------
    >>> import tempfile, torch
    >>> from lossgeometry import random_directions, report, surface
    >>> from torch.nn.functional import mse_loss
    >>> model, batch = torch.nn.Linear(2, 1), (torch.ones(4, 2), torch.zeros(4, 1))
    >>> xs = torch.linspace(-1, 1, 5)
    >>> directions = random_directions(model, seed=0)
    >>> L = surface(model, {"mse": mse_loss}, batch, directions, xs, xs)
    >>> report(L, tempfile.mkdtemp() + "/report.html").name
    'report.html'
    """
    kinds: dict[str, list[tuple[Key, Any]]] = defaultdict(list)
    for key, result in _each(results):
        kinds[_kind(result)].append((key, result))
    if not kinds:
        raise InputError("results: none found, expected at least one")
    blocks = [_SECTIONS[kind](kinds[kind]) for kind in _SECTIONS if kind in kinds]
    return write_page(path, title, blocks)


def _each(results: Any) -> list[tuple[Key, Any]]:
    """Every result with its name and step; "" where there is but one."""
    found = []
    for name, own in _mapping(results).items():
        for step, several in _mapping(own).items():
            for result in several if isinstance(several, list | tuple) else [several]:
                found.append(((str(name), str(step)), result))
    return found


def _mapping(value: Any) -> Mapping[Any, Any]:
    """Of names or steps; a slice is a mapping, too, but a result."""
    own = isinstance(value, Mapping) and not isinstance(value, Slice)
    return value if own else {"": value}


def _kind(result: Any) -> str:
    if isinstance(result, Slice):
        return "Line" if result.ys is None else "Surface"
    if isinstance(result, Estimate) and np.ndim(result.estimate):
        raise InputError(
            f"results: an estimate of shape {np.shape(result.estimate)}, expected one number"
        )
    names = [base.__name__ for base in type(result).__mro__]
    known = next((name for name in names if name in _SECTIONS), None)
    if known is None:
        raise InputError(
            f"results: a {type(result).__name__} found, expected what lossgeometry returned"
        )
    return known


def _alone(found: Sequence[tuple[Key, Any]]) -> dict[Key, Any]:
    """For a chart, in which each has a place of its own."""
    keys = [key for key, _ in found]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        kind = type(found[0][1]).__name__
        raise InputError(
            f"results: more than one {kind} of {' '.join(filter(None, twice)) or 'one model'}, "
            "expected a name for each"
        )
    return dict(found)


def _legend(found: Mapping[Key, Any]) -> Legend:
    return Legend(list(found), OF, OVER)


def _table(
    found: Sequence[tuple[Key, Any]],
    columns: Sequence[str],
    cells: Callable[[Any], Sequence[Sequence[str]]],
    title: str,
) -> Table:
    """Rows of each result, with the names and steps where there are any."""
    shown = [i for i in (0, 1) if any(key[i] for key, _ in found)]
    rows = [[*(key[i] for i in shown), *row] for key, own in found for row in cells(own)]
    return Table(title, [*((OF, OVER)[i] for i in shown), *columns], rows)


def _surfaces(found: Sequence[tuple[Key, Slice]]) -> Section:
    own = _alone(found)
    drawn = {key: Surface(L.xs, L.ys, L.metrics) for key, L in own.items() if L.ys is not None}
    note = "All on the scale of their metric. Drag to turn all."
    return Section("Surfaces", [surfaces("Surfaces of the loss", _legend(own), drawn, note=note)])


def _lines(found: Sequence[tuple[Key, Slice]]) -> Section:
    own = _alone(found)
    plots = [
        Plot(
            metric,
            "step along the direction",
            metric,
            {key: Curve(L.xs, L[metric]) for key, L in own.items() if metric in L},
        )
        for metric in dict.fromkeys(metric for L in own.values() for metric in L)
    ]
    return Section("Lines", [curves("Along a direction", _legend(own), plots)])


def _spectra(found: Sequence[tuple[Key, MaxEigenvalueSpectrum]]) -> Section:
    own = _alone(found)
    drawn = {key: (S.eigenvalues.numpy(), S.errors.numpy()) for key, S in own.items()}
    chart = max_eigenvalues("Max eigenvalues of mini-batches", _legend(own), drawn)

    def cells(S: MaxEigenvalueSpectrum) -> list[list[str]]:
        nep = f"{100 * S.nep:.1f} ± {100 * S.nep_standard_error:.1f}"
        unconverged = int((~S.converged).sum())
        ape = f"{S.ape:.4g} ± {S.ape_standard_error:.2g}"
        return [[f"{len(S.eigenvalues)}", nep, ape, f"{unconverged}"]]

    columns = ["mini-batches", "NEP %", "APE", "not converged"]
    return Section(
        "Hessian max eigenvalue spectra",
        [chart, _table(found, columns, cells, "± one standard error")],
    )


def _densities(found: Sequence[tuple[Key, SpectralDensity]]) -> Section:
    own, drawn = _alone(found), {}
    for key, D in own.items():
        grid = D.grid()
        estimate = D.estimate(grid)
        error = 2 * estimate.standard_error + estimate.systematic_error
        drawn[key] = grid, estimate.estimate, error
    note = "With a band of two standard errors and the systematic one."
    return Section(
        "Spectral densities", [densities("Of all eigenvalues", _legend(own), drawn, note=note)]
    )


def _eigenpairs(found: Sequence[tuple[Key, Eigenpairs]]) -> Section:
    def cells(E: Eigenpairs) -> list[list[str]]:
        columns = (E.eigenvalues.tolist(), E.errors.tolist(), E.converged.tolist())
        return [
            [f"{rank}", f"{value:.6g} ± {error:.1g}", "yes" if converged else "no"]
            for rank, (value, error, converged) in enumerate(zip(*columns, strict=True), 1)
        ]

    title, columns = "Eigenvalues ± their errors", ["rank", "eigenvalue", "converged"]
    return Section("Eigenvalues", [_table(found, columns, cells, title)])


def _estimates(found: Sequence[tuple[Key, Estimate]]) -> Section:
    def cells(T: Estimate) -> list[list[str]]:
        low, high = T.interval()
        systematic = f"{float(T.systematic_error):.2g}"
        numbers = [f"{float(T.estimate):.6g} ± {float(T.standard_error):.2g}", systematic]
        return [[*numbers, f"{float(low):.6g} to {float(high):.6g}", f"{T.matvecs}"]]

    columns = ["estimate", "systematic error", "95 % interval", "products"]
    return Section("Estimates", [_table(found, columns, cells, "Estimates ± one standard error")])


def _flatness(found: Sequence[tuple[Key, Flatness]]) -> Section:
    def cells(flat: Flatness) -> list[list[str]]:
        estimates = flat.estimates()
        return [[estimates[name].format(".3g") for name in names]]

    names = ("curvature", "width", "asymmetry", "sharpness")
    title = "Means over directions; ± 95 % interval"
    return Section("Flatness", [_table(found, [*names[:3], "sharpness %"], cells, title)])


def _histories(found: Sequence[tuple[Key, CurvatureHistory]]) -> Section:
    own = _alone([((name, ""), history) for (name, _), history in found])
    eigenvalues: dict[Key, list[Curve]] = {}
    for key, history in own.items():
        columns = zip(history.eigenvalues.T, history.errors.T, strict=True)
        eigenvalues[key] = [Curve(history.steps, values, errors) for values, errors in columns]
        if np.isfinite(history.threshold).any():
            eigenvalues[key].append(Curve(history.steps, history.threshold, color=GRAY))
    plots = [Plot("largest eigenvalues", "step", "eigenvalue", eigenvalues, width=500)]
    for name in ("loss", "gradient_norm", "gradient_curvature", "trace", "width", "sharpness"):
        drawn = {
            key: Curve(
                history.steps,
                getattr(history, name),
                2 * history.trace_error if name == "trace" else None,
            )
            for key, history in own.items()
            if np.isfinite(getattr(history, name)).any()
        }
        text = name.replace("_", " ")
        plots += [Plot(text, "step", text, drawn, width=500)] if drawn else []
    note = (
        "Bands are the stated errors, of the trace two standard errors; the dotted line is the "
        "curvature at which the optimizer's steps become unstable."
    )
    chart = curves("Curvature while training", _legend(own), plots, note=note)
    return Section("Over training", [chart])


_SECTIONS: dict[str, Callable[[Any], Section]] = {
    "CurvatureHistory": _histories,
    "MaxEigenvalueSpectrum": _spectra,
    "SpectralDensity": _densities,
    "Eigenpairs": _eigenpairs,
    "Estimate": _estimates,
    "Surface": _surfaces,
    "Line": _lines,
    "Flatness": _flatness,
}
