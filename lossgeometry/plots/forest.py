"""Differences with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from lossgeometry.plots.style import fitted, room

TEXTS = 0.6  # of the width, at most
BETWEEN = 0.7  # lines of text between two rows


def plot_forest(
    rows: Sequence[tuple[str, float, float, float, str]],
    *,
    xlabel: str,
    ax: Axes | None = None,
) -> Axes:
    """Differences with their intervals, one below the other, and zero.

    A row is as high as its text has lines; the y axis counts lines.

    Parameters
    ----------
    rows : (text, estimate, low, high, colour), from the top
        NaN is not drawn.

    See Also
    --------
    plot_points : quantities with their intervals, side by side.

    Examples
    --------
    >>> rows = [("5 x 5", -0.1, -0.2, 0.0, "C0"), ("3 x 3", 0.1, -0.1, 0.3, "C1")]
    >>> ax = plot_forest(rows, xlabel="train NLL, less that of 8 x 8")
    """
    ax = ax or plt.gca()
    texts = [fitted(text, TEXTS * room(ax), 8) for text, *_ in rows]
    lines = np.array([1 + text.count("\n") + BETWEEN for text in texts])
    places = np.cumsum(lines) - lines / 2
    for y, (_, estimate, low, high, color) in zip(places, rows, strict=True):
        ax.plot([low, high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
        ax.plot(estimate, y, "o", color=color, markersize=5)
    ax.axvline(0, color="gray", linewidth=0.8, linestyle=":")
    ax.set_yticks(places, texts, fontsize=8)
    ax.set_ylim(lines.sum(), 0)
    ax.grid(visible=False, axis="y")
    ax.set(xlabel=xlabel)
    return ax
