"""What all plots have in common."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.typing import LineStyleType

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

LINES: tuple[LineStyleType, ...] = (  # to be told apart without their colours, too
    "-",
    "--",
    ":",
    "-.",
    (0, (7, 1.5)),
    (0, (7, 1.5, 1.5, 1.5)),
)
LEGEND = 2.4  # inches of an entry
LEAST = 0.8  # inches of the name of a tick, before it is broken


def log_scale(ax: Axes, which: Literal["x", "y"] = "y") -> Axes:
    """Logarithmic axis whose ticks are plain numbers; linear if nothing drawn is positive.

    To be called when everything is drawn: the ticks are chosen for that.

    See Also
    --------
    plot_line : what may need it.
    """
    axis, least = (ax.xaxis, ax.dataLim.minposx) if which == "x" else (ax.yaxis, ax.dataLim.minposy)
    if not np.isfinite(least):
        return ax
    ax.set(**{f"{which}scale": "log"})
    largest = ax.dataLim.x1 if which == "x" else ax.dataLim.y1
    wide = largest > 1e3 * least
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
    return ax


def literal(text: str) -> str:
    """`text` so that matplotlib draws it as it is.

    Between dollars it would see a formula, and labels that begin with an underscore it leaves out
    of legends; a space without width before it shows them.
    """
    escaped = text.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{escaped}" if text.startswith("_") else escaped


def wrapped(text: str, inches: float, size: float = STYLE["font.size"]) -> str:
    """`text` in lines of at most so many `inches` at a font `size`."""
    lines = []
    for rest in text.split("\n"):
        while width(rest, size) > inches:
            fits = next((n for n in range(1, len(rest)) if width(rest[: n + 1], size) > inches), 1)
            breaks = [m.end() for m in re.finditer(r"[\s,:;/_.-]+", rest[:fits])]
            cut = breaks[-1] if breaks else fits
            lines.append(rest[:cut].rstrip())
            rest = rest[cut:]
        lines.append(rest)
    return "\n".join(lines)


def fitted(text: str, inches: float, size: float = STYLE["font.size"]) -> str:
    """`text` as it is, see `literal`, and in lines that fit, see `wrapped`."""
    return literal(wrapped(text, inches, size))


def entry(label: str | None) -> str | None:
    """A label as it is, in lines that fit into a legend."""
    return label and fitted(label, LEGEND)


def room(ax: Axes, names: int = 1) -> float:
    """Inches along the x axis, before it is laid out, for each of so many names."""
    return max(ax.bbox.width / ax.figure.dpi / max(names, 1), LEAST)


def width(text: str, size: float = STYLE["font.size"]) -> float:
    """Of one line, in inches."""
    font = FontProperties(size=size)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]) / 72


def tell_apart(values: np.ndarray) -> list[str]:
    """Numbers for the ticks of a scale: of three digits, or as many as their differences take."""
    texts: list[str] = []
    for digits in range(3, 18):
        texts = [f"{value:.{digits}g}" for value in values]
        if len(set(texts)) == len(np.unique(values)):
            break
    return texts
