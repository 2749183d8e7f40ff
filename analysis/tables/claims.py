"""Tables of the claims."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from analysis.statements import QUANTITIES
from analysis.tables import Content, print_table
from analysis.verdicts import Answer


def print_answers(study: str, answers: Sequence[Answer]) -> None:
    """Table of one study, and below it what has not been measured."""
    print_table(*answers_table(study, answers))
    missing: dict[str, list[str]] = defaultdict(list)
    for answer in answers:
        for finding in answer.findings:
            missing[answer.claim.key] += finding.missing
    for key, lines in missing.items():
        for line in dict.fromkeys(lines):
            print(f"{key}: not measured: {line}")


def answers_table(study: str, answers: Sequence[Answer]) -> Content:
    """Every difference of one study with its interval, and what is said of it."""
    rows = []
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
    columns = ["claim", "difference", "95 % interval", "over", "verdict", "by Holm", "in the paper"]
    return f"Claims on {study}", columns, rows
