"""Plots of measurements: arrays in, ``ax`` out, composable, in one style.

Every function draws into `ax` (the current axes by default) and returns it. NaN and infinity are
left as holes. This module needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from matplotlib.typing import LineStyleType
from scipy.stats import gaussian_kde

from analysis.statistics import across_seeds

STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "image.cmap": "viridis",
    "svg.hashsalt": "locality-landscapes",  # the same bytes every time
}
MARKERS = 20  # points of a way that can still be told apart
TWIN = ("#0072b2", "#d55e00")  # of the left and the right axis


def plot_max_eigenvalues(
    eigenvalues: np.ndarray,
    half: str,
    *,
    label: str | None = None,
    color: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Density of the Hessian max eigenvalues on one side of zero.

    The curve is a Gaussian kernel density (Scott's bandwidth) of the eigenvalues on that side, in
    the logarithm of their magnitude, times their share of all; the ticks below are the eigenvalues.

    Parameters
    ----------
    eigenvalues : (n_batches, k) array
    half : {"negative", "positive"}
    """
    ax = ax or plt.gca()
    finite = eigenvalues[np.isfinite(eigenvalues)]
    magnitudes = np.abs(finite[finite < 0 if half == "negative" else finite > 0])
    share = len(magnitudes) / max(eigenvalues.size, 1)
    label = f"{label or ''} ({share:.1%})".strip()
    logs = np.log10(magnitudes)
    if len(logs) > 1 and np.ptp(logs) > 0:
        density = gaussian_kde(logs)
        margin = 3 * np.sqrt(density.covariance[0, 0])
        grid = np.linspace(logs.min() - margin, logs.max() + margin, 400)
        ax.plot(10**grid, share * density(grid), color=color, label=label)
        ax.fill_between(10**grid, share * density(grid), color=color, alpha=0.15, linewidth=0)
    else:
        ax.plot([], [], color=color, label=label)
    ax.plot(magnitudes, np.zeros(len(magnitudes)), "|", color=color, markersize=6, alpha=0.4)
    if len(magnitudes):
        ax.set_xscale("log")
        wide = ax.dataLim.x1 > 50 * ax.dataLim.x0
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3) if wide else (1, 2, 5)))
        ax.xaxis.set_minor_formatter(NullFormatter())
        sign = "-" if half == "negative" else ""
        ax.xaxis.set_major_formatter(lambda value, _: f"${sign}{value:g}$")
    if not ax.dataLim.width > 0:  # as yet there are none
        ax.set_xticks([])
    if half == "negative":
        ax.xaxis.set_inverted(True)
    ax.set(xlabel=f"{half} Hessian max eigenvalues", ylabel="density per decade")
    ax.set_ylim(bottom=0, auto=True)
    return ax


def plot_spectral_density(
    grid: np.ndarray,
    density: np.ndarray,
    standard_error: np.ndarray,
    *,
    label: str | None = None,
    color: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Density of all eigenvalues on a logarithmic axis, with a band of two standard errors.

    `grid`, `density` and `standard_error` are (n,) arrays.
    """
    ax = ax or plt.gca()
    (curve,) = ax.plot(grid, density, color=color, label=label)
    low, high = density - 2 * standard_error, density + 2 * standard_error
    ax.fill_between(grid, low, high, color=curve.get_color(), alpha=0.2, linewidth=0)
    ax.set(xlabel="Hessian eigenvalue", ylabel="spectral density")
    if np.isfinite(density).any():
        ax.set_yscale("log")
        ax.set_ylim(1e-7 * np.nanmax(density), 3 * np.nanmax(density))
    return ax


def plot_spectra_over_training(
    epochs: np.ndarray,
    eigenvalues: Sequence[np.ndarray],
    *,
    label: str | None = None,
    color: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Max eigenvalues at each of (n,) epochs, as points, and their median as a line."""
    ax = ax or plt.gca()
    values = [array[np.isfinite(array)] for array in eigenvalues]
    for epoch, column in zip(epochs, values, strict=True):
        ax.plot(np.full(len(column), epoch), column, ".", color=color, alpha=0.15, markersize=3)
    medians = [np.median(column) if len(column) else np.nan for column in values]
    ax.plot(epochs, medians, color=color, label=label)
    ax.set_yscale("symlog", linthresh=1)
    ax.set(xlabel="epoch", ylabel="Hessian max eigenvalues")
    return ax


def plot_over_training(
    epochs: np.ndarray,
    values: np.ndarray,
    half_width: np.ndarray,
    *,
    ylabel: str,
    label: str | None = None,
    color: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A quantity at each of (n,) epochs, with bars of its interval."""
    ax = ax or plt.gca()
    ax.errorbar(epochs, values, half_width, color=color, label=label, marker="o", markersize=3)
    ax.set(xlabel="epoch", ylabel=ylabel)
    return ax


def plot_layers(names: Sequence[str], eigenvalues: np.ndarray, *, ax: Axes | None = None) -> Axes:
    """Heat map of the (layers, k) top eigenvalues of every layer, blue negative, red positive."""
    ax = ax or plt.gca()
    largest = np.abs(eigenvalues[np.isfinite(eigenvalues)]).max(initial=1e-12)
    norm = SymLogNorm(linthresh=largest / 1e3, vmin=-largest, vmax=largest)
    image = ax.imshow(eigenvalues, aspect="auto", cmap="RdBu_r", norm=norm)
    ax.set_yticks(range(len(names)), names, fontsize=6)
    ranks = range(eigenvalues.shape[1])
    ax.set_xticks(ranks, [str(rank + 1) for rank in ranks])
    ax.set(xlabel="eigenvalue, by magnitude")
    ax.grid(False)
    ax.figure.colorbar(image, ax=ax, label="eigenvalue of the layer's Hessian block")
    return ax


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
    """One metric along a direction; `xs` and `values` are (n,) arrays."""
    ax = ax or plt.gca()
    finite = np.where(np.isfinite(values), values, np.nan)
    ax.plot(xs, finite, color=color, label=label, linestyle=linestyle)
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

    The first set is drawn in solid lines, the second dashed (Li et al. 2018, Figure 2). Arrays are
    (n,), errors shares of one.
    """
    ax = ax or plt.gca()
    right = ax.twinx()
    for style, (name, loss) in zip(("-", "--", ":"), losses.items(), strict=False):
        loss, error = (np.where(np.isfinite(v), v, np.nan) for v in (loss, errors[name]))
        ax.plot(xs, loss, style, color=TWIN[0], label=f"NLL, {name}")
        right.plot(xs, 100 * error, style, color=TWIN[1])
        ax.plot([], [], style, color=TWIN[1], label=f"error, {name}")  # for the legend
    if log:
        log_scale(ax)
    ax.set(xlabel=xlabel)
    ax.set_ylabel("NLL", color=TWIN[0])
    right.set_ylabel("error (%)", color=TWIN[1])
    right.set_ylim(0, 100)
    right.grid(False)
    right.spines["right"].set_visible(True)
    return ax


def plot_way(steps: np.ndarray, *, ax: Axes | None = None) -> Axes:
    """Points in the plane of a surface, (n, 2), joined in their order; the first is hollow."""
    ax = ax or plt.gca()
    ax.plot(*steps.T, "-", color="white", linewidth=1)
    if len(steps) <= MARKERS:
        ax.plot(*steps[1:].T, "o", color="white", markeredgecolor="black", markersize=3)
    ax.plot(*steps[0], "o", markerfacecolor="none", markeredgecolor="white", markersize=5)
    return ax


def plot_samples(
    samples: Mapping[str, np.ndarray],
    *,
    ylabel: str,
    colors: Mapping[str, str],
    ax: Axes | None = None,
) -> Axes:
    """The values of each of several groups as dots, beside their mean and its 95 % interval."""
    ax = ax or plt.gca()
    for i, (name, values) in enumerate(samples.items()):
        estimate = across_seeds(values)
        ax.plot(np.full(len(values), i - 0.12), values, ".", color=colors[name], alpha=0.4)
        ax.errorbar(i + 0.12, estimate.mean, estimate.half_width, fmt="o", color=colors[name])
    ax.set_xticks(range(len(samples)), [name.replace(": ", "\n") for name in samples], fontsize=7)
    ax.set(ylabel=ylabel, xlim=(-0.5, len(samples) - 0.5))
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
    """
    ax = ax if ax is not None else plt.subplot(projection="polar")
    ax.plot(np.nan_to_num(angles), distances, "o-", color=color, label=label, markersize=3)
    ax.set_thetamin(0)
    ax.set_thetamax(90 if np.nanmax(angles) <= np.pi / 2 else 180)
    return ax


def shared_norm(surfaces: Sequence[np.ndarray], *, log: bool = True) -> Normalize:
    """One colour scale for several surfaces, from the least to the largest finite value."""
    values = np.concatenate([s[np.isfinite(s)] for s in surfaces] or [np.empty(0)])
    if not len(values):
        return Normalize(0, 1)
    low, high = float(values.min()), float(values.max())
    return LogNorm(low, high) if log and low > 0 and high > low else Normalize(low, high)


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

    Levels are evenly spaced on the scale of `norm`; give one `norm` to several plots to compare
    them. The cross marks the trained weights.
    """
    ax = ax or plt.gca()
    norm = norm or shared_norm([values])
    surface = np.ma.masked_invalid(values)
    edges = np.asarray(norm.inverse(np.linspace(0, 1, levels + 1)))
    ax.contourf(xs, ys, surface, levels=edges, norm=norm)
    lines = ax.contour(xs, ys, surface, levels=edges[1:-1], colors="white", linewidths=0.5)
    ax.clabel(lines, edges[1:-1:2], fontsize=6, fmt="%.3g")
    ax.plot(0, 0, "+", color="white", markersize=7)
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

    `ax` has the projection "3d". matplotlib has no logarithmic axis in 3D, so heights are
    logarithms, labelled with the values, where the scale is.
    """
    ax = ax if ax is not None else plt.subplot(projection="3d")
    norm = norm or shared_norm([values])
    finite = np.where(np.isfinite(values), values, np.nan)
    log = isinstance(norm, LogNorm)
    ax.plot_surface(
        *np.meshgrid(xs, ys),
        np.log10(finite) if log else finite,
        facecolors=mpl.colormaps[STYLE["image.cmap"]](norm(finite)),
        rstride=1,
        cstride=1,
        linewidth=0.1,
        edgecolor=(0, 0, 0, 0.25),
        shade=False,
    )
    if log:
        ticks = np.log10(norm.inverse(np.linspace(0, 1, 5)))
        ax.set_zlim(ticks[0], ticks[-1])
        ax.set_zticks(ticks, [f"{10**tick:.3g}" for tick in ticks])
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.yaxis.set_major_locator(MaxNLocator(3))
    ax.set(xlabel="direction 1", ylabel="direction 2")
    ax.tick_params(labelsize=7, pad=0)
    ax.view_init(elev=30, azim=-55)
    ax.set_box_aspect(None, zoom=0.85)  # leaves room for the labels
    return ax


def plot_history(
    epochs: np.ndarray,
    mean: np.ndarray,
    half_width: np.ndarray,
    *,
    ylabel: str,
    label: str | None = None,
    color: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A quantity over the epochs with its interval: (n,) arrays; NaN is no interval."""
    ax = ax or plt.gca()
    (curve,) = ax.plot(epochs, mean, color=color, label=label)
    ax.fill_between(
        epochs,
        mean - half_width,
        mean + half_width,
        color=curve.get_color(),
        alpha=0.2,
        linewidth=0,
    )
    log_scale(ax)
    ax.set(xlabel="epoch", ylabel=ylabel)
    return ax


def log_scale(ax: Axes) -> Axes:
    """Logarithmic y axis whose ticks are plain numbers; linear if nothing drawn is positive."""
    if not np.isfinite(ax.dataLim.minposy):
        return ax
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    return ax


def plot_optimisation_plane(
    points: Mapping[str, tuple[float, float, float, float]],
    *,
    origin: str,
    colors: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Train NLL against test error, with arrows from `origin` to every other point.

    Where an arrow points says what the bias did: to lower train NLL, it helped the optimisation; to
    lower test error at higher train NLL, it regularised (Park and Kim 2022, Figure 5).

    Parameters
    ----------
    points : mapping of label to (train NLL, its half-interval, test error, its half-interval)
        Half-intervals may be NaN.
    origin : str
        The point that the regions are relative to: the model without the bias.
    """
    ax = ax or plt.gca()
    x0, _, y0, _ = points[origin]
    for i, (label, (x, dx, y, dy)) in enumerate(points.items()):
        color = colors[label] if colors else f"C{i}"
        errors: dict[str, Any] = (
            {"xerr": dx, "yerr": 100 * dy} if np.isfinite([dx, dy]).all() else {}
        )
        ax.errorbar(x, 100 * y, **errors, fmt="o", color=color, label=label, capsize=2, zorder=3)
        if label != origin:
            ax.annotate(
                "",
                (x, 100 * y),
                (x0, 100 * y0),
                arrowprops=dict(arrowstyle="->", color=color, shrinkA=5, shrinkB=5),
            )
    ax.axvline(x0, color="gray", linewidth=0.7, linestyle=":")
    ax.axhline(100 * y0, color="gray", linewidth=0.7, linestyle=":")
    for (x, y), name in {
        (0, 0): "stronger representation",
        (1, 0): "regularised",
        (0, 1): "overfitted",
        (1, 1): "weaker representation",
    }.items():
        ax.text(
            0.02 + 0.96 * x,
            0.02 + 0.96 * y,
            name,
            transform=ax.transAxes,
            ha=("left", "right")[x],
            va=("bottom", "top")[y],
            color="gray",
            style="italic",
            fontsize=8,
        )
    for centre, values, limits in (
        (x0, [(x, dx) for x, dx, _, _ in points.values()], ax.set_xlim),
        (100 * y0, [(100 * y, 100 * dy) for _, _, y, dy in points.values()], ax.set_ylim),
    ):
        reach = 1.2 * max(abs(value - centre) + np.nan_to_num(width) for value, width in values)
        limits(centre - (reach or 1), centre + (reach or 1))  # all four regions are in sight
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set(xlabel="train NLL", ylabel="test error (%)")
    return ax


def plot_points(
    xs: np.ndarray,
    values: np.ndarray,
    half_width: np.ndarray,
    *,
    xlabel: str,
    ylabel: str,
    names: Sequence[str] | None = None,
    line: str = "-",
    label: str | None = None,
    color: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A quantity at (n,) places with bars of its interval, NaN for none.

    `names` label the places, if they are not numbers; `line` is the style of what joins them.
    """
    ax = ax or plt.gca()
    ax.errorbar(
        xs, values, half_width, color=color, label=label, linestyle=line, marker="o", markersize=3
    )
    if names is not None:
        ax.set_xticks(range(len(names)), names)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def plot_bars(
    values: Mapping[str, tuple[float, float]],
    *,
    ylabel: str,
    colors: Mapping[str, str],
    ax: Axes | None = None,
) -> Axes:
    """One bar for each label, with its interval: (value, half-width); NaN is no interval."""
    ax = ax or plt.gca()
    for i, (label, (value, half_width)) in enumerate(values.items()):
        ax.bar(i, value, yerr=half_width, color=colors[label], alpha=0.85, capsize=3)
    ax.set_xticks(
        range(len(values)), [label.replace(" (", "\n(").replace(", ", ",\n") for label in values]
    )
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(visible=False, axis="x")
    ax.set(ylabel=ylabel)
    return ax


def plot_forest(
    rows: Sequence[tuple[str, float, float, float, str]],
    *,
    xlabel: str,
    ax: Axes | None = None,
) -> Axes:
    """Differences with their intervals, one below the other, and zero.

    Parameters
    ----------
    rows : (text, estimate, low, high, colour), from the top
        NaN is not drawn.
    """
    ax = ax or plt.gca()
    for i, (_, estimate, low, high, color) in enumerate(rows):
        ax.plot([low, high], [i, i], color=color, linewidth=2, solid_capstyle="butt")
        ax.plot(estimate, i, "o", color=color, markersize=5)
    ax.axvline(0, color="gray", linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(rows)), [text for text, *_ in rows], fontsize=8)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    ax.set(xlabel=xlabel)
    return ax


def plot_contact_sheet(
    sheet: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Images (rows, columns, height, width, channels) of uint8, side by side."""
    ax = ax or plt.gca()
    n, m, height, width, channels = sheet.shape
    tiles = np.full((n, m, height + 1, width + 1, channels), 255, dtype=np.uint8)
    tiles[:, :, :height, :width] = sheet
    whole = tiles.transpose(0, 2, 1, 3, 4).reshape(n * (height + 1), m * (width + 1), channels)
    ax.imshow(whole if channels == 3 else whole[..., 0], cmap="gray", vmin=0, vmax=255)
    ax.set_yticks((np.arange(n) + 0.45) * (height + 1), rows)
    ax.set_xticks((np.arange(m) + 0.45) * (width + 1), columns)
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax
