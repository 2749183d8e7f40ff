"""Errors on corrupted images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.drawing.robustness import (
    at_the_end,
    by_severity,
    mean_corruption_error,
    over_seeds,
)
from analysis.measurements import labels
from analysis.measurements.comparisons import studies
from analysis.measurements.schema import Measurement
from lossgeometry.pages.charts import Curve, Key, Legend, Plot, curves
from lossgeometry.pages.page import Block, Section, Table


def robustness(measurements: Sequence[Measurement]) -> Section:
    """Of one dataset: error against severity, and of each corruption."""
    blocks: list[Block] = []
    for study, members in studies(measurements).items():
        by_label = labels.by_architecture(labels.measured_alike(at_the_end(members)))
        first = next(iter(by_label.values()))[0]
        texts = [text.decode().replace("_", " ") for text in first.arrays["corruptions"]]
        severity: dict[Key, Curve] = {}
        each: dict[Key, Curve] = {}
        rows = []
        for i, (label, seeds) in enumerate(by_label.items()):
            x = np.arange(6)
            severity[label, ""] = Curve(x, *over_seeds([by_severity(m) for m in seeds]), dots=True)
            errors = [m.arrays["error"].mean(axis=1) for m in seeds]
            beside = np.arange(len(texts)) + 0.5 / len(by_label) * (i - (len(by_label) - 1) / 2)
            each[label, ""] = Curve(beside, *over_seeds(errors), dots=True)
            clean, _ = over_seeds([np.array([m.arrays["clean_error"]]) for m in seeds])
            mean = mean_corruption_error(seeds).format(".2f", 100)
            rows.append([label, str(len(seeds)), mean, f"{clean[0]:.2f}"])
        legend = Legend(list(severity), labels.kind(members), colors=labels.colors(by_label))
        images = len(first.arrays["image_error"])
        note = (
            f"{images} test images under {len(texts)} {first.options['source']} corruptions; mean "
            f"and 95 % interval over {labels.seeds(by_label)}, of a single one none."
        )
        turned = dict(x=dict(tickangle=-60))
        plots = [
            Plot("", "severity (0: clean)", "error (%)", severity, width=700),
            Plot(
                "",
                "",
                "error (%)",
                each,
                places=texts,
                joined=False,
                width=700,
                foot=110,
                axes=turned,
            ),
        ]
        columns = [labels.kind(members), "seeds", "mean corruption error %", "clean error %"]
        title = f"Corruptions on {study}; ± 95 % interval over seeds, or of one over images"
        blocks += [
            Table(title, columns, rows),
            curves(f"Robustness on {study}", legend, plots, note=note),
        ]
    return Section("Robustness", blocks)
