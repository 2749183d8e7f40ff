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
        heights = [len(rows) + 1.5 for rows in panels.values()]
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(8, 0.8 + 0.36 * sum(heights)))
            axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
            for (xlabel, rows), ax in zip(panels.items(), axes, strict=True):
                colored = [
                    (_text(row), row.estimate, row.low, row.high, COLORS[row.verdict])
                    for row in rows
                ]
                plots.plot_forest(colored, xlabel=xlabel, ax=ax)
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

    text: str  # two lines
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


def _text(row: Difference) -> str:
    """With Holm's verdict where it is another."""
    same = row.corrected in (None, row.verdict)
    return row.text if same else f"{row.text}  (by Holm: {row.corrected})"
