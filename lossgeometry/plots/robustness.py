"""Errors under corruptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from lossgeometry.plots.style import fitted, room


def plot_bars(
    values: Mapping[str, tuple[float, float]],
    *,
    ylabel: str,
    colors: Mapping[str, str],
    ax: Axes | None = None,
) -> Axes:
    """One bar for each label, with its interval: (value, half-width); NaN is no interval.

    See Also
    --------
    plot_points : at places along an axis.
    plot_contact_sheet : the images that were measured.
    """
    ax = ax or plt.gca()
    for i, (label, (value, half_width)) in enumerate(values.items()):
        if np.isfinite(value):
            ax.bar(i, value, yerr=half_width, color=colors[label], alpha=0.85, capsize=3)
        else:
            ax.text(i, 0, f"{value:g}", color=colors[label], ha="center", va="bottom")
    slot = room(ax, len(values))
    narrow = [label.replace(" (", "\n(").replace(", ", ",\n") for label in values]
    ax.set_xticks(range(len(values)), [fitted(label, slot, 8) for label in narrow])
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(visible=False, axis="x")
    ax.set(ylabel=ylabel)
    return ax


def plot_contact_sheet(
    sheet: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Images (rows, columns, height, width, channels) of uint8, side by side.

    See Also
    --------
    plot_bars : what networks make of the images.
    """
    ax = ax or plt.gca()
    n, m, height, width, channels = sheet.shape
    tiles = np.full((n, m, height + 1, width + 1, channels), 255, dtype=np.uint8)
    tiles[:, :, :height, :width] = sheet
    whole = tiles.transpose(0, 2, 1, 3, 4).reshape(n * (height + 1), m * (width + 1), channels)
    ax.imshow(whole if channels == 3 else whole[..., 0], cmap="gray", vmin=0, vmax=255)
    ax.set_yticks(
        (np.arange(n) + 0.45) * (height + 1), [fitted(name, room(ax, 2)) for name in rows]
    )
    slot = room(ax, m)
    ax.set_xticks((np.arange(m) + 0.45) * (width + 1), [fitted(name, slot) for name in columns])
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax
