"""Figures of loss landscapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from analysis import labels, plots
from analysis.drawing import save
from analysis.measurements import Measurement


def draw_landscapes(
    measurements: Iterable[Measurement], out: Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """For each dataset: ``landscape_DATASET_lines``, ``..._contours`` and ``..._surfaces``."""
    groups: dict[str, list[Measurement]] = defaultdict(list)
    for m in measurements:
        groups[labels.dataset(m)].append(m)
    written = []
    for data, members in sorted(groups.items()):
        group = sorted(labels.measured_alike(members), key=labels.by_window)
        with mpl.rc_context(plots.STYLE):
            for kind, figure in (
                ("lines", _lines(group)),
                ("contours", _contours(group)),
                ("surfaces", _surfaces(group)),
            ):
                figure.suptitle(f"Loss landscape on {data}, {labels.objective(group[0])}")
                stem = f"landscape_{data}_{kind}{labels.suffix(group[0])}"
                written += save(figure, out, stem, formats)
    return written


def _lines(group: Sequence[Measurement]) -> Figure:
    shown = {**losses(group[0], "line"), "error (%)": None}
    figure = Figure(figsize=(3.2 * len(shown), 2.9))
    axes = figure.subplots(1, len(shown))
    palette = labels.colors(labels.label(m) for m in group)
    for m in group:
        curves = {**losses(m, "line"), "error (%)": 100 * m.arrays["line/error"]}
        for (ylabel, values), ax in zip(curves.items(), axes, strict=True):
            plots.plot_line(
                m.arrays["line/xs"],
                values,
                ylabel=ylabel,
                label=f"{labels.name(m)}: {labels.label(m)}",
                color=palette[labels.label(m)],
                ax=ax,
            )
    for ax in axes[:-1]:
        plots.log_scale(ax)
    axes[0].legend()
    return figure


def _contours(group: Sequence[Measurement]) -> Figure:
    rows = list(losses(group[0], "surface"))
    figure = Figure(figsize=(2.6 * len(group) + 0.9, 2.5 * len(rows) + 0.4))
    axes = figure.subplots(len(rows), len(group), squeeze=False, sharex=True, sharey=True)
    for loss, row in zip(rows, axes, strict=True):
        norm = plots.shared_norm([losses(m, "surface")[loss] for m in group])
        for m, ax in zip(group, row, strict=True):
            xs, ys = m.arrays["surface/xs"], m.arrays["surface/ys"]
            plots.plot_contours(xs, ys, losses(m, "surface")[loss], norm=norm, ax=ax)
            ax.set_title(f"{labels.name(m)}: {labels.label(m)}")
            ax.label_outer()
        ticks = norm.inverse(np.linspace(0, 1, 5))
        scale = ScalarMappable(norm, plots.STYLE["image.cmap"])
        bar = figure.colorbar(scale, ax=row, label=loss, ticks=ticks, format="%.3g")
        bar.ax.minorticks_off()
    return figure


def _surfaces(group: Sequence[Measurement]) -> Figure:
    rows = list(losses(group[0], "surface"))
    figure = Figure(figsize=(3.1 * len(group), 3.0 * len(rows) + 0.3))
    axes = figure.subplots(len(rows), len(group), squeeze=False, subplot_kw=dict(projection="3d"))
    for loss, row in zip(rows, axes, strict=True):
        norm = plots.shared_norm([losses(m, "surface")[loss] for m in group])
        for m, ax in zip(group, row, strict=True):
            xs, ys = m.arrays["surface/xs"], m.arrays["surface/ys"]
            plots.plot_surface(xs, ys, losses(m, "surface")[loss], norm=norm, ax=ax)
            ax.set_title(f"{labels.name(m)}: {labels.label(m)}, {loss}", y=0.95)
    return figure


def losses(measurement: Measurement, part: str) -> dict[str, np.ndarray]:
    """What is drawn of a "line" or "surface": NLL + L2, where there is a penalty, and NLL."""
    nll, l2 = (measurement.arrays.get(f"{part}/{key}") for key in ("nll", "l2"))
    assert nll is not None
    return {"NLL": nll} if l2 is None else {"NLL + L2": nll + l2, "NLL": nll}
