"""Which measurements go into which figure. How they are drawn is in `lossgeometry.plots`.

Every function here writes into the folder `out` and returns the files it wrote. No PyTorch is
needed.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis.measurements import labels
from analysis.measurements.comparisons import file_stem
from analysis.measurements.schema import Measurement
from lossgeometry import plots
from models.files import replacing

TITLE = 1.2 * plots.STYLE["font.size"]  # of a figure
DPI = 150
LONGEST = 180  # bytes of a name, to which endings are added


def save(figure: Figure, out: Path, stem: str, formats: Sequence[str]) -> list[Path]:
    """Write `figure` in each format, whole or not at all; too long a name ends in its hash."""
    paths = [out / f"{short(stem)}.{extension}" for extension in formats]
    for path in paths:
        with replacing(path) as partial:
            render(figure, partial, path.suffix[1:])
    return paths


def render(figure: Figure, path: Path, extension: str) -> None:
    """Draw `figure` into a file of a format."""
    if extension == "png":  # the same picture, without savefig's first pass for nothing
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure).print_png(path)
    else:
        figure.savefig(path, format=extension, dpi=DPI)


def short(stem: str) -> str:
    """A name that file systems take."""
    whole = stem.encode(errors="surrogateescape")
    if len(whole) <= LONGEST:
        return stem
    start = whole[: LONGEST - 9].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(whole).hexdigest()[:8]}"


def compared(group: Sequence[Measurement], origin: str = "") -> str:
    """Part of a file name: what is compared.

    The dataset, the family and the `origin`, or the checkpoints, if little is known of them.
    """
    foreign = labels.foreign(group[0])
    what = labels.dataset(group[0]) if foreign else labels.comparable(group[0])
    own = [labels.name(m) for m in group] if foreign else [origin]
    return "_".join([file_stem(what), *filter(None, own)])


def alike(measurements: Sequence[Measurement], stem: str) -> list[Measurement]:
    """Those that can be compared in the figure `stem`; says which it lacks, and why."""
    kept = labels.measured_alike(measurements)
    for m in measurements:
        if all(m is not other for other in kept):
            why = labels.difference(m, kept[0])
            print(f"{stem} is without {m.path}, measured with {why}", file=sys.stderr)
    return kept


def head(figure: Figure, text: str) -> None:
    """Title of a figure, as it is and within its width."""
    figure.suptitle(plots.fitted(text, figure.get_figwidth() - 0.2, TITLE))


def more(texts: Iterable[str], usual: int, size: float = plots.STYLE["font.size"]) -> float:
    """Inches that the longest of `texts` takes for its lines beyond so many."""
    lines = max(text.count("\n") + 1 for text in texts)
    return 1.4 * size / 72 * max(lines - usual, 0)


def legend(figure: Any, ax: Axes, *, most: int, title: str | None = None) -> None:
    """Below a figure, what is drawn in `ax`, each text once, in as many columns as fit."""
    handles, texts = ax.get_legend_handles_labels()
    own = dict(zip(texts, handles, strict=True))
    widths = [max(plots.width(line) for line in text.split("\n")) for text in own]
    inches = figure.bbox.width / figure.dpi
    columns = min(most, len(own))
    while columns > 1 and _legend_width(widths, columns) > inches:
        columns -= 1
    figure.legend(own.values(), own, loc="outside lower center", ncols=columns, title=title)


def _legend_width(widths: Sequence[float], columns: int) -> float:
    """Inches of a legend whose texts are so wide; a handle and its spaces take 5 letters."""
    parts = np.array_split(np.asarray(widths), columns)
    return float(sum(part.max() for part in parts)) + columns * 5 * plots.STYLE["font.size"] / 72
