"""``python -m analysis.claims``: whether each claim of the dispute holds in what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from analysis.options import Out
from lossgeometry.errors import InputError, raise_left_out
from models.cli import arg, run


@dataclass(frozen=True)
class Options:
    """Judge the claims C1 to C6 by what was measured.

    Each study, a dataset and a recipe, gets a table with every difference, its 95 % interval, a
    verdict, and what is left of it when all differences are judged at once (Holm), and a figure.
    Fewer than three seeds get no verdict. Only HDF5 files are read; neither a model nor a dataset
    is needed. The rule is in analysis/verdicts.py.
    """

    measurements: Annotated[Path, arg(metavar="DIR", help="folder of the HDF5 files")] = Path(
        "checkpoints"
    )
    out: Out = Path("figures")


def main(options: Options) -> None:
    """Print a table for each study, draw, and name the files."""
    from analysis.drawing.claims import draw_claims
    from analysis.tables.claims import print_answers
    from analysis.verdicts import judge

    left_out: list[InputError] = []
    answers = judge([options.measurements], left_out)
    if not answers:
        raise_left_out(left_out)
        raise InputError(
            f"measurements: no trained network in {options.measurements}, expected HDF5 files with "
            "the histories that analysis.nll stores"
        )
    for study, of_study in answers.items():
        print_answers(study, of_study)
    for path in draw_claims(answers, options.out):
        print(f"wrote {path}")
    raise_left_out(left_out)


if __name__ == "__main__":
    run(main, Options, alone=True)
