"""Tables of train NLL and of what goes with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from analysis.measurements import labels
from analysis.measurements.schema import Measurement
from analysis.tables import Content, print_table
from lossgeometry.statistics import across_seeds


def print_outcomes(measurements: Sequence[Measurement]) -> None:
    """Table of NLL and error of weights without a history, and where they are."""
    rows = []
    for name, m in zip(labels.names(measurements), measurements, strict=True):
        row = [name, labels.label(m)]
        for split in ("train", "test"):
            row.append(f"{m.arrays[f'{split}/nll'].mean(dtype=float):.4f}")
            row.append(f"{100 * (1 - m.arrays[f'{split}/correct'].mean()):.2f}")
        rows.append(row)
    columns = [f"{split} {what}" for split in ("train", "test") for what in ("NLL", "error %")]
    print_table("Clean images", ["checkpoint", labels.kind(measurements), *columns], rows)
    for m in measurements:
        print(f"stored in {m.path}:/{m.name}; no history of the training, so nothing to draw")


def print_end_points(
    histories: Iterable[Measurement],
    objectives: Iterable[Measurement],
    spectra: Iterable[Measurement],
) -> None:
    """Print the tables of `end_points`."""
    for table in end_points(histories, objectives, spectra):
        print_table(*table)


def end_points(
    histories: Iterable[Measurement],
    objectives: Iterable[Measurement],
    spectra: Iterable[Measurement],
) -> list[Content]:
    """Over seeds: NLL and error at the end; NEP and APE there and at the end of warm-up."""
    objective = {m.checkpoint["sha256"]: m.arrays for m in objectives}
    spectrum = {(labels.training(m), m.checkpoint["epoch"]): m.arrays for m in spectra}
    datasets: dict[str, list[Measurement]] = defaultdict(list)
    for m in histories:
        datasets[labels.dataset(m)].append(m)
    groups = [
        (dataset, label, members)
        for dataset, measurements in sorted(datasets.items())
        for label, members in labels.by_architecture(measurements).items()
    ]
    scores, eigenvalues = [], []
    for dataset, label, members in groups:
        recipe, trainings = members[0].checkpoint["recipe"], [*map(labels.training, members)]
        start = [dataset, label, str(recipe["epochs"]), str(len(members))]
        weights = [m.checkpoint["sha256"] for m in members]
        augmented = [objective[sha256] for sha256 in weights if sha256 in objective]
        row = []
        for split in ("train", "objective", "test"):
            for key, digits, scale in (("nll", ".4f", 1), ("error", ".2f", 100)):
                values = (
                    [float(arrays[key]) for arrays in augmented]
                    if split == "objective"
                    else [float(m.arrays[f"{split}_{key}"][-1]) for m in members]
                )
                row.append(_over_seeds(values, digits, scale, of=len(members)))
        scores.append([*start, *row])
        row = []
        for epoch in (recipe["warmup_epochs"], recipe["epochs"]):
            measured = [spectrum[t, epoch] for t in trainings if (t, epoch) in spectrum]
            for key, scale in (("nep", 100), ("ape", 1)):
                values = [float(arrays[key]) for arrays in measured]
                row.append(_over_seeds(values, ".1f", scale, of=len(members)))
        eigenvalues.append([*start, *row])
    first = ["dataset", "window", "epochs", "seeds"]
    title = (
        "Mean ± half of the 95 % interval over seeds, at the end of training; "
        "objective: of augmented training images, as it is minimised, without L2"
    )
    columns = [
        f"{of} {what}" for of in ("train", "objective", "test") for what in ("NLL", "error %")
    ]
    tables: list[Content] = [(title, first + columns, scores)]
    if spectrum:
        title = "Max eigenvalues at the end of warm-up (early) and of training; ± as above"
        columns = ["NEP %, early", "APE, early", "NEP %", "APE"]
        tables.append((title, first + columns, eigenvalues))
    return tables


def _over_seeds(values: Sequence[float], digits: str, scale: float, *, of: int) -> str:
    """Mean and interval; how many seeds, if it is of fewer than those of the row."""
    if not values:
        return "–"
    text = across_seeds(values).format(digits, scale)
    return text if len(values) == of else f"{text} (n = {len(values)})"
