"""Figures of loss landscapes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import LineStyleType

from analysis.drawing import alike, compared, head, legend, more, save, short
from analysis.drawing.interactive import write_html, write_vtu
from analysis.measurements import labels
from analysis.measurements.landscapes import common_losses, extent, interpolated, losses, names
from analysis.measurements.schema import Measurement
from analysis.tables.landscapes import flatness_of
from lossgeometry import plots

OBJECTIVES = ("train", "train_test", "clean", "clean_test")
KINDS = ("", "_eigenvectors", "_gradient", "_towards", "_plane", "_bezier", "_pca")
OF_LOSSES = tuple(  # measurements, of spectra and of surfaces
    f"{what}/{objective}"
    for what in ("hessian", *(f"landscape{kind}" for kind in KINDS))
    for objective in OBJECTIVES
)
FLATNESS = {
    "curvature": "curvature",
    "width": "width at +0.1",
    "asymmetry": "asymmetry",
    "sharpness": "sharpness (%)",
}
STYLES: dict[str, LineStyleType] = {"linear": "--", "bezier": "-"}
PANEL = 2.6  # inches, of a panel
AXIS = 2.55  # of the name of its x axis
SIDE = 2.0  # of that of its y axis
SLOT = 0.8  # of the name of a tick
WIDE = 5.5  # inches that a title in one line takes
WIDEST = 12.0  # inches of a figure that can be read on a page
ACROSS = 3  # networks whose panels can be read side by side there
MOST = 6  # whose panels can be read in one figure


def draw_landscapes(
    measurements: Iterable[Measurement],
    out: Path,
    formats: Sequence[str] = ("png",),
    *,
    scale: str = "log",
    origin: str = "",
) -> list[Path]:
    """For each dataset: ``landscape_DATASET_lines``, ``..._contours``, ``..._surfaces`` and so on.

    Of more than `MOST` networks, the trainings that differ in their seed alone share their panels:
    the first seed is drawn. `origin` becomes a part of the names. The format "html" is a page that
    can be rotated, "vtu" a file for ParaView for each checkpoint; `scale` is that of
    colours and heights, "log" or "linear".
    """
    written = []
    for data, members in compared_surfaces(measurements).items():
        stem = compared(members, origin)
        group = alike(members, f"{members[0].name.partition('/')[0]}_{stem}")
        kind = group[0].name.partition("/")[0]
        end = labels.suffix(group[0])
        kinds = labels.by_architecture(group).values()
        few = group if len(group) <= MOST else [seeds[0] for seeds in kinds]
        still = [extension for extension in formats if extension not in ("html", "vtu")]
        with mpl.rc_context(plots.STYLE):
            for name, draw in FIGURES.items():
                drawn = few if name in PANELS else group
                figure = draw(drawn, scale == "log") if still else None
                if figure is not None:
                    narrow = figure.get_figwidth() < WIDE
                    of_what = f"{data}, {labels.split(group[0])} images"
                    if len(drawn) < len(group):
                        of_what += ", first seed of each"
                    lines = of_what.replace(", ", ",\n") if narrow else of_what
                    head(figure, f"{TITLES.get(name, 'Loss landscape')} on {lines}")
                    written += save(figure, out, f"{kind}_{stem}_{name}{end}", still)
        if "html" in formats:
            page = out / f"{short(f'{kind}_{stem}{end}')}.html"
            written += write_html(group, page, log=scale == "log")
        if "vtu" in formats:
            for m, own in zip(group, labels.names(group), strict=True):
                written.append(write_vtu(m, out / f"{short(f'{kind}_{stem}_{own}{end}')}.vtu"))
    return written


def compared_surfaces(measurements: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Of each dataset, those that share a figure, from local to global."""
    groups: dict[str, list[Measurement]] = defaultdict(list)
    for m in measurements:
        groups[labels.comparable(m)].append(m)
    return {data: sorted(members, key=labels.by_window) for data, members in sorted(groups.items())}


def _lines(group: Sequence[Measurement], log: bool) -> Figure:
    """One panel for each quantity, all checkpoints in it."""
    shown = [*common_losses(group, "line"), "error (%)"]
    entries, kinds = labels.entries(group), labels.kinds(group)  # seeds share theirs
    own = len(set(entries))
    longest = more((plots.wrapped(entry, plots.LEGEND) for entry in entries), 1)
    height = 2.9 + (0.2 + longest) * math.ceil(own / len(shown))
    figure = Figure(figsize=(3.2 * len(shown), height))
    axes = figure.subplots(1, len(shown))
    palette = labels.colors(kinds)
    styles = dict(zip(dict.fromkeys(kinds), cycle(plots.LINES)))
    for m, entry, kind in zip(group, entries, kinds, strict=True):
        curves = {**losses(m, "line"), "error (%)": 100 * m.arrays["line/error"]}
        for ylabel, ax in zip(shown, axes, strict=True):
            plots.plot_line(
                m.arrays["line/xs"],
                curves[ylabel],
                xlabel=plots.fitted(f"step along {names(m)[0]}", 3.4),
                ylabel=ylabel,
                label=entry,
                color=palette[kind],
                linestyle=styles[kind],
                ax=ax,
            )
    if log:
        for ax in axes[:-1]:
            plots.log_scale(ax)
    each = "a line for each seed" if own < len(group) else None
    legend(figure, axes[0], most=len(shown), title=each)
    return figure


def _train_and_test(group: Sequence[Measurement], log: bool) -> Figure:
    """One panel for each checkpoint: NLL and error on twin axes, of training and of test images."""
    lines, columns = _arranged(group)
    figure = Figure(figsize=(3.6 * columns + 0.4, 3.2 * lines + 0.4))
    (axes,) = _panels(figure, group, 1, sharey=True)
    for title, m, ax in zip(labels.captions(group), group, axes, strict=True):
        plots.plot_twin(
            m.arrays["line/xs"],
            {labels.split(m): m.arrays["line/nll"], "clean test": m.arrays["test_line/nll"]},
            {labels.split(m): m.arrays["line/error"], "clean test": m.arrays["test_line/error"]},
            xlabel=plots.fitted(f"step along {names(m)[0]}", 3.6),
            log=log,
            ax=ax,
        )
        ax.set_title(plots.fitted(title, 3.2))
    legend(figure, axes[0], most=2 * min(len(group), 2))
    return figure


def _contours(group: Sequence[Measurement], log: bool) -> Figure:
    rows = common_losses(group, "surface")
    shared = all(extent(m) == extent(group[0]) for m in group)
    titles = [
        plots.fitted(title + interpolated(m), PANEL)
        for title, m in zip(labels.captions(group), group, strict=True)
    ]
    xlabels = [plots.fitted(names(m)[0], AXIS) for m in group]
    ylabels = [plots.fitted(names(m)[1].replace(" (", "\n("), SIDE) for m in group]
    height = 2.6 + more(titles, 2) + more(xlabels, 1)
    lines, columns = _arranged(group)
    figure = Figure(figsize=(2.7 * columns + 1.3, height * lines * len(rows) + 0.4))
    blocks = _panels(figure, group, len(rows), sharex=shared, sharey=shared)
    for loss, block in zip(rows, blocks, strict=True):
        norm = plots.shared_norm([losses(m, "surface")[loss] for m in group], log=log)
        for title, x, y, m, ax in zip(titles, xlabels, ylabels, group, block, strict=True):
            xs, ys = m.arrays["surface/xs"], m.arrays["surface/ys"]
            plots.plot_contours(xs, ys, losses(m, "surface")[loss], norm=norm, ax=ax)
            done = m.arrays["surface/evaluated"]
            if not done.all():
                rows_done, columns_done = np.nonzero(done)
                plots.plot_evaluated(xs[columns_done], ys[rows_done], ax=ax)
            points = m.arrays["cut/points"]
            if len(points):
                plots.plot_way(points, numbers=m.arrays.get("cut/extras/epochs"), ax=ax)
            ax.set(title=title, xlabel=x, ylabel=y)
            if shared:
                ax.label_outer()
        ticks = plots.labelled_levels(norm)
        scale = ScalarMappable(norm, plots.STYLE["image.cmap"])
        bar = figure.colorbar(scale, ax=block, label=loss)
        bar.set_ticks(ticks.tolist(), labels=plots.tell_apart(ticks))
        bar.ax.minorticks_off()
    return figure


def _surfaces(group: Sequence[Measurement], log: bool) -> Figure:
    rows = common_losses(group, "surface")
    captions = labels.captions(group)
    longest = more((plots.fitted(f"{title}, {rows[0]}", PANEL) for title in captions), 1)
    lines, columns = _arranged(group)
    figure = Figure(figsize=(3.1 * columns, (3.0 + longest) * lines * len(rows) + 0.3))
    blocks = _panels(figure, group, len(rows), subplot_kw=dict(projection="3d"))
    for loss, block in zip(rows, blocks, strict=True):
        norm = plots.shared_norm([losses(m, "surface")[loss] for m in group], log=log)
        for title, m, ax in zip(captions, group, block, strict=True):
            xs, ys = m.arrays["surface/xs"], m.arrays["surface/ys"]
            plots.plot_surface(xs, ys, losses(m, "surface")[loss], norm=norm, ax=ax)
            ax.set_title(plots.fitted(f"{title}, {loss}", PANEL), y=0.95)
    return figure


def _arranged(group: Sequence[Measurement]) -> tuple[int, int]:
    """Rows and columns of panels, one for each network."""
    rows = math.ceil(len(group) / ACROSS)
    return rows, math.ceil(len(group) / rows)


def _panels(
    figure: Figure, group: Sequence[Measurement], blocks: int, **options: Any
) -> list[list[Axes]]:
    """Blocks of panels, one below the other, each with one for each network."""
    rows, columns = _arranged(group)
    axes = figure.subplots(blocks * rows, columns, squeeze=False, **options)
    found = [list(block.flat) for block in np.split(axes, blocks)]
    for block in found:
        for ax in block[len(group) :]:
            ax.remove()
    return [block[: len(group)] for block in found]


def _flatness(group: Sequence[Measurement], log: bool) -> Figure | None:
    """The summary numbers of each checkpoint, a dot for every direction and the interval.

    Of several seeds, a dot for the mean of each, and the interval over them; which it is, is said
    where both are in one figure.
    """
    kinds = labels.by_architecture(group)
    mixed = len(kinds) < len(group)
    palette = labels.colors(kinds)
    entry_of = dict(zip((m.path for m in group), labels.entries(group), strict=True))
    found: dict[str, dict[str, np.ndarray]] = {}
    colors = {}
    for kind, members in kinds.items():
        flat = [vars(flatness) for flatness in map(flatness_of, members) if flatness is not None]
        if not flat:
            continue
        values, what = flat[0], "directions"
        if len(flat) > 1:
            values = {key: np.array([f[key].mean() for f in flat]) for key in FLATNESS}
            what = "seeds"
        n = len(values["width"])
        title = f"{kind}, {n} {what}" if mixed else entry_of[members[0].path]
        colors[title] = palette[kind]
        found[title] = values
    if not found:
        return None
    width = max(2.5, (0.65 if mixed else 0.5) * len(found) + 0.6)
    lines = more((plots.wrapped(title, SLOT, 7) for title in found), 3, 7)
    rows = 1 if len(FLATNESS) * width <= WIDEST else 2
    columns = len(FLATNESS) // rows
    figure = Figure(figsize=(columns * width, rows * (2.7 + lines)))
    axes = figure.subplots(rows, columns, squeeze=False)
    for (key, ylabel), ax in zip(FLATNESS.items(), axes.flat, strict=True):
        samples = {title: values[key] for title, values in found.items()}
        plots.plot_samples(samples, ylabel=ylabel, colors=colors, ax=ax)
    return figure


def _polar(group: Sequence[Measurement], log: bool) -> Figure | None:
    """Turns of each training, and its way as seen from its end (Park and Kim 2022, Figure 1b)."""
    views = [m for m in group if "cut/extras/polar/distances" in m.arrays]
    if not views:
        return None
    figure = Figure(figsize=(7, 3.4))
    from_end = figure.add_subplot(1, 2, 1, projection="polar")
    turning = figure.add_subplot(1, 2, 2)
    kinds = labels.kinds(views)
    palette = labels.colors(kinds)
    for m, entry, kind in zip(views, labels.entries(views), kinds, strict=True):
        color = palette[kind]
        angles, distances, turns = (
            m.arrays[f"cut/extras/polar/{name}"] for name in ("angles", "distances", "turns")
        )
        plots.plot_polar(angles, distances, label=entry, color=color, ax=from_end)
        snapshots = m.arrays.get("cut/extras/epochs", np.arange(len(turns) + 2))[1:-1]
        turning.plot(snapshots, np.degrees(turns), "o-", color=color, markersize=3)
    known = all("cut/extras/epochs" in m.arrays for m in views)
    snapshot = "epoch of the snapshot" if known else "snapshot, the first is 0"
    turning.set(xlabel=snapshot, ylabel="angle between updates (°)")
    turning.set_ylim(0, 180)
    turning.xaxis.set_major_locator(MaxNLocator(integer=True))
    turning.set_yticks(range(0, 181, 45))
    title = "left: seen from the end of training, radius: distance to it"
    legend(figure, from_end, most=3, title=title)
    return figure


def _paths(group: Sequence[Measurement], log: bool) -> Figure | None:
    """Loss and error on the way to another checkpoint."""
    ways = [m for m in group if "cut/extras/ts" in m.arrays]
    if not ways:
        return None
    figure = Figure(figsize=(6.4, 2.9))
    axes = figure.subplots(1, 2)
    kinds = labels.kinds(ways)
    palette = labels.colors(kinds)
    for m, entry, kind in zip(ways, labels.entries(ways), kinds, strict=True):
        for path, style in STYLES.items():
            for (metric, ylabel, factor), ax in zip(
                (("nll", "NLL", 1), ("error", "error (%)", 100)), axes, strict=True
            ):
                values = m.arrays.get(f"cut/extras/{path}/{metric}")
                if values is not None:
                    plots.plot_line(
                        m.arrays["cut/extras/ts"],
                        factor * values,
                        xlabel="share of the way",
                        ylabel=ylabel,
                        label=f"{entry}, {path}",
                        color=palette[kind],
                        linestyle=style,
                        ax=ax,
                    )
    axes[0].legend()
    return figure


FIGURES: dict[str, Callable[[Sequence[Measurement], bool], Figure | None]] = {
    "lines": _lines,
    "train_and_test": _train_and_test,
    "contours": _contours,
    "surfaces": _surfaces,
    "flatness": _flatness,
    "polar": _polar,
    "paths": _paths,
}


TITLES = {
    "flatness": "Flatness of the NLL",
    "polar": "Trainings",
}  # of `FIGURES`, where it is another
PANELS = ("train_and_test", "contours", "surfaces")  # of `FIGURES`, with a panel for each network
