"""Lines and surfaces of the loss, and ways across them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import LineStyleType

from analysis.plots.style import STYLE, log_scale
from analysis.statistics import across_seeds

MARKERS = 20  # points of a way that can still be told apart
TWIN = ("#0072b2", "#d55e00")  # of the left and the right axis


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
    """The values of each of several groups as dots, beside their mean and its 95 % interval.

    Infinite ones are counted at the upper edge, and have no mean.
    """
    ax = ax or plt.gca()
    for i, (name, values) in enumerate(samples.items()):
        estimate = across_seeds(values)
        ax.plot(np.full(len(values), i - 0.12), values, ".", color=colors[name], alpha=0.4)
        ax.errorbar(i + 0.12, estimate.mean, estimate.half_width, fmt="o", color=colors[name])
        infinite = np.isposinf(values).sum()
        if infinite:
            text, edge = f"{infinite} of {len(values)}: $\\infty$", ax.get_xaxis_transform()
            ax.text(i + 0.12, 1, text, transform=edge, ha="center", va="top", fontsize=7)
    ticks = [re.sub(r": |(?<=,) | (?=\()", "\n", name) for name in samples]  # in narrow lines
    ax.set_xticks(range(len(samples)), ticks, fontsize=7)
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
