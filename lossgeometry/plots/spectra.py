"""Hessian spectra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter
from matplotlib.typing import LineStyleType

from lossgeometry.plots.style import entry, fitted, room

FEW = 10  # values: a density of fewer shows the kernel


def kernel_density(magnitudes: np.ndarray, of: int) -> tuple[np.ndarray, np.ndarray]:
    """Density per decade of positive `magnitudes` (n,), times their share of so many in all.

    A Gaussian kernel density of their logarithms, of Scott's bandwidth, with the points that it is
    at. Both are empty where there are fewer values than `FEW`, or all are the same.
    """
    logs = np.log10(magnitudes)
    if len(logs) < FEW or np.ptp(logs) == 0:
        return np.empty(0), np.empty(0)
    width = logs.std(ddof=1) * len(logs) ** -0.2
    grid = np.linspace(logs.min() - 3 * width, logs.max() + 3 * width, 200)
    bells = np.exp(-(((grid[:, None] - logs) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
    return 10**grid, len(logs) / of * bells.mean(axis=1)


def plot_max_eigenvalues(
    eigenvalues: np.ndarray,
    half: str,
    *,
    label: str | None = None,
    color: str | None = None,
    linestyle: LineStyleType = "-",
    ax: Axes | None = None,
) -> Axes:
    """Density of the Hessian max eigenvalues on one side of zero.

    The curve is a Gaussian kernel density of their logarithms, times their share of all, and the
    ticks below are the eigenvalues. Fewer than ten have no curve, and ticks as high as the axis.

    Parameters
    ----------
    eigenvalues : (n_batches, k) array
    half : {"negative", "positive"}
        The side of zero.

    See Also
    --------
    plot_spectra_over_training : over the epochs.
    lossgeometry.MaxEigenvalueSpectrum.plot : draws with it.
    """
    ax = ax or plt.gca()
    finite = eigenvalues[np.isfinite(eigenvalues)]
    magnitudes = np.abs(finite[finite < 0 if half == "negative" else finite > 0])
    share = len(magnitudes) / max(eigenvalues.size, 1)
    label = entry(f"{label or ''} ({share:.1%})".strip())
    grid, density = kernel_density(magnitudes, eigenvalues.size)
    ax.plot(grid, density, color=color, label=label, linestyle=linestyle)
    ax.fill_between(grid, density, color=color, alpha=0.15, linewidth=0)
    if len(density):
        ax.plot(magnitudes, np.zeros(len(magnitudes)), "|", color=color, markersize=6, alpha=0.4)
    else:
        for value in magnitudes:
            ax.axvline(value, color=color, alpha=0.4, linestyle=linestyle)
    if len(magnitudes):
        ax.set_xscale("log")
        decades = np.log10(ax.dataLim.x1 / ax.dataLim.x0)
        subs = (1, 3) if decades > 1.7 else (1, 2, 5)
        ax.xaxis.set_major_locator(LogLocator(subs=subs) if decades > 0.5 else MaxNLocator(4))
        ax.xaxis.set_minor_formatter(NullFormatter())
        sign = "-" if half == "negative" else ""
        ax.xaxis.set_major_formatter(lambda value, _: f"${sign}{value:g}$")
    if not ax.dataLim.width > 0:  # as yet there is one, or none
        only = [float(f"{x:.2g}") for x in (ax.dataLim.x0,) if np.isfinite(x)]
        ax.xaxis.set_major_locator(FixedLocator(only))
    if half == "negative":
        ax.xaxis.set_inverted(True)
    ax.set(xlabel=f"{half} Hessian max eigenvalues", ylabel="density per decade")
    ax.set_ylim(bottom=0, auto=True)
    # Without a curve there is no density to read off.
    ax.yaxis.set_visible(any(np.size(line.get_xdata()) > 2 for line in ax.lines))
    return ax


def plot_spectral_density(
    grid: np.ndarray,
    density: np.ndarray,
    standard_error: np.ndarray,
    *,
    systematic_error: np.ndarray | float = 0.0,
    label: str | None = None,
    color: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Density of all eigenvalues on a logarithmic axis, with a band of its errors.

    `grid`, `density` and its errors are (n,) arrays; the band is of two standard errors and the
    systematic one.

    See Also
    --------
    plot_max_eigenvalues : the outermost eigenvalues alone.
    lossgeometry.SpectralDensity.plot : draws with it.
    """
    ax = ax or plt.gca()
    density = np.where(np.isfinite(density), density, np.nan)
    (curve,) = ax.plot(grid, density, color=color, label=entry(label))
    error = 2 * standard_error + systematic_error
    ax.fill_between(
        grid, density - error, density + error, color=curve.get_color(), alpha=0.2, linewidth=0
    )
    ax.set(xlabel="Hessian eigenvalue", ylabel="spectral density")
    if (density > 0).any():
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
    """Max eigenvalues at each of (n,) epochs, as points, and their median as a line.

    `eigenvalues` has an array of any shape for each of the epochs.

    See Also
    --------
    plot_max_eigenvalues : at one epoch.
    plot_over_training : one quantity, such as NEP, with its interval.
    """
    ax = ax or plt.gca()
    values = [array[np.isfinite(array)] for array in eigenvalues]
    for epoch, column in zip(epochs, values, strict=True):
        ax.plot(np.full(len(column), epoch), column, ".", color=color, alpha=0.15, markersize=3)
    medians = [np.median(column) if len(column) else np.nan for column in values]
    ax.plot(epochs, medians, color=color, label=entry(label))
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
    """A quantity at each of (n,) epochs, with bars of its interval.

    See Also
    --------
    plot_history : with a band, on a logarithmic axis.
    plot_spectra_over_training : the eigenvalues themselves.
    """
    ax = ax or plt.gca()
    style: dict[str, Any] = dict(color=color, label=entry(label), marker="o", markersize=3)
    ax.errorbar(epochs, values, half_width, **style)
    ax.set(xlabel="epoch", ylabel=ylabel)
    return ax


def plot_layers(names: Sequence[str], eigenvalues: np.ndarray, *, ax: Axes | None = None) -> Axes:
    """Heat map of the (layers, k) top eigenvalues of every layer, blue negative, red positive.

    See Also
    --------
    lossgeometry.per_layer : an operator for each layer.
    lossgeometry.eigsh : its top eigenvalues.
    """
    ax = ax or plt.gca()
    finite = eigenvalues[np.isfinite(eigenvalues)]
    largest = np.abs(finite).max(initial=1e-12)
    linear = 10.0 ** np.ceil(np.log10(largest / 1e3))  # a power of ten, for labels not to overlap
    norm = SymLogNorm(linthresh=linear, vmin=-largest, vmax=largest)
    image = ax.imshow(eigenvalues, aspect="auto", cmap="RdBu_r", norm=norm)
    texts = [fitted(name, room(ax), 6) for name in names]
    ax.set_yticks(range(len(names)), texts, fontsize=6)
    ranks = range(eigenvalues.shape[1])
    ax.set_xticks(ranks, [str(rank + 1) for rank in ranks])
    ax.set(xlabel="eigenvalue, by magnitude")
    ax.grid(False)
    bar = ax.figure.colorbar(image, ax=ax, label="eigenvalue of the layer's Hessian block")
    low, high = finite.min(initial=0.0), finite.max(initial=0.0)
    bar.ax.set_ylim(low, high if low < high else largest)
    return ax
