"""Train NLL, test error and curvature, over a training and at its end."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import LineStyleType

from lossgeometry.plots.style import entry, fitted, log_scale, room

WIDE = 4  # times the smallest: numbers that are farther apart need a logarithmic axis


def plot_history(
    epochs: np.ndarray,
    mean: np.ndarray,
    half_width: np.ndarray,
    *,
    ylabel: str,
    label: str | None = None,
    color: str | None = None,
    linestyle: LineStyleType = "-",
    ax: Axes | None = None,
) -> Axes:
    """A quantity over the epochs with its interval: (n,) arrays; NaN is no interval.

    See Also
    --------
    plot_over_training : with bars, on a linear axis.
    """
    ax = ax or plt.gca()
    (curve,) = ax.plot(epochs, mean, color=color, label=entry(label), linestyle=linestyle)
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
        Errors are shares of one, and drawn in percent. Half-intervals may be NaN.
    origin : str
        The point that the regions are relative to: the model without the bias.

    See Also
    --------
    plot_families : of several families of networks.

    Examples
    --------
    >>> points = {"global": (0.9, 0.1, 0.31, 0.02), "5 x 5": (0.8, 0.1, 0.27, 0.01)}
    >>> ax = plot_optimisation_plane(points, origin="global")
    """
    ax = ax or plt.gca()
    x0, _, y0, _ = points[origin]
    known = bool(np.isfinite([x0, y0]).all())  # else there are no regions
    for i, (label, (x, dx, y, dy)) in enumerate(points.items()):
        color = colors[label] if colors else f"C{i}"
        errors: dict[str, Any] = (
            {"xerr": dx, "yerr": 100 * dy} if np.isfinite([dx, dy]).all() else {}
        )
        style: dict[str, Any] = dict(color=color, label=entry(label), capsize=2, zorder=3)
        ax.errorbar(x, 100 * y, **errors, fmt="o", **style)
        if label != origin and known and np.isfinite([x, y]).all():
            ax.annotate(
                "",
                (x, 100 * y),
                (x0, 100 * y0),
                arrowprops=dict(arrowstyle="->", color=color, alpha=0.5, shrinkA=5, shrinkB=5),
                zorder=1,  # no arrow hides a point
            )
    ax.axvline(x0, color="gray", linewidth=0.7, linestyle=":")
    ax.axhline(100 * y0, color="gray", linewidth=0.7, linestyle=":")
    for (x, y), name in {
        (0, 0): "stronger representation",
        (1, 0): "regularised",
        (0, 1): "overfitted",
        (1, 1): "weaker representation",
    }.items():
        if not known:
            break
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
        finite = [
            (value, np.nan_to_num(width, posinf=0)) for value, width in values if np.isfinite(value)
        ]
        if np.isfinite(centre):
            reach = 1.2 * max(abs(value - centre) + width for value, width in finite)
            limits(centre - (reach or 1), centre + (reach or 1))  # all four regions are in sight
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set(xlabel="train NLL", ylabel="test error (%)")
    return ax


def plot_families(
    families: Mapping[str, Sequence[tuple[str, float, float, float, float]]],
    *,
    colors: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Train NLL against test error of several families of networks (Park and Kim 2022, Figure 5).

    In each, arrows lead from its first network to the others: to lower train NLL where what they
    have in its place helps the optimisation, to lower error at higher train NLL where it is a
    regularisation. Axes are logarithmic where networks are apart by more than a factor of four.

    Parameters
    ----------
    families : mapping of label to networks
        Each a tuple: its name, its train NLL, the half-interval of that, its test error as a share
        of one, and the half-interval of that; NaN is no interval. Networks of one name have one
        marker, which the legend names, too; those without a name, "", are diamonds.

    See Also
    --------
    plot_optimisation_plane : of one family, with the regions named.

    Examples
    --------
    >>> plain = [("global", 0.9, 0.1, 0.31, 0.02), ("5 x 5", 0.8, 0.1, 0.27, 0.01)]
    >>> pyramid = [("global", 0.7, 0.1, 0.25, 0.02), ("5 x 5", 0.6, 0.1, 0.24, 0.01)]
    >>> ax = plot_families({"plain": plain, "pyramid": pyramid})
    """
    ax = ax or plt.gca()
    names = dict.fromkeys(name for members in families.values() for name, *_ in members if name)
    markers = {"": "D", **dict(zip(names, itertools.cycle("os^vP")))}
    for i, (label, members) in enumerate(families.items()):
        color = colors[label] if colors else f"C{i}"
        _, x0, _, y0, _ = members[0]
        for k, (name, x, dx, y, dy) in enumerate(members):
            style: dict[str, Any] = dict(color=color, alpha=0.8, markersize=5, capsize=2)
            ax.errorbar(x, 100 * y, 100 * dy, dx, fmt=markers[name], **style)
            if k > 0 and np.isfinite([x, y, x0, y0]).all():
                arrow = dict(arrowstyle="->", color=color, shrinkA=5, shrinkB=5)
                ax.annotate("", (x, 100 * y), (x0, 100 * y0), arrowprops=arrow)
        marker = "" if members[0][0] else markers[""]
        ax.plot([], [], color=color, marker=marker, label=entry(label))
    for name in names:
        ax.plot([], [], marker=markers[name], color="gray", linestyle="", label=entry(name))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    places: dict[Literal["x", "y"], int] = {"x": 1, "y": 3}
    for which, place in places.items():
        ends = np.array([member[place] for members in families.values() for member in members])
        known = ends[np.isfinite(ends)]
        if len(known) and known.max() > WIDE * known.min() > 0:
            log_scale(ax, which)
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
    line: LineStyleType = "-",
    label: str | None = None,
    color: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A quantity at (n,) places with bars of its interval, NaN for none.

    `names` label the places, if they are not numbers; `line` is the style of what joins them.

    See Also
    --------
    plot_samples : of the single values.
    lossgeometry.Eigenpairs.plot : draws with it.
    """
    ax = ax or plt.gca()
    style: dict[str, Any] = dict(color=color, label=entry(label), marker="o", markersize=3)
    ax.errorbar(xs, values, half_width, linestyle=line, **style)
    if names is not None:
        slot = 1.3 * room(ax, len(names))  # ticks may be made smaller than this size
        ax.set_xticks(range(len(names)), [fitted(name, slot) for name in names])
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def plot_curvature(
    steps: np.ndarray,
    eigenvalues: np.ndarray,
    errors: np.ndarray,
    *,
    threshold: np.ndarray | None = None,
    label: str = "eigenvalue",
    color: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Largest eigenvalues over the steps of a training, and where its steps become unstable.

    Parameters
    ----------
    steps : (n,) array
    eigenvalues, errors : (n, k) array
        The k largest, drawn with bands of their errors, the first on top.
    threshold : (n,) array, optional
        Largest curvature at which the optimizer's steps are stable, a dashed line.

    See Also
    --------
    plot_over_training : any quantity, over epochs.
    lossgeometry.CurvatureTracker.plot : draws with it.
    """
    ax = ax or plt.gca()
    for i in reversed(range(eigenvalues.shape[1])):
        values, error = eigenvalues[:, i], errors[:, i]
        name = entry(label if i == 0 else None)
        (curve,) = ax.plot(steps, values, color=color, alpha=1.0 if i == 0 else 0.4, label=name)
        style: dict[str, Any] = dict(color=curve.get_color(), alpha=0.2, linewidth=0)
        ax.fill_between(steps, values - error, values + error, **style)
        color = style["color"]
    if threshold is not None and np.isfinite(threshold).any():
        ax.plot(steps, threshold, "--", color="gray", label="stability threshold")
    ax.set(xlabel="step", ylabel="largest eigenvalues of the Hessian")
    return ax
