"""``python -m analysis.figures``: draw every figure from the measurement files alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from analysis.options import Out, Scale
from models.cli import run
from models.errors import InputError

FORMATS = ("png", "svg", "pdf")
OF_SURFACES = ("html", "vtu")


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
    """Draw what there is, and name the files."""
    for path in draw_all(options.measurements, options.out, options.formats, scale=options.scale):
        print(f"wrote {path}")


def draw_all(
    folder: Path, out: Path, formats: Sequence[str] = ("png",), *, scale: str = "log"
) -> list[Path]:
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
    from analysis.drawing.landscapes import KINDS, draw_landscapes
    from analysis.drawing.nll import draw_nll, draw_windows
    from analysis.drawing.robustness import draw_robustness
    from analysis.measurements import collect

    for extension in formats:
        if extension not in FORMATS + OF_SURFACES:
            known = ", ".join(FORMATS + OF_SURFACES)
            raise InputError(f"formats: {extension!r} found, expected some of {known}")
    if not any(folder.rglob("*.h5")):
        raise InputError(f"measurements: no HDF5 file in {folder}, measure a checkpoint first")
    still = [extension for extension in formats if extension in FORMATS]
    written = []
    for objective in ("train", "train_test", "clean", "clean_test"):
        spectra = collect([folder], f"hessian/{objective}")
        own = [m for m in spectra if labels.home(m) == folder]
        written += draw_hessians(own, out, still)
        written += draw_layers(own, out, still)
        written += draw_hessian_comparison(spectra, out, still)
        written += draw_hessian_training(spectra, out, still)
        for kind in KINDS:
            surfaces = collect([folder], f"landscape{kind}/{objective}")
            written += draw_landscapes(surfaces, out, formats, scale=scale)
    histories = collect([folder], "history")
    written += draw_nll(histories, out, still)
    written += draw_windows(histories, out, still)
    written += draw_robustness(collect([folder], "robustness"), out, still)
    return written + draw_claims(judge([folder]), out, still)


if __name__ == "__main__":
    run(main, Options, alone=True)
