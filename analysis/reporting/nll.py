"""Train NLL and test error, over the training, at its end, and against the window."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.drawing.nll import longest_trainings, over_epochs, trainings_of
from analysis.measurements import labels
from analysis.measurements.comparisons import studies, variant
from analysis.measurements.schema import Measurement
from analysis.tables.nll import end_points
from lossgeometry.pages.charts import GRAY, Curve, Key, Legend, Plot, curves
from lossgeometry.pages.page import Block, Chart, Section, Table
from lossgeometry.statistics import across_seeds

SCORES = (("train_nll", "train NLL", 1), ("test_error", "test error (%)", 100))


def outcomes(
    histories: Iterable[Measurement],
    objectives: Iterable[Measurement],
    spectra: Iterable[Measurement],
) -> Section:
    """Of the trainings of one dataset."""
    histories = list(histories)
    blocks: list[Block] = [Table(*table) for table in end_points(histories, objectives, spectra)]
    for data, members in trainings_of(histories).items():
        by_label = longest_trainings(members)
        blocks += [_over_epochs(data, by_label), _at_the_end(data, by_label)]
    for study, members in studies(histories).items():
        chart = _against_window(study, members)
        blocks += [chart] if chart else []
    return Section("Train NLL and test error", blocks)


def _legend(by_label: Mapping[str, Sequence[Measurement]]) -> Legend:
    every = [m for members in by_label.values() for m in members]
    keys = [(text, "") for text in by_label]
    return Legend(keys, labels.kind(every), colors=labels.colors(by_label))


def _over_epochs(data: str, by_label: Mapping[str, Sequence[Measurement]]) -> Chart:
    plots = []
    for score, text, scale in SCORES:
        found: dict[Key, Curve] = {}
        for label, members in by_label.items():
            epochs, mean, half_width = over_epochs(members, score)
            found[label, ""] = Curve(epochs, scale * mean, scale * half_width)
        plots.append(Plot(text, "epoch", text, found, log=score == "train_nll"))
    note = f"Mean and 95 % interval over {labels.seeds(by_label)}, of clean images."
    return curves(f"Training on {data}", _legend(by_label), plots, note=note)


def _at_the_end(data: str, by_label: Mapping[str, Sequence[Measurement]]) -> Chart:
    """The plane of the end points, whose regions are those around global attention."""
    ends = {
        label: [
            across_seeds([scale * float(m.arrays[score][-1]) for m in members])
            for score, _, scale in SCORES
        ]
        for label, members in by_label.items()
    }
    found: dict[Key, list[Curve]] = {}
    for label, (x, y) in ends.items():
        numbers = (x.mean, y.mean, y.half_width, x.half_width)
        at_x, at_y, error, x_error = (np.array([number]) for number in numbers)
        found[label, ""] = [Curve(at_x, at_y, error, dots=True, x_error=x_error)]
    whole = next((text for text in by_label if "global" in text), next(iter(by_label)))
    sides: dict[str, Any] = dict(xref="x domain", yref="y domain", font=dict(color=GRAY))
    notes = [
        dict(
            text=text, x=x, y=y, xanchor=("left", "right")[x], yanchor=("bottom", "top")[y], **sides
        )
        for (x, y), text in {
            (0, 0): "stronger representation",
            (1, 0): "regularised",
            (0, 1): "overfitted",
            (1, 1): "weaker representation",
        }.items()
    ]
    spans = []
    for i in (0, 1):
        centre = ends[whole][i].mean
        away = [abs(e[i].mean - centre) + np.nan_to_num(e[i].half_width) for e in ends.values()]
        reach = np.nan_to_num(1.2 * max(away)) or 1.0  # all four regions are in sight
        spans.append(np.array([centre - reach, centre, centre + reach]))
    across, up = spans
    middle = [1, 1, 1]
    found[whole, ""] += [
        Curve(across, up[middle], color=GRAY),
        Curve(across[middle], up, color=GRAY),
    ]
    known = bool(np.isfinite(spans).all())
    axes = {n: dict(range=own[[0, 2]].tolist()) for n, own in (("x", across), ("y", up)) if known}
    titles = [text for _, text, _ in SCORES]
    plot = Plot("", titles[0], titles[1], found, notes=notes, width=700, axes=axes)
    note = (
        f"Where trainings end, around {whole}: lower train NLL and lower error is a stronger "
        "representation, higher train NLL and lower error is regularisation. Mean and 95 % "
        f"interval over {labels.seeds(by_label)}."
    )
    return curves(
        f"Optimisation and regularisation on {data}", _legend(by_label), [plot], note=note
    )


def _against_window(study: str, members: Sequence[Measurement]) -> Chart | None:
    """At the end of training; the paper's Figure 7 (left)."""
    windows = sorted({variant(m)[0] for m in members})
    if len(windows) < 2:
        return None
    seeds: dict[int, dict[int, list[Measurement]]] = defaultdict(lambda: defaultdict(list))
    for m in members:
        window, heads = variant(m)
        seeds[heads][window].append(m)
    own = labels.network(members[0])
    texts = {
        heads: f"{heads} head{'s' * (heads > 1)}"
        if own == "csan"
        else labels.NETWORKS.get(own, own)
        for heads in sorted(seeds)
    }
    plots = []
    for score, text, scale in SCORES:
        found: dict[Key, Curve] = {}
        for i, (heads, label) in enumerate(texts.items()):
            of_window = dict(sorted(seeds[heads].items()))
            ends = [
                across_seeds([scale * float(m.arrays[score][-1]) for m in of_window[w]])
                for w in of_window
            ]
            x = np.array([windows.index(w) for w in of_window]) + 0.06 * i  # side by side
            widths = np.array([e.half_width for e in ends])
            found[label, ""] = Curve(x, np.array([e.mean for e in ends]), widths, dots=True)
        kind = "attention window" if own == "csan" else "kernel"
        places = [f"{w}×{w}" for w in windows]
        plots.append(Plot(text, kind, text, found, places=places))
    legend = Legend([(text, "") for text in texts.values()], "a query sees")
    counted = {f"{heads} {w}": of[w] for heads, of in seeds.items() for w in of}
    note = f"End of training; mean and 95 % interval over {labels.seeds(counted)}."
    return curves(f"Locality on {study}", legend, plots, note=note)
