"""Errors under corruptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes


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
