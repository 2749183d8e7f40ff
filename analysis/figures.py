"""``python -m analysis.figures``: draw every figure from the measurement files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from analysis.options import Out
from models.cli import run


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
        tuple[str, ...], arg(metavar="EXT [EXT ...]", help="file formats: png, svg, pdf")
    ] = ("png",)
    out: Out = Path("figures")


def main(options: Options) -> None:
    """Draw what there is, and name the files."""
    from analysis import drawing

    for path in drawing.draw_all(options.measurements, options.out, options.formats):
        print(f"wrote {path}")


if __name__ == "__main__":
    run(main, Options)
