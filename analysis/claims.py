"""``python -m analysis.claims``: whether each claim of the dispute holds in what was measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from analysis.options import Out
from lossgeometry.errors import InputError, raise_left_out
from models.cli import run

if TYPE_CHECKING:
    from analysis.verdicts import Answer


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


def print_answers(study: str, answers: Sequence[Answer]) -> None:
    """Table of one study, and below it what has not been measured."""
    from analysis.tables import print_table
    from analysis.verdicts import QUANTITIES

    rows, missing = [], defaultdict(list)
    for answer in answers:
        claim = answer.claim
        if len(answer.findings) > 1:
            verdicts = [answer.verdict, answer.corrected]
            rows.append([f"{claim.key}  {claim.statement}", "", "", "", *verdicts, claim.paper])
        for finding in answer.findings:
            part, quantity = finding.part, QUANTITIES[finding.part.quantity]
            estimate = bounds = "–"
            if finding.interval is not None:
                digits = ".4f" if quantity.scale == 1 else ".2f"
                values = (finding.interval.estimate, finding.interval.low, finding.interval.high)
                estimate, low, high = (f"{quantity.scale * v:+{digits}}" for v in values)
                bounds = f"{low} to {high}"
            alone = len(answer.findings) == 1
            if alone:
                rows.append([f"{claim.key}  {claim.statement}", *[""] * 5, claim.paper])
            unit = "" if quantity.scale == 1 else " %"
            rows.append(
                [
                    f"    {part.text}",
                    f"{estimate}{unit}" if finding.interval else "–",
                    bounds,
                    finding.over or "–",
                    finding.text,
                    finding.corrected or "",
                    "",
                ]
            )
            for line in finding.missing:
                missing[claim.key].append(line)
    print_table(
        f"Claims on {study}",
        ["claim", "difference", "95 % interval", "over", "verdict", "by Holm", "in the paper"],
        rows,
    )
    for key, lines in missing.items():
        for line in dict.fromkeys(lines):
            print(f"{key}: not measured: {line}")


if __name__ == "__main__":
    run(main, Options, alone=True)
