"""Figures of train NLL and test error."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from analysis.drawing import head, legend, save
from analysis.measurements import labels
from analysis.measurements.comparisons import file_stem, studies, variant
from analysis.measurements.schema import Measurement
from lossgeometry import plots
from lossgeometry.statistics import across_seeds


def draw_nll(
    histories: Iterable[Measurement],
    out: Path,
    formats: Sequence[str] = ("png",),
    *,
    origin: str = "",
) -> list[Path]:
    """For each dataset: ``nll_DATASET``, curves over epochs and the plane of the end points.

    `origin` becomes a part of the names.
    """
    written = []
    for data, members in trainings_of(histories).items():
        stem = "_".join(filter(None, ("nll", file_stem(data), origin)))
        by_label = longest_trainings(members)
        drawn = [m for own in by_label.values() for m in own]
        for m in members:
            if all(m is not other for other in drawn):
                epochs, longest = (n.checkpoint["recipe"]["epochs"] for n in (m, drawn[0]))
                print(
                    f"{stem} is without {m.path}, of {epochs} epochs not {longest}", file=sys.stderr
                )
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(8, 3.2))
            curves, plane = figure.subplots(1, 2)
            points = {}
            palette = labels.colors(by_label)
            for (text, members), style in zip(by_label.items(), cycle(plots.LINES)):
                plots.plot_history(
                    *over_epochs(members, "train_nll"),
                    ylabel="train NLL",
                    label=text,
                    color=palette[text],
                    linestyle=style,
                    ax=curves,
                )
                x, y = (
                    across_seeds([m.arrays[key][-1] for m in members])
                    for key in ("train_nll", "test_error")
                )
                points[text] = (x.mean, x.half_width, y.mean, y.half_width)
            reference = next((text for text in points if "global" in text), next(iter(points)))
            plots.plot_optimisation_plane(points, origin=reference, colors=palette, ax=plane)
            curves.legend(title=labels.kind(m for own in by_label.values() for m in own))
            head(
                figure,
                f"Optimisation and regularisation on {data}, mean and 95 % interval over "
                f"{labels.seeds(by_label)}",
            )
            written += save(figure, out, stem, formats)
    return written


def trainings_of(histories: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Those of each dataset."""
    groups: dict[str, list[Measurement]] = defaultdict(list)
    for m in histories:
        groups[labels.comparable(m)].append(m)
    return dict(sorted(groups.items()))


def longest_trainings(members: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """The seeds of each architecture, of those that were trained for most epochs."""
    longest = max(m.checkpoint["recipe"]["epochs"] for m in members)
    return labels.by_architecture(m for m in members if m.checkpoint["recipe"]["epochs"] == longest)


def over_epochs(
    seeds: Sequence[Measurement], score: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs, mean of a score over the seeds and half of its interval: (n,) each."""
    # Not all need to have been evaluated at the same epochs.
    epochs = reduce(np.intersect1d, (m.arrays["epoch"] for m in seeds))
    scores = [m.arrays[score][np.isin(m.arrays["epoch"], epochs)] for m in seeds]
    estimates = [across_seeds(column) for column in np.array(scores).T]
    means, widths = ([getattr(e, name) for e in estimates] for name in ("mean", "half_width"))
    return epochs, np.array(means), np.array(widths)


def draw_windows(
    histories: Iterable[Measurement],
    out: Path,
    formats: Sequence[str] = ("png",),
    *,
    origin: str = "",
) -> list[Path]:
    """For each study of several windows: ``windows_DATASET``, the paper's Figure 7 (left).

    Train NLL and test error at the end of training against the window, one curve for each head
    window. `origin` becomes a part of the names.
    """
    written = []
    for name, members in studies(histories).items():
        seeds: dict[int, dict[int, list[Measurement]]] = defaultdict(lambda: defaultdict(list))
        for m in sorted(members, key=variant):
            window, head_window = variant(m)
            seeds[head_window][window].append(m)
        own = labels.network(members[0])
        windows = sorted({window for of_window in seeds.values() for window in of_window})
        if len(windows) < 2:
            continue
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(7, 3.2))
            axes = figure.subplots(1, 2)
            for i, (head_window, of_window) in enumerate(sorted(seeds.items())):
                for (key, ylabel, scale), ax in zip(
                    (("train_nll", "train NLL", 1), ("test_error", "test error (%)", 100)),
                    axes,
                    strict=True,
                ):
                    ends = [
                        across_seeds([scale * float(m.arrays[key][-1]) for m in of_window[w]])
                        for w in of_window
                    ]
                    plots.plot_points(
                        # Side by side, so that one interval does not hide the other.
                        np.array([windows.index(w) for w in of_window]) + 0.06 * i,
                        np.array([e.mean for e in ends]),
                        np.array([e.half_width for e in ends]),
                        xlabel="attention window" if own == "csan" else "kernel",
                        ylabel=ylabel,
                        names=[f"{w}×{w}" for w in windows],
                        line=plots.LINES[i % len(plots.LINES)],
                        label=f"{head_window} head{'s' if head_window > 1 else ''}"
                        if own == "csan"
                        else labels.NETWORKS.get(own, own),
                        color=labels.COLORS[i],
                        ax=ax,
                    )
            legend(figure, axes[0], most=2, title="a query sees" if own == "csan" else None)
            counted = {f"{h} {w}": of[w] for h, of in seeds.items() for w in of}
            head(
                figure,
                f"Locality on {name}, end of training; mean and 95 % interval over "
                f"{labels.seeds(counted)}",
            )
            stem = "_".join(filter(None, ("windows", file_stem(name), origin)))
            written += save(figure, out, stem, formats)
    return written
