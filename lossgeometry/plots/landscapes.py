"""Lines and surfaces of the loss, and ways across them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.patches import Patch
from matplotlib.patheffects import AbstractPathEffect, withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import LineStyleType

from lossgeometry.plots.style import STYLE, entry, fitted, log_scale, room, tell_apart
from lossgeometry.statistics import across_seeds

MARKERS = 20  # points of a way that can still be told apart
APART = 0.05  # of the longer axis: points of a way that are closer share a number
CROSS = 5  # its place among what is drawn: above lines, and labels of contours
TWIN = ("#0072b2", "#d55e00")  # of the left and the right axis
OUTLINE: list[AbstractPathEffect] = [
    withStroke(linewidth=2.5, foreground="black")
]  # what is white is seen on white, too
THIN: list[AbstractPathEffect] = [withStroke(linewidth=1.2, foreground="black")]  # of letters
# What is no number but a hole: which values, the colour in a surface, and where beside a line.
HOLES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str, float]] = {
    "NaN": (np.isnan, "#bdbdbd", 0.5),
    "∞": (np.isposinf, "#cc79a7", 0.95),
    "-∞": (np.isneginf, "#56b4e9", 0.03),
}


def plot_line(
    xs: np.ndarray,
    values: np.ndarray,
    *,
    xlabel: str = "step along a direction",
    ylabel: str,
    label: str | None = None,
    color: str | None = None,
    linestyle: LineStyleType = "-",
    ax: Axes | None = None,
) -> Axes:
    """One metric along a direction; `xs` and `values` are (n,) arrays.

    What is not finite is a gap, and says which it is: infinities at the edge, NaN halfway up.

    See Also
    --------
    plot_twin : losses and errors, of several sets.
    lossgeometry.Slice.plot : draws a line with it.
    lossgeometry.Path.plot : draws with it.
    """
    ax = ax or plt.gca()
    _plot_gaps(xs, values, color=color, label=entry(label), linestyle=linestyle, ax=ax)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def plot_twin(
    xs: np.ndarray,
    losses: Mapping[str, np.ndarray],
    errors: Mapping[str, np.ndarray],
    *,
    xlabel: str = "step along a direction",
    log: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """NLL on the left axis and error on the right one, both of several sets of images.

    `losses` and `errors` map the names of the sets to (n,) arrays; errors are shares of one. The
    first set is drawn in solid lines, the second dashed (Li et al. 2018, Figure 2).

    See Also
    --------
    plot_line : one metric.
    lossgeometry.line : computes what is drawn.
    """
    ax = ax or plt.gca()
    right = ax.twinx()
    styles: tuple[LineStyleType, ...] = ("-", "--", ":")
    for style, (name, loss) in zip(styles, losses.items(), strict=False):
        label = entry(f"NLL, {name}")
        _plot_gaps(xs, loss, color=TWIN[0], label=label, linestyle=style, ax=ax)
        _plot_gaps(xs, 100 * errors[name], color=TWIN[1], label=None, linestyle=style, ax=right)
        label = entry(f"error, {name}")  # for the legend
        ax.plot([], [], linestyle=style, color=TWIN[1], label=label)
    if log:
        log_scale(ax)
    ax.set(xlabel=xlabel)
    ax.set_ylabel("NLL", color=TWIN[0])
    right.set_ylabel("error (%)", color=TWIN[1])
    right.set_ylim(0, 100)
    right.grid(False)
    right.spines["right"].set_visible(True)
    return ax


def _plot_gaps(
    xs: np.ndarray,
    values: np.ndarray,
    *,
    color: str | None,
    label: str | None,
    linestyle: LineStyleType,
    ax: Axes,
) -> None:
    """A line with gaps where values are not finite, and what they are there."""
    xs, values = np.asarray(xs), np.asarray(values)
    finite = np.where(np.isfinite(values), values, np.nan)
    (line,) = ax.plot(xs, finite, color=color, label=label, linestyle=linestyle)
    for name, (is_hole, _, height) in HOLES.items():
        holes = np.flatnonzero(is_hole(values))
        runs = np.split(holes, np.flatnonzero(np.diff(holes) > 1) + 1) if len(holes) else []
        edge = ax.get_xaxis_transform()
        for run in runs:
            style: dict[str, Any] = dict(color=line.get_color(), transform=edge)
            ax.plot(xs[run], np.full(len(run), height), linestyle=":", linewidth=1, **style)
            middle = float(np.mean(xs[run]))
            ax.text(middle, height, name, ha="center", va="bottom", fontsize=7, **style)


def plot_way(
    steps: np.ndarray, *, numbers: Sequence[int] | np.ndarray | None = None, ax: Axes | None = None
) -> Axes:
    """Points in the plane of a surface, (n, 2), joined in their order; the first is hollow.

    They have their `numbers`, such as epochs, or are numbered from 0, unless there are many. Of
    points that are close together, the last has its number.

    See Also
    --------
    plot_contours : the ground to draw it on.
    lossgeometry.Trajectory.plot : draws with it.
    """
    ax = ax or plt.gca()
    ax.plot(*steps.T, "-", color="white", linewidth=1, path_effects=OUTLINE)
    if len(steps) <= MARKERS:
        ax.plot(*steps[1:].T, "o", color="white", markeredgecolor="black", markersize=3)
        about: dict[str, Any] = dict(color="white", fontsize=6, path_effects=THIN)
        texts = range(len(steps)) if numbers is None else numbers
        near = APART * max(np.ptp(ax.get_xlim()), np.ptp(ax.get_ylim()))
        last: np.ndarray | None = None
        for number, step in reversed([*zip(texts, steps, strict=True)]):
            if last is None or np.linalg.norm(step - last) > near:
                offset: dict[str, Any] = dict(xytext=(4, 4), textcoords="offset points")
                ax.annotate(str(number), step, **offset, **about)
                last = step
    first: dict[str, Any] = dict(markerfacecolor="none", markeredgecolor="white", markersize=5)
    ax.plot(*steps[0], "o", **first, path_effects=OUTLINE)
    return ax


def plot_evaluated(xs: np.ndarray, ys: np.ndarray, *, ax: Axes | None = None) -> Axes:
    """The points of a surface that were evaluated, (n,) each; the others are interpolated.

    See Also
    --------
    plot_contours : the surface to draw them on.
    lossgeometry.surface : with its option `adaptive`, evaluates some points alone.
    """
    ax = ax or plt.gca()
    edge: dict[str, Any] = dict(markeredgecolor="black", markeredgewidth=0.3)
    ax.plot(xs, ys, ".", color="white", markersize=2.5, **edge)
    return ax


def plot_samples(
    samples: Mapping[str, np.ndarray],
    *,
    ylabel: str,
    colors: Mapping[str, str],
    ax: Axes | None = None,
) -> Axes:
    """The values of each of several groups as dots, beside their mean and its 95 % interval.

    Each group has an (n,) array, and a colour. What is not finite is counted at the upper edge, and
    the group then has no mean.

    See Also
    --------
    plot_points : with intervals that are known.
    """
    ax = ax or plt.gca()
    for i, (name, values) in enumerate(samples.items()):
        estimate = across_seeds(values)
        ax.plot(np.full(len(values), i - 0.12), values, ".", color=colors[name], alpha=0.4)
        ax.errorbar(i + 0.12, estimate.mean, estimate.half_width, fmt="o", color=colors[name])
        counts = [(name, int(is_hole(values).sum())) for name, (is_hole, *_) in HOLES.items()]
        lines = [f"{count} of {len(values)}: {name}" for name, count in counts if count]
        if lines:
            text, edge = "\n".join(lines), ax.get_xaxis_transform()
            ax.text(i + 0.12, 1, text, transform=edge, ha="center", va="top", fontsize=7)
    slot = room(ax, len(samples))
    narrow = [re.sub(r": |(?<=,) | (?=\()", "\n", name) for name in samples]
    ax.set_xticks(range(len(samples)), [fitted(name, slot, 7) for name in narrow], fontsize=7)
    ax.set(ylabel=ylabel, xlim=(-0.5, len(samples) - 0.5))
    if not any((values < 0).any() for values in samples.values()):
        ax.set_ylim(bottom=0)
    return ax


def plot_polar(
    angles: np.ndarray,
    distances: np.ndarray,
    *,
    label: str | None = None,
    color: str | None = None,
    ax: Any = None,
) -> Any:
    """A training as seen from its end, (n,) each; `ax` has the projection "polar".

    Radius is the distance to the end, the angle is that to the first snapshot, in radians.

    See Also
    --------
    plot_way : in a plane.
    lossgeometry.PolarTrajectory.plot : draws with it.
    """
    ax = ax if ax is not None else plt.subplot(projection="polar")
    angles = np.where(distances == 0, 0.0, angles)  # the end is at any angle
    ax.plot(angles, distances, "o-", color=color, label=entry(label), markersize=3)
    ax.set_thetamin(0)
    ax.set_thetamax(180 if (angles > np.pi / 2).any() else 90)
    return ax


def shared_norm(surfaces: Sequence[np.ndarray], *, log: bool = True) -> Normalize:
    """One colour scale for several surfaces, from the least to the largest finite value.

    Where they are the same, to rounding, it is the middle of the scale.

    See Also
    --------
    plot_contours : takes it.
    plot_surface : takes it.
    """
    values = np.concatenate([s[np.isfinite(s)] for s in surfaces] or [np.empty(0)])
    if not len(values):
        return Normalize(0, 1)
    low, high = float(values.min()), float(values.max())
    largest = max(abs(low), abs(high))
    if high - low <= 1e-12 * largest:
        margin = 0.05 * largest or 1.0
        low, high = low - margin, high + margin
    return LogNorm(low, high) if log and low > 0 else Normalize(low, high)


def labelled_levels(norm: Normalize, levels: int = 14) -> np.ndarray:
    """The levels of `plot_contours` that have labels, for the ticks of a colour bar."""
    return _edges(norm, levels)[1:-1:2]


def _edges(norm: Normalize, levels: int) -> np.ndarray:
    edges = np.asarray(norm.inverse(np.linspace(0, 1, levels + 1)))
    edges[[0, -1]] = norm.vmin, norm.vmax  # but for rounding, which would leave the lowest blank
    return edges


def plot_contours(
    xs: np.ndarray,
    ys: np.ndarray,
    values: np.ndarray,
    *,
    norm: Normalize | None = None,
    levels: int = 14,
    ax: Axes | None = None,
) -> Axes:
    """Filled contours with labelled levels of a (len(ys), len(xs)) surface.

    Levels are evenly spaced on the scale of `norm`, by default that of this surface alone; give one
    `norm` to several plots to compare them. What is not finite is a hole, NaN and infinity in
    colours of their own that a legend names. The cross marks the trained weights.

    See Also
    --------
    plot_surface : in three dimensions.
    shared_norm : one colour scale for several.
    lossgeometry.Slice.plot : draws with it.
    """
    ax = ax or plt.gca()
    norm = norm or shared_norm([values])
    surface = np.ma.masked_invalid(np.asarray(values, dtype=float))
    edges = _edges(norm, levels)
    if surface.mask.any():  # contours end at the last finite points: here is what is around each
        ax.pcolormesh(xs, ys, surface, norm=norm, shading="nearest")
        for _, where, color in _holes(values):
            hole = np.ma.masked_where(~where, np.ones(where.shape))
            ax.pcolormesh(xs, ys, hole, cmap=ListedColormap([color]), shading="nearest")
        ends = [(min(0, *axis), max(0, *axis)) for axis in (xs, ys)]
        ax.set(xlim=ends[0], ylim=ends[1])  # those of a surface without holes
    if not surface.mask.all():
        ax.contourf(xs, ys, surface, levels=edges, norm=norm)
        inside = edges[(edges > surface.min()) & (edges < surface.max())]
        if len(inside):
            lines = ax.contour(xs, ys, surface, levels=inside, colors="white", linewidths=0.5)
            labelled = labelled_levels(norm, levels)
            named = dict(zip(labelled, tell_apart(labelled), strict=True))
            shown = [level for level in named if level in inside]
            for text in ax.clabel(lines, shown, fontsize=6, fmt=named):
                text.set_path_effects(THIN)
    ax.plot(0, 0, "+", color="white", markersize=7, path_effects=OUTLINE, zorder=CROSS)
    _name_holes(values, ax)
    ax.set(xlabel="step along direction 1", ylabel="step along direction 2", aspect="equal")
    ax.grid(False)
    return ax


def plot_surface(
    xs: np.ndarray,
    ys: np.ndarray,
    values: np.ndarray,
    *,
    norm: Normalize | None = None,
    ax: Any = None,
) -> Any:
    """A (len(ys), len(xs)) surface in three dimensions, its height on the scale of `norm`.

    `ax` has the projection "3d"; `norm` is by default that of this surface alone. matplotlib has no
    logarithmic axis in 3D, so heights are logarithms, labelled with the values, where the scale is.
    A face has the colour of the mean height of its corners. Below what is not finite there are
    dots, in the colours of `plot_contours`.

    See Also
    --------
    plot_contours : in two dimensions, where values can be read.
    shared_norm : one scale for several.
    """
    ax = ax if ax is not None else plt.subplot(projection="3d")
    norm = norm or shared_norm([values])
    values = np.asarray(values, dtype=float)
    columns, rows = np.meshgrid(xs, ys)
    height: Callable[[np.ndarray], np.ndarray] = np.log10 if isinstance(norm, LogNorm) else np.array
    finite = np.where(np.isfinite(values), values, np.nan)
    level = np.ma.filled(norm(finite), np.nan)
    corners = np.stack([level[:-1, :-1], level[:-1, 1:], level[1:, :-1], level[1:, 1:]])
    known = np.isfinite(corners)
    mean = np.nansum(corners, axis=0) / known.sum(axis=0).clip(min=1)
    colors = mpl.colormaps[STYLE["image.cmap"]]
    if known.any():
        ax.plot_surface(
            columns,
            rows,
            height(finite),
            facecolors=colors(mean),
            rstride=1,
            cstride=1,
            linewidth=0.1,
            edgecolor=(0, 0, 0, 0.25),
            shade=False,
        )
    joined = np.pad(known.sum(axis=0) > 2, 1)  # corners of a face, or of half of one
    joined = joined[:-1, :-1] | joined[:-1, 1:] | joined[1:, :-1] | joined[1:, 1:]
    alone = np.isfinite(values) & ~joined
    dots: dict[str, Any] = dict(s=4, depthshade=False)
    ax.scatter(*(a[alone] for a in (columns, rows, height(finite))), c=colors(level[alone]), **dots)
    ticks = np.asarray(norm.inverse(np.linspace(0, 1, 5)))
    low, *_, high = heights = height(ticks)
    for _, where, color in _holes(values):
        at = np.full(where.sum(), low)
        ax.scatter(columns[where], rows[where], at, color=color, **dots)
    _name_holes(values, ax)
    ax.set_zlim(low, high)
    ax.set_zticks(heights, tell_apart(ticks))
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.yaxis.set_major_locator(MaxNLocator(3))
    ax.set(xlabel="direction 1", ylabel="direction 2")
    ax.tick_params(labelsize=7, pad=0)
    ax.view_init(elev=30, azim=-55)
    ax.set_box_aspect(None, zoom=0.85)  # leaves room for the labels
    return ax


def _holes(values: np.ndarray) -> list[tuple[str, np.ndarray, str]]:
    """The kinds of holes that there are in a surface: name, where, and colour."""
    found = [(name, is_hole(values), color) for name, (is_hole, color, _) in HOLES.items()]
    return [(name, where, color) for name, where, color in found if where.any()]


def _name_holes(values: np.ndarray, ax: Any) -> None:
    """Say in the panel which holes a surface has, and if it has nothing else."""
    found = _holes(values)
    solid = hasattr(ax, "text2D")
    if not np.isfinite(values).any():
        text = f"{found[0][0]} everywhere" if len(found) == 1 else "finite nowhere"
        write = ax.text2D if solid else ax.text
        write(0.5, 0.7, text, transform=ax.transAxes, ha="center", va="center")
    if found and not found[0][1].all():
        handles = [
            Patch(color=color, label=f"{name} at {where.sum()} of {where.size}")
            for name, where, color in found
        ]
        style: dict[str, Any] = dict(fontsize=6, frameon=True, handlelength=1)
        corner, at = ("upper left", (0, 0.87)) if solid else ("upper right", (1, 1))
        ax.legend(handles=handles, loc=corner, bbox_to_anchor=at, **style)
