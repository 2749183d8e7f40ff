"""``python -m analysis.figures``: draw every figure from the measurement files alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from analysis.options import Out, Scale
from lossgeometry.errors import InputError, raise_left_out
from models.cli import run

if TYPE_CHECKING:
    from analysis.measurements.schema import Measurement

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
    """Draw what there is, and name the files, at the end those that could not be used."""
    left_out: list[InputError] = []
    folder, out, formats = options.measurements, options.out, options.formats
    for path in draw_all(folder, out, formats, scale=options.scale, left_out=left_out):
        print(f"wrote {path}")
    raise_left_out(left_out)


def draw_all(
    folder: Path,
    out: Path,
    formats: Sequence[str] = ("png",),
    *,
    scale: str = "log",
    left_out: list[InputError] | None = None,
) -> list[Path]:
    """Every figure of the measurements in `folder` and below it.

    What is wrong with files that cannot be used is added to `left_out`; without it, it is raised.

    Raises
    ------
    InputError
        If there are no measurements, or a format is unknown.
    """
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
    from analysis.measurements import labels
    from analysis.measurements.files import collect, sparing
    from analysis.verdicts import judge

    for extension in formats:
        if extension not in FORMATS + OF_SURFACES:
            known = ", ".join(FORMATS + OF_SURFACES)
            raise InputError(f"formats: {extension!r} found, expected some of {known}")
    if not any(folder.rglob("*.h5")):
        raise InputError(f"measurements: no HDF5 file in {folder}, measure a checkpoint first")
    still = [extension for extension in formats if extension in FORMATS]
    written: list[Path] = []

    def draw(
        function: Callable[..., list[Path]], found: Sequence[Measurement], **options: Any
    ) -> None:
        how: dict[str, Any] = {"out": out, "formats": still, **options}
        written.extend(sparing(partial(function, **how), found, left_out))

    for objective in ("train", "train_test", "clean", "clean_test"):
        spectra = collect([folder], f"hessian/{objective}", left_out)
        own = [m for m in spectra if labels.home(m) == folder]
        draw(draw_hessians, own, below=folder)
        draw(draw_layers, own, below=folder)
        draw(draw_hessian_comparison, spectra)
        draw(draw_hessian_training, spectra)
        for kind in KINDS:
            surfaces = collect([folder], f"landscape{kind}/{objective}", left_out)
            draw(draw_landscapes, surfaces, formats=formats, scale=scale)
    histories = collect([folder], "history", left_out)
    draw(draw_nll, histories)
    draw(draw_windows, histories)
    draw(draw_robustness, collect([folder], "robustness", left_out))
    return written + draw_claims(judge([folder], left_out), out, still)


if __name__ == "__main__":
    run(main, Options, alone=True)
