"""Verdicts on the claims, and the differences that they are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from analysis.drawing.claims import COLORS, differences
from analysis.tables.claims import answers_table
from analysis.verdicts import Answer
from lossgeometry.pages.charts import Difference, intervals
from lossgeometry.pages.page import Mark, Section, Table


def verdicts(answers: Mapping[str, Sequence[Answer]]) -> Section:
    """All studies in one table, then each of them."""
    first = next(iter(answers.values()))
    columns = ["claim", "in the paper"]
    columns += [text for study in answers for text in (study, f"{study}, by Holm")]
    rows: list[list[str | Mark]] = []
    for i, claim in enumerate(answer.claim for answer in first):
        row: list[str | Mark] = [f"{claim.key}  {claim.statement}", claim.paper]
        for of_study in answers.values():
            for verdict in (of_study[i].verdict, of_study[i].corrected):
                row.append(Mark(verdict, COLORS.get(verdict)))
        rows.append(row)
    summary = Table("Whether each claim holds in what was measured", columns, rows)
    explained = (
        "A difference holds if its whole 95 % interval is on the side that is claimed, does not "
        "hold if the whole interval is on the other, and is undecided otherwise. A claim of "
        "several differences holds if all of them do. By Holm is what is left when all differences "
        "of a study are judged at once. Fewer than three seeds get no verdict."
    )
    return Section("Verdicts", [summary, explained, *map(_study, answers, answers.values())])


def _study(study: str, answers: Sequence[Answer]) -> Section:
    found = {
        unit: [
            Difference(
                row.text,
                row.estimate,
                row.low,
                row.high,
                Mark(row.verdict, COLORS[row.verdict]),
                hollow=row.corrected != row.verdict,
            )
            for row in rows
        ]
        for unit, rows in differences(answers).items()
    }
    chart = intervals(
        f"Differences on {study} with their 95 % intervals",
        found,
        note="Green: holds; red: does not hold; gray: undecided, or too few seeds for a verdict. A "
        "ring: undecided when all are judged at once (Holm).",
    )
    return Section(f"Claims on {study}", [chart, Table(*answers_table(study, answers))])
