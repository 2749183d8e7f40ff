"""Which measurements go into which figure. How they are drawn is in `analysis.plots`.

Every function here writes into the folder `out` and returns the files it wrote. No PyTorch is
needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from models.files import replacing


def save(figure: Figure, out: Path, stem: str, formats: Sequence[str]) -> list[Path]:
    """Write `figure` in each format, whole or not at all."""
    paths = [out / f"{stem}.{extension}" for extension in formats]
    for path in paths:
        with replacing(path) as partial:
            figure.savefig(partial, format=path.suffix[1:], dpi=150)
    return paths
