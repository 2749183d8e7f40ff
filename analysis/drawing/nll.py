"""Figures of train NLL and test error."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import reduce
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
    groups: dict[str, list[Measurement]] = defaultdict(list)
    for m in histories:
        groups[labels.dataset(m)].append(m)
    written = []
    for data, members in sorted(groups.items()):
        stem = "_".join(filter(None, ("nll", file_stem(data), origin)))
        longest = max(m.checkpoint["recipe"]["epochs"] for m in members)
        whole = []
        for m in members:
            epochs = m.checkpoint["recipe"]["epochs"]
            if epochs == longest:
                whole.append(m)
            else:
                print(
                    f"{stem} is without {m.path}, of {epochs} epochs not {longest}", file=sys.stderr
                )
        by_label = labels.by_architecture(whole)
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(8, 3.2))
            curves, plane = figure.subplots(1, 2)
            points = {}
            palette = labels.colors(by_label)
            for text, members in by_label.items():
                # Not all need to have been evaluated at the same epochs.
                epochs = reduce(np.intersect1d, (m.arrays["epoch"] for m in members))
                nll = [m.arrays["train_nll"][np.isin(m.arrays["epoch"], epochs)] for m in members]
                estimates = [across_seeds(column) for column in np.array(nll).T]
                plots.plot_history(
                    epochs,
                    np.array([e.mean for e in estimates]),
                    np.array([e.half_width for e in estimates]),
                    ylabel="train NLL",
                    label=text,
                    color=palette[text],
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
                        line=("-", "--", ":")[i % 3],
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
