"""Figure of the claims: every difference with its interval."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
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
    """For each study: ``claims_DATASET``, a forest plot with one panel for each unit."""
    written = []
    for study, of_study in answers.items():
        panels: dict[str, list[tuple[str, float, float, float, str]]] = {}
        over: dict[str, dict[str, None]] = defaultdict(dict)
        for finding in (finding for answer in of_study for finding in answer.findings):
            if finding.over:
                over[QUANTITIES[finding.part.quantity].axis][finding.over] = None
        for answer in of_study:
            for finding in answer.findings:
                if finding.interval is None:
                    continue
                quantity, interval = QUANTITIES[finding.part.quantity], finding.interval
                values = (interval.estimate, interval.low, interval.high)
                estimate, low, high = (quantity.scale * value for value in values)
                formula = finding.part.text.replace(" - [", "\n- [")
                text = f"{answer.claim.key}:  {formula}"
                text += f"  [{finding.over}]" if len(over[quantity.axis]) > 1 else ""
                if finding.corrected != finding.verdict:
                    text += f"  (by Holm: {finding.corrected})"
                row = (text, estimate, low, high, COLORS[finding.verdict])
                panels.setdefault(quantity.axis, []).append(row)
        if not panels:
            continue
        heights = [len(rows) + 1.5 for rows in panels.values()]
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(8, 0.8 + 0.3 * sum(heights)))
            axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
            for (axis, rows), ax in zip(panels.items(), axes, strict=True):
                common = f", {next(iter(over[axis]))}" if len(over[axis]) == 1 else ""
                plots.plot_forest(rows, xlabel=f"difference in {axis}{common}", ax=ax)
            handles = [
                Line2D([], [], color=color, marker="o", label=verdict)
                for verdict, color in COLORS.items()
            ]
            figure.legend(handles=handles, loc="outside lower center", ncols=len(COLORS))
            head(figure, f"Claims on {study}: differences with 95 % intervals")
            written += save(figure, out, f"claims_{file_stem(study)}", formats)
    return written
