"""Every figure of a folder of measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from analysis.drawing.claims import draw_claims
from analysis.drawing.families import KINDS as OF_FAMILIES
from analysis.drawing.families import draw_families
from analysis.drawing.hessians import (
    draw_hessian_comparison,
    draw_hessian_training,
    draw_hessians,
    draw_layers,
)
from analysis.drawing.landscapes import KINDS, OBJECTIVES, OF_LOSSES, draw_landscapes
from analysis.drawing.nll import draw_nll, draw_windows
from analysis.drawing.robustness import draw_robustness
from analysis.measurements import labels
from analysis.measurements.files import collect_each, sparing
from analysis.measurements.schema import Measurement
from analysis.verdicts import judge
from lossgeometry.errors import InputError

FORMATS = ("png", "svg", "pdf")
OF_SURFACES = ("html", "vtu")


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
        if how["formats"]:
            written.extend(sparing(partial(function, **how), found, left_out))

    found = collect_each([folder], [*OF_LOSSES, "history", "robustness", *OF_FAMILIES], left_out)
    for objective in OBJECTIVES:
        spectra = found[f"hessian/{objective}"]
        own = [m for m in spectra if labels.home(m) == folder]
        draw(draw_hessians, own, below=folder)
        draw(draw_layers, own, below=folder)
        draw(draw_hessian_comparison, spectra)
        draw(draw_hessian_training, spectra)
        for kind in KINDS:
            surfaces = found[f"landscape{kind}/{objective}"]
            draw(draw_landscapes, surfaces, formats=formats, scale=scale)
    draw(draw_nll, found["history"])
    draw(draw_windows, found["history"])
    draw(draw_robustness, found["robustness"])
    draw(draw_families, [m for kind in OF_FAMILIES for m in found[kind]])
    if still:
        written += draw_claims(judge([folder], left_out), out, still)
    return written
