"""Figure of the claims: every difference with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.drawing import head, save
from analysis.measurements.comparisons import file_stem
from analysis.statements import QUANTITIES
from analysis.verdicts import Answer, Verdict
from lossgeometry import plots

COLORS: dict[Verdict, str] = {
    "holds": "#009e73",
    "does not hold": "#d55e00",
    "undecided": "#7f7f7f",
    "no verdict": "#c0c0c0",
}
LINE = 0.15  # inches
AXIS = 3.5  # lines, with its name


def draw_claims(
    answers: Mapping[str, Sequence[Answer]], out: Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """For each study: ``claims_DATASET``, a forest plot with one panel for each unit.

    Intervals over different things, seeds or images, have panels of their own.
    """
    written = []
    for study, of_study in answers.items():
        panels = differences(of_study)
        if not panels:
            continue
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(8, 8))  # as high as its rows, once these are known
            axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
            for (xlabel, rows), ax in zip(panels.items(), axes, strict=True):
                colored = [
                    (text, row.estimate, row.low, row.high, COLORS[row.verdict])
                    for text, row in zip(_texts(rows), rows, strict=True)
                ]
                plots.plot_forest(colored, xlabel=xlabel, ax=ax)
            lines = [ax.get_ylim()[0] + AXIS for ax in axes]
            axes[0].get_gridspec().set_height_ratios(lines)
            figure.set_figheight(0.8 + LINE * sum(lines))
            handles = [
                Line2D([], [], color=color, marker="o", label=verdict)
                for verdict, color in COLORS.items()
            ]
            figure.legend(handles=handles, loc="outside lower center", ncols=len(COLORS))
            head(figure, f"Claims on {study}: differences with 95 % intervals")
            written += save(figure, out, f"claims_{file_stem(study)}", formats)
    return written


@dataclass(frozen=True)
class Difference:
    """A row of the picture."""

    text: str  # the claim, and in the lines after it the difference
    estimate: float
    low: float
    high: float
    verdict: Verdict
    corrected: Verdict | None  # by Holm


def differences(answers: Sequence[Answer]) -> dict[str, list[Difference]]:
    """What was measured of one study, by the unit and by what the intervals are over."""
    panels: dict[str, list[Difference]] = {}
    for answer in answers:
        for finding in answer.findings:
            if finding.interval is None:
                continue
            quantity, interval = QUANTITIES[finding.part.quantity], finding.interval
            formula = finding.part.text.replace(" - [", "\n- [")
            text = f"{answer.claim.key}  {answer.claim.statement}\n{formula}"
            values = (interval.estimate, interval.low, interval.high)
            estimate, low, high = (quantity.scale * value for value in values)
            unit = f"difference in {quantity.axis}, over {finding.over}"
            row = Difference(text, estimate, low, high, finding.verdict, finding.corrected)
            panels.setdefault(unit, []).append(row)
    return panels


def _texts(rows: Sequence[Difference]) -> list[str]:
    """Each claim once, above the first of its differences; with Holm's verdict where it differs."""
    texts, above = [], None
    for row in rows:
        claim, difference = row.text.split("\n", 1)
        same = row.corrected in (None, row.verdict)
        found = difference if same else f"{difference}  (by Holm: {row.corrected})"
        texts.append(found if claim == above else f"{claim}\n{found}")
        above = claim
    return texts
