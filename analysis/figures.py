"""``python -m analysis.figures``: draw every figure from the measurement files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from analysis.options import Out, Scale
from lossgeometry.errors import InputError, raise_left_out
from models.cli import arg, run


@dataclass(frozen=True)
class Options:
    """Draw every figure again from the measurement files, without models, datasets or PyTorch.

    Single checkpoints get their own figures if their HDF5 file lies in the folder itself;
    comparisons are drawn of those in it and below it.
    """

    measurements: Annotated[Path, arg(metavar="DIR", help="folder of the HDF5 files")] = Path(
        "checkpoints"
    )
    formats: Annotated[
        tuple[str, ...],
        arg(
            metavar="EXT [EXT ...]",
            help="png, svg, pdf; of surfaces also html, to rotate in a browser, and vtu, for "
            "ParaView",
        ),
    ] = ("png",)
    scale: Scale = "log"
    out: Out = Path("figures")


def main(options: Options) -> None:
    """Draw what there is, and name the files, at the end those that could not be used."""
    from analysis.drawing.everything import draw_all

    left_out: list[InputError] = []
    folder, out, formats = options.measurements, options.out, options.formats
    for path in draw_all(folder, out, formats, scale=options.scale, left_out=left_out):
        print(f"wrote {path}")
    raise_left_out(left_out)


if __name__ == "__main__":
    run(main, Options, alone=True)
