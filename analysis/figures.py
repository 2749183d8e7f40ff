"""``python -m analysis.figures``: draw every figure from the measurement files alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from analysis.options import Out
from models.cli import run
from models.errors import InputError

FORMATS = ("png", "svg", "pdf")


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
    for path in draw_all(options.measurements, options.out, options.formats):
        print(f"wrote {path}")


def draw_all(folder: Path, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Every figure of the measurements in `folder` and below it.

    Raises `InputError` if there are none, or a format is unknown.
    """
    from analysis import labels
    from analysis.claims import judge
    from analysis.drawing.claims import draw_claims
    from analysis.drawing.hessians import (
        draw_hessian_comparison,
        draw_hessian_training,
        draw_hessians,
        draw_layers,
    )
    from analysis.drawing.landscapes import draw_landscapes
    from analysis.drawing.nll import draw_nll, draw_windows
    from analysis.drawing.robustness import draw_robustness
    from analysis.measurements import collect

    for extension in formats:
        if extension not in FORMATS:
            raise InputError(f"formats: {extension!r} found, expected some of {', '.join(FORMATS)}")
    if not any(folder.rglob("*.h5")):
        raise InputError(f"measurements: no HDF5 file in {folder}, measure a checkpoint first")
    written = []
    for objective in ("train", "train_test", "clean", "clean_test"):
        spectra = collect([folder], f"hessian/{objective}")
        own = [m for m in spectra if labels.home(m) == folder]
        written += draw_hessians(own, out, formats)
        written += draw_layers(own, out, formats)
        written += draw_hessian_comparison(spectra, out, formats)
        written += draw_hessian_training(spectra, out, formats)
        surfaces = collect([folder], f"landscape/{objective}")
        written += draw_landscapes(surfaces, out, formats)
    histories = collect([folder], "history")
    written += draw_nll(histories, out, formats)
    written += draw_windows(histories, out, formats)
    written += draw_robustness(collect([folder], "robustness"), out, formats)
    return written + draw_claims(judge([folder]), out, formats)


if __name__ == "__main__":
    run(main, Options)
