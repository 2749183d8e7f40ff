"""``python -m analysis.report``: everything that was measured, as one page to send."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from analysis.options import require_writable
from lossgeometry.errors import InputError, raise_left_out
from models.cli import arg, run


@dataclass(frozen=True)
class Options:
    """Write one HTML file of what the HDF5 files hold: verdicts, tables, and charts to look into.

    It needs no network and no other file. Surfaces can be rotated, values are shown under the
    pointer, checkpoints switched on and off, and a slider goes through the training. Neither models
    nor datasets nor PyTorch are needed, but plotly is: pip install -e '.[export]'.
    """

    measurements: Annotated[Path, arg(metavar="DIR", help="folder of the HDF5 files")] = Path(
        "checkpoints"
    )
    out: Annotated[Path, arg(metavar="FILE", help="the page")] = Path("report.html")


def main(options: Options) -> None:
    """Write the page, and name it, at the end the files that could not be used."""
    from analysis.reporting.whole import write_report

    if options.out.is_dir():
        raise InputError(f"out: {options.out} is a folder, expected the name of a page")
    require_writable("out", options.out.parent)
    left_out: list[InputError] = []
    print(f"wrote {write_report(options.measurements, options.out, left_out)}")
    raise_left_out(left_out)


if __name__ == "__main__":
    run(main, Options, alone=True)
