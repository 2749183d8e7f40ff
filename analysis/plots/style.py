"""What all plots have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

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


def log_scale(ax: Axes) -> Axes:
    """Logarithmic y axis whose ticks are plain numbers; linear if nothing drawn is positive."""
    if not np.isfinite(ax.dataLim.minposy):
        return ax
    ax.set_yscale("log")
    wide = ax.dataLim.y1 > 1e3 * ax.dataLim.minposy
    ax.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 1.5, 2, 3, 5, 7)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    return ax
