"""Hessian spectra: max eigenvalues, densities, layers, and how they change over a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.drawing.hessians import over_training, same_stage
from analysis.measurements import labels
from analysis.measurements.schema import Measurement
from analysis.tables.hessians import spectra_table
from lossgeometry.pages.charts import (
    Curve,
    Key,
    Legend,
    Plot,
    curves,
    densities,
    layers,
    max_eigenvalues,
)
from lossgeometry.pages.page import Block, Chart, Section, Table

QUANTITIES = (("nep", "NEP (%)", 100), ("ape", "APE", 1), ("trace", "trace", 1))


def spectra(measurements: Sequence[Measurement]) -> Section:
    """Of one dataset and objective."""
    pooled: dict[Key, list[Measurement]] = {}
    for group in same_stage(measurements).values():
        for label, members in labels.by_architecture(labels.measured_alike(group)).items():
            pooled[label, labels.epoch(members[0])] = members
    firsts = {key: members[0] for key, members in pooled.items()}
    known = [label for label, _ in pooled]
    how: dict[str, Any] = dict(of=labels.kind(measurements), colors=labels.colors(known))
    legend = Legend(list(pooled), **how)
    every = sorted(measurements, key=lambda m: (m.checkpoint["epoch"], labels.by_window(m)))
    blocks: list[Block] = [_pooled(pooled, legend)]
    for data, several in over_training(measurements).items():
        series = [labels.measured_alike(snapshots) for snapshots in several]
        if series := [snapshots for snapshots in series if len(snapshots) > 2]:
            blocks.append(_over_training(data, series))
    blocks.append(_densities(firsts, legend))
    blocks += _layers(firsts, how)
    blocks.append(Table(*spectra_table(every)))
    return Section(f"Hessian of {labels.objective(measurements[0])}", blocks)


def _pooled(pooled: dict[Key, list[Measurement]], legend: Legend) -> Chart:
    found = {
        key: (
            np.concatenate([m.arrays["eigenvalues"] for m in members]),
            np.concatenate([m.arrays.get("errors", _unknown(m)) for m in members]),
        )
        for key, members in pooled.items()
    }
    counts: dict[str, list[str]] = {}
    for (_, epoch), members in pooled.items():
        counts.setdefault(labels.seeds({"": members}), []).append(epoch)
    seeds = "; ".join(
        f"{seeds}: epoch {', '.join(dict.fromkeys(epochs))}" for seeds, epochs in counts.items()
    )
    some = next(iter(pooled.values()))[0]
    batches, k = some.arrays["eigenvalues"].shape
    note = (
        f"The {k} eigenvalues of largest magnitude of each of {batches} mini-batches of "
        f"{some.options['batch_size']} images, "
        "pooled over the seeds: their density (of ten or more), their share of all, and below it "
        f"every one of them. {seeds}."
    )
    return max_eigenvalues("Hessian max eigenvalue spectra", legend, found, note=note)


def _unknown(m: Measurement) -> np.ndarray:
    return np.full(m.arrays["eigenvalues"].shape, np.nan)


def _over_training(data: str, series: Sequence[Sequence[Measurement]]) -> Chart:
    texts = labels.kinds([snapshots[-1] for snapshots in series])
    plots = []
    for name, text, scale in QUANTITIES:
        found: dict[Key, list[Curve]] = {}
        for label, snapshots in zip(texts, series, strict=True):
            epochs = np.array([m.checkpoint["epoch"] for m in snapshots])
            values, errors = (
                scale * np.array([float(m.arrays[key]) for m in snapshots])
                for key in (name, f"{name}_standard_error")
            )
            found.setdefault((label, ""), []).append(Curve(epochs, values, 2 * errors, dots=True))
        plots.append(Plot(text, "epoch", text, found))
    every = [m for snapshots in series for m in snapshots]
    legend = Legend(
        [(text, "") for text in dict.fromkeys(texts)],
        labels.kind(every),
        colors=labels.colors(dict.fromkeys(texts)),
    )
    note = (
        "Of each training with three snapshots or more, with two standard errors: over the "
        "mini-batches, those of the trace over random vectors."
    )
    return curves(f"The Hessian over training on {data}", legend, plots, note=note)


def _densities(firsts: dict[Key, Measurement], legend: Legend) -> Chart:
    found = {}
    for key, m in firsts.items():
        standard = m.arrays["density/standard_error"]
        error = 2 * standard + m.arrays.get("density/systematic_error", 0.0)
        found[key] = m.arrays["density/grid"], m.arrays["density/density"], error
    note = (
        "Of all eigenvalues, of the first seed, smoothed; with a band of two standard errors over "
        "random vectors and, where it was measured, the error of the quadrature."
    )
    return densities("Spectral density", legend, found, note=note)


def _layers(firsts: dict[Key, Measurement], how: dict[str, Any]) -> list[Block]:
    found = {}
    for key, m in firsts.items():
        if "layers/eigenvalues" in m.arrays:
            converged = m.arrays.get("layers/converged", True)
            values = np.where(converged, m.arrays["layers/eigenvalues"], np.nan)
            found[key] = [text.decode() for text in m.arrays["layers/names"]], values
    if not found:
        return []
    note = "Eigenvalues of largest magnitude of each layer's block; blank: not converged."
    return [layers("Layers", Legend(list(found), **how), found, note=note)]
