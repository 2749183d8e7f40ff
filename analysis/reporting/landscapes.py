"""Loss landscapes: surfaces, lines, ways, and what they say in numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.drawing.interactive import network_legend, surface_chart
from analysis.drawing.landscapes import compared_surfaces
from analysis.measurements import labels
from analysis.measurements.landscapes import common_losses, losses, names
from analysis.measurements.schema import Measurement
from analysis.tables.landscapes import along_line, barriers, flatness_rows
from lossgeometry.pages.charts import Curve, Key, Plot, curves
from lossgeometry.pages.page import Block, Chart, Section, Table

DIRECTIONS = {
    "random": "random directions",
    "eigenvectors": "directions of extreme curvature",
    "gradient": "the gradient and a random direction",
    "towards": "the way to another checkpoint",
    "plane": "a plane through three checkpoints",
    "bezier": "a curve of low loss to another checkpoint",
    "pca": "the plane in which the training moved most",
}


def landscapes(measurements: Sequence[Measurement]) -> list[Block]:
    """Of one dataset, objective and kind of plane."""
    blocks: list[Block] = []
    for group in map(labels.measured_alike, compared_surfaces(measurements).values()):
        what = DIRECTIONS.get(group[0].options["directions"], group[0].options["directions"])
        tables = [along_line(group), flatness_rows(group), barriers(group)]
        parts: list[Block] = [
            surface_chart(group),
            _lines(group),
            *_flights(group),
            *(Table(*table) for table in tables if table[2]),
        ]
        blocks.append(Section(f"Loss landscape: {what}", parts))
    return blocks


def _lines(group: Sequence[Measurement]) -> Chart:
    texts = labels.captions(group)
    images = {"line": f"{labels.split(group[0])} images", "test_line": "clean test images"}
    along = {text: names(m)[0] for text, m in zip(texts, group, strict=True)}
    x = f"step along {next(iter(along.values()))}" if len(set(along.values())) == 1 else "step"
    plots = []
    for part, of_what in images.items():
        for loss in common_losses(group, part):
            found = {
                (text, ""): Curve(m.arrays[f"{part}/xs"], losses(m, part)[loss])
                for text, m in zip(texts, group, strict=True)
            }
            plots.append(Plot(of_what, x, loss, found, log=True))
        found = {
            (text, ""): Curve(m.arrays[f"{part}/xs"], 100 * m.arrays[f"{part}/error"])
            for text, m in zip(texts, group, strict=True)
        }
        plots.append(Plot(of_what, x, "error (%)", found))
    return curves("Along the first direction", network_legend(group, texts), plots)


def _flights(group: Sequence[Measurement]) -> list[Block]:
    """Ways to other checkpoints, and trainings as seen from their end."""
    found: dict[str, dict[Key, Curve]] = {}
    of_text: dict[str, Measurement] = {}
    for text, m in zip(labels.captions(group), group, strict=True):
        for path in ("linear", "bezier"):
            for metric, ylabel, factor in (("nll", "NLL", 1), ("error", "error (%)", 100)):
                values = m.arrays.get(f"cut/extras/{path}/{metric}")
                if values is not None:
                    name = f"{text}, {path}"
                    of_text[name] = m
                    curve = Curve(m.arrays["cut/extras/ts"], factor * values)
                    found.setdefault(ylabel, {})[name, ""] = curve
        if "cut/extras/polar/distances" in m.arrays:
            of_text[text] = m
            distances, turns = (m.arrays[f"cut/extras/polar/{n}"] for n in ("distances", "turns"))
            for ylabel, values, start in (
                ("distance to the end", distances, 0),
                ("angle between updates (°)", np.degrees(turns), 1),
            ):
                steps = np.arange(start, start + len(values))
                found.setdefault(ylabel, {})[text, ""] = Curve(steps, values, dots=True)
    charts: list[Block] = []
    for title, x, names_of in (
        ("On the way to the other checkpoint", "share of the way", ("NLL", "error (%)")),
        (
            "Trainings as seen from their end",
            "snapshot, the first is 0",
            ("distance to the end", "angle between updates (°)"),
        ),
    ):
        plots = [Plot(y, x, y, found[y]) for y in names_of if y in found]
        if plots:
            texts = list(dict.fromkeys(name for plot in plots for name, _ in plot.curves))
            legend = network_legend([of_text[text] for text in texts], texts)
            charts.append(curves(title, legend, plots))
    return charts
