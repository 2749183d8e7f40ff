"""``python -m analysis.published``: the paper's own loss surfaces beside those measured here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from analysis.options import Out, Scale, require_writable
from lossgeometry.errors import InputError, raise_left_out
from models.cli import arg, run


@dataclass(frozen=True)
class Options:
    """Draw loss surfaces that Park and Kim published beside those of this project (Figure 1a).

    Their files, in the repository of *How Do Vision Transformers Work?*, have one line for each
    point of a grid: x, y, L1, L2, NLL and further metrics, without a header. Drawn is NLL + 0.05 L2
    as in the paper, whose L2 is the sum of the parameters' norms, not of their squares; where their
    NLL is infinite there is a hole.
    """

    csv: Positional[Annotated[tuple[Path, ...], arg(metavar="CSV", help="published surfaces")]]
    measurements: Annotated[
        Path, arg(metavar="DIR", help="folder of the HDF5 files of this project's surfaces")
    ] = Path("checkpoints")
    scale: Scale = "log"
    out: Out = Path("figures")


def main(options: Options) -> None:
    """Draw, and name the files."""
    if not options.csv:
        raise InputError("csv: none given, expected at least one file")
    require_writable("out", options.out)

    import matplotlib as mpl
    import numpy as np

    from analysis.drawing import save
    from analysis.drawing.published import draw, own_surfaces, read_surface
    from lossgeometry import plots

    published = [read_surface(path) for path in options.csv]
    for surface in published:
        holes = int((~np.isfinite(surface.values)).sum())
        print(f"{surface.title}: {surface.values.shape} points, {holes} of them not finite")
    left_out: list[InputError] = []
    rows = {"Park and Kim": published, "here": own_surfaces(options.measurements, left_out)}
    with mpl.rc_context(plots.STYLE):
        for kind in ("surfaces", "contours"):
            figure = draw({k: v for k, v in rows.items() if v}, kind, log=options.scale == "log")
            for path in save(figure, options.out, f"published_{kind}", ["png"]):
                print(f"wrote {path}")
    raise_left_out(left_out)


if __name__ == "__main__":
    run(main, Options, alone=True)
