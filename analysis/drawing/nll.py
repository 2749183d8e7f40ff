"""Figures of train NLL and test error."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from analysis import labels, plots
from analysis.drawing import save
from analysis.measurements import Measurement
from analysis.statistics import across_seeds


def draw_nll(
    histories: Iterable[Measurement], out: Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """For each dataset: ``nll_DATASET``, curves over epochs and the plane of the end points."""
    groups: dict[str, list[Measurement]] = defaultdict(list)
    for m in histories:
        groups[labels.dataset(m)].append(m)
    written = []
    for data, members in sorted(groups.items()):
        longest = max(m.checkpoint["recipe"]["epochs"] for m in members)
        by_label = labels.by_architecture(
            m for m in members if m.checkpoint["recipe"]["epochs"] == longest
        )
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(8, 3.2))
            curves, plane = figure.subplots(1, 2)
            points = {}
            palette = labels.colors(by_label)
            for text, members in by_label.items():
                nll = np.array([m.arrays["train_nll"] for m in members])
                error = np.array([m.arrays["test_error"] for m in members])
                estimates = [across_seeds(column) for column in nll.T]
                plots.plot_history(
                    members[0].arrays["epoch"],
                    np.array([e.mean for e in estimates]),
                    np.array([e.half_width for e in estimates]),
                    ylabel="train NLL",
                    label=text,
                    color=palette[text],
                    ax=curves,
                )
                x, y = across_seeds(nll[:, -1]), across_seeds(error[:, -1])
                points[text] = (x.mean, x.half_width, y.mean, y.half_width)
            origin = next((text for text in points if "global" in text), next(iter(points)))
            plots.plot_optimisation_plane(points, origin=origin, colors=palette, ax=plane)
            curves.legend(title="window")
            figure.suptitle(
                f"Optimisation and regularisation on {data}, mean and 95 % interval over "
                f"{labels.seeds(by_label)}"
            )
            written += save(figure, out, f"nll_{data}", formats)
    return written
