"""Figures of Hessian spectra."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.drawing import alike, compared, head, legend, save
from analysis.measurements import labels
from analysis.measurements.schema import Measurement
from lossgeometry import plots

MOST = 20  # inches


def draw_hessians(
    measurements: Iterable[Measurement],
    out: Path,
    formats: Sequence[str] = ("png",),
    *,
    below: Path | None = None,
) -> list[Path]:
    """For each checkpoint: ``hessian_NAME``, its max eigenvalues and its spectral density.

    Folders in the names count from `below`, by default `out`; see `labels.name`.
    """
    written = []
    for m in measurements:
        name = labels.name(m, below or out)
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(9, 3))
            negative, positive, density = figure.subplots(1, 3)
            color = labels.colors([labels.label(m)])[labels.label(m)]
            eigenvalues = m.arrays["eigenvalues"]
            for half, ax in (("negative", negative), ("positive", positive)):
                plots.plot_max_eigenvalues(eigenvalues, half, color=color, ax=ax)
                ax.set_title(f"{half} {ax.get_legend_handles_labels()[1][0]}")
            plots.plot_spectral_density(
                *(m.arrays[f"density/{key}"] for key in ("grid", "density", "standard_error")),
                systematic_error=m.arrays.get("density/systematic_error", np.zeros(1)),
                color=color,
                ax=density,
            )
            if "density/bandwidth" in m.arrays:
                density.set_title(f"smoothed by {m.arrays['density/bandwidth']:.2g}")
            batches, k = eigenvalues.shape
            head(
                figure,
                f"{labels.title(m, name)}; max eigenvalues: top {k} of each of {batches} "
                f"mini-batches of {m.options['batch_size']} images",
            )
            written += save(figure, out, f"hessian_{name}{labels.suffix(m)}", formats)
    return written


def draw_hessian_comparison(
    measurements: Iterable[Measurement],
    out: Path,
    formats: Sequence[str] = ("png",),
    *,
    origin: str = "",
) -> list[Path]:
    """For each dataset and epoch with several windows or models: ``hessian_DATASET_epochN``.

    Max eigenvalues of all seeds of a window pooled, negative and positive halves side by side, as
    in Park and Kim 2022, Figure 7 (right). `origin` becomes a part of the names.
    """
    written = []
    for (data, epoch), members in same_stage(measurements).items():
        when = "" if labels.foreign(members[0]) else f"_epoch{epoch:03d}"
        stem = f"hessian_{compared(members, origin)}{when}{labels.suffix(members[0])}"
        if len(labels.by_architecture(members)) < 2:
            continue
        group = alike(members, stem)
        by_label = labels.by_architecture(group)
        if len(by_label) < 2:
            continue
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(7, 3.8))
            plot_halves(by_label, labels.colors(by_label), figure.subplots(1, 2))
            head(
                figure,
                f"Hessian max eigenvalue spectra on {data}, {labels.stage(group[0])}\n"
                f"{labels.objective(group[0])}, {labels.seeds(by_label)}; "
                "each half has a scale of its own",
            )
            written += save(figure, out, stem, formats)
    return written


def plot_halves(
    groups: Mapping[str, Sequence[Measurement]], colors: Mapping[str, str], axes: Sequence[Axes]
) -> None:
    """Negative and positive max eigenvalues, those of all seeds of a group pooled, on two axes."""
    for half, ax in zip(("negative", "positive"), axes, strict=True):
        for (text, members), style in zip(groups.items(), cycle(plots.LINES)):
            plots.plot_max_eigenvalues(
                np.concatenate([m.arrays["eigenvalues"] for m in members]),
                half,
                label=text,
                color=colors[text],
                linestyle=style,
                ax=ax,
            )
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8)


def draw_hessian_training(
    measurements: Iterable[Measurement],
    out: Path,
    formats: Sequence[str] = ("png",),
    *,
    origin: str = "",
) -> list[Path]:
    """For each dataset: ``hessian_DATASET_training``, spectra and trace against the epoch.

    Of every training of which three snapshots or more have been measured. `origin` becomes a part
    of the names.
    """
    written = []
    for data, several in over_training(measurements).items():
        one = several[0][:1]
        stem = f"hessian_{compared(one, origin)}_training{labels.suffix(one[0])}"
        series = [alike(snapshots, stem) for snapshots in several]
        series = [snapshots for snapshots in series if len(snapshots) > 2]
        if not series:
            continue
        palette = labels.colors(labels.label(snapshots[0]) for snapshots in series)
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(11, 3.2))
            axes = figure.subplots(1, 4)
            for snapshots in series:
                text = labels.label(snapshots[0])
                epochs = np.array([m.checkpoint["epoch"] for m in snapshots])
                style = dict(color=palette[text], label=text)
                eigenvalues = [m.arrays["eigenvalues"] for m in snapshots]
                plots.plot_spectra_over_training(epochs, eigenvalues, ax=axes[0], **style)
                for (key, ylabel, scale), ax in zip(
                    (("nep", "NEP (%)", 100), ("ape", "APE", 1), ("trace", "trace", 1)),
                    axes[1:],
                    strict=True,
                ):
                    values, errors = (
                        scale * np.array([float(m.arrays[name]) for m in snapshots])
                        for name in (key, f"{key}_standard_error")
                    )
                    plots.plot_over_training(
                        epochs, values, 2 * errors, ylabel=ylabel, ax=ax, **style
                    )
            every = [m for snapshots in series for m in snapshots]
            legend(figure, axes[1], most=len(series), title=labels.kind(every))
            first = series[0][0]
            head(figure, f"Hessian over training on {data}, {labels.objective(first)}")
            written += save(figure, out, stem, formats)
    return written


def same_stage(measurements: Iterable[Measurement]) -> dict[tuple[str, int], list[Measurement]]:
    """Those that are compared, by dataset and epoch."""
    groups: dict[tuple[str, int], list[Measurement]] = defaultdict(list)
    for m in measurements:
        groups[labels.comparable(m), m.checkpoint["epoch"]].append(m)
    return dict(sorted(groups.items()))


def over_training(measurements: Iterable[Measurement]) -> dict[str, list[list[Measurement]]]:
    """Of each dataset, the trainings of which three snapshots or more are measured."""
    groups: dict[str, dict[str, list[Measurement]]] = defaultdict(lambda: defaultdict(list))
    known = [m for m in measurements if not labels.foreign(m)]
    for m in sorted(known, key=lambda m: m.checkpoint["epoch"]):
        groups[labels.comparable(m)][labels.training(m)].append(m)
    found = {}
    for data, trainings in sorted(groups.items()):
        series = [snapshots for snapshots in trainings.values() if len(snapshots) > 2]
        if series:
            found[data] = sorted(series, key=lambda snapshots: labels.by_window(snapshots[0]))
    return found


def draw_layers(
    measurements: Iterable[Measurement],
    out: Path,
    formats: Sequence[str] = ("png",),
    *,
    below: Path | None = None,
) -> list[Path]:
    """For each checkpoint whose layers were measured: ``hessian_NAME_layers``.

    What has not converged is left blank. Names are those of `draw_hessians`.
    """
    written = []
    for m in measurements:
        if "layers/eigenvalues" not in m.arrays:
            continue
        names = [text.decode() for text in m.arrays["layers/names"]]
        found = m.arrays["layers/eigenvalues"]
        eigenvalues = np.where(m.arrays.get("layers/converged", True), found, np.nan)
        with mpl.rc_context(plots.STYLE):
            widest = max(plots.width(name, 6) for name in names)
            size = (max(5, min(2 * widest, MOST)), max(1.2 + 0.16 * len(names), 2.4))
            figure = Figure(figsize=size)
            plots.plot_layers(names, eigenvalues, ax=figure.subplots())
            name = labels.name(m, below or out)
            head(figure, labels.title(m, name))
            stem = f"hessian_{name}_layers{labels.suffix(m)}"
            written += save(figure, out, stem, formats)
    return written
