"""Differences with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from lossgeometry.plots.style import fitted, room

TEXTS = 0.6  # of the width, at most


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

    See Also
    --------
    plot_points : quantities with their intervals, side by side.

    Examples
    --------
    >>> rows = [("5 x 5", -0.1, -0.2, 0.0, "C0"), ("3 x 3", 0.1, -0.1, 0.3, "C1")]
    >>> ax = plot_forest(rows, xlabel="train NLL, less that of 8 x 8")
    """
    ax = ax or plt.gca()
    for i, (_, estimate, low, high, color) in enumerate(rows):
        ax.plot([low, high], [i, i], color=color, linewidth=2, solid_capstyle="butt")
        ax.plot(estimate, i, "o", color=color, markersize=5)
    ax.axvline(0, color="gray", linewidth=0.8, linestyle=":")
    texts = [fitted(text, TEXTS * room(ax), 8) for text, *_ in rows]
    ax.set_yticks(range(len(rows)), texts, fontsize=8)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    ax.set(xlabel=xlabel)
    return ax
