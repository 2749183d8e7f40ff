"""The report of a folder of measurements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis.drawing.landscapes import KINDS, OBJECTIVES, OF_LOSSES
from analysis.measurements import labels
from analysis.measurements.files import collect_each, sparing
from analysis.measurements.schema import Measurement
from analysis.reporting.claims import verdicts
from analysis.reporting.hessians import spectra
from analysis.reporting.landscapes import landscapes
from analysis.reporting.nll import outcomes
from analysis.reporting.robustness import robustness
from analysis.verdicts import judge
from lossgeometry.errors import InputError
from lossgeometry.pages.page import Block, Section, Table, write_page


def write_report(folder: Path, path: Path, left_out: list[InputError] | None = None) -> Path:
    """One page of everything that is measured in `folder` and below it.

    What is wrong with files that cannot be used is added to `left_out`; without it, it is raised.

    Raises
    ------
    InputError
        If there are no measurements, or plotly is not installed.
    """
    kept = collect_each([folder], [*OF_LOSSES, "objective", "history", "robustness"], left_out)

    def of(name: str) -> dict[str, list[Measurement]]:
        """A measurement of each dataset."""
        by_dataset = defaultdict(list)
        for m in kept[name]:
            by_dataset[labels.comparable(m)].append(m)
        return by_dataset

    blocks: dict[str, list[Block]] = defaultdict(list)

    def add(
        function: Callable[[list[Measurement]], Block | list[Block]],
        found: dict[str, list[Measurement]],
    ) -> None:
        for data, members in found.items():
            made = sparing(function, members, left_out)
            blocks[data] += made if isinstance(made, list) else [made]

    objectives, hessians = of("objective"), of("hessian/train")
    add(
        lambda own: outcomes(
            own, *(found.get(labels.comparable(own[0]), []) for found in (objectives, hessians))
        ),
        of("history"),
    )
    for objective in OBJECTIVES:
        add(spectra, of(f"hessian/{objective}"))
        for kind in KINDS:
            add(landscapes, of(f"landscape{kind}/{objective}"))
    add(robustness, of("robustness"))
    answers = judge([folder], left_out)
    if not blocks:
        raise InputError(f"measurements: none in {folder}, measure a checkpoint first")
    page: list[Block] = [verdicts(answers)] if answers else []
    page += [Section(data, own) for data, own in sorted(blocks.items())]
    page.append(_how([m for found in kept.values() for m in found]))
    return write_page(path, "Locality Landscapes", page)


def _how(measurements: Sequence[Measurement]) -> Section:
    """What was measured, by which options, when and by what."""
    groups: dict[tuple[str, str, str], list[Measurement]] = defaultdict(list)
    for m in measurements:
        options = ", ".join(f"{key} {value}" for key, value in sorted(m.options.items()))
        groups[labels.comparable(m), m.name, options].append(m)
    rows = []
    for (data, name, options), members in sorted(groups.items()):
        dates = sorted({m.date[:10] for m in members})
        torch = sorted({str(m.versions["torch"]) for m in members if "torch" in m.versions})
        when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        rows.append([f"{data}: {name}", str(len(members)), when, ", ".join(torch), options])
    columns = ["measurement", "checkpoints", "made", "PyTorch", "options"]
    return Section("How it was measured", [Table("", columns, rows)])
