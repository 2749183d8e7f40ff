"""Which measurements go into which figure. How they are drawn is in `analysis.plots`.

Every function writes into the folder `out` and returns the files it wrote. No PyTorch is needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from analysis import labels, plots
from analysis.measurements import Measurement, collect
from analysis.statistics import across_seeds
from models.errors import InputError
from models.files import replacing

FORMATS = ("png", "svg", "pdf")


def draw_all(folder: Path, out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Every figure of the measurements in `folder` and below it.

    Raises `InputError` if there are none, or a format is unknown.
    """
    for extension in formats:
        if extension not in FORMATS:
            raise InputError(f"formats: {extension!r} found, expected some of {', '.join(FORMATS)}")
    if not any(folder.rglob("*.h5")):
        raise InputError(f"measurements: no HDF5 file in {folder}, measure a checkpoint first")
    written = []
    for objective in ("train", "train_test", "clean", "clean_test"):
        spectra = collect([folder], f"hessian/{objective}")
        own = [m for m in spectra if labels.home(m) == folder]
        written += draw_hessians(own, out, formats)
        written += draw_layers(own, out, formats)
        written += draw_hessian_comparison(spectra, out, formats)
        written += draw_hessian_training(spectra, out, formats)
        surfaces = collect([folder], f"landscape/{objective}")
        written += draw_landscapes(surfaces, out, formats)
    return written + draw_nll(collect([folder], "history"), out, formats)


def draw_hessians(
    measurements: Iterable[Measurement], out: Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """For each checkpoint: ``hessian_NAME``, its max eigenvalues and its spectral density."""
    written = []
    for m in measurements:
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
                color=color,
                ax=density,
            )
            batches, k = eigenvalues.shape
            figure.suptitle(
                f"{labels.title(m)}; max eigenvalues: top {k} of each of {batches} mini-batches of "
                f"{m.options['batch_size']} images"
            )
            written += save(figure, out, f"hessian_{labels.name(m)}{labels.suffix(m)}", formats)
    return written


def draw_hessian_comparison(
    measurements: Iterable[Measurement], out: Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """For each dataset and epoch with several windows: ``hessian_DATASET_epochN``.

    Max eigenvalues of all seeds of a window pooled, negative and positive halves side by side, as
    in Park and Kim 2022, Figure 7 (right).
    """
    groups: dict[tuple[str, int], list[Measurement]] = defaultdict(list)
    for m in measurements:
        groups[labels.dataset(m), m.checkpoint["epoch"]].append(m)
    written = []
    for (data, epoch), members in sorted(groups.items()):
        group = labels.measured_alike(members)
        by_label = labels.by_architecture(group)
        if len(by_label) < 2:
            continue
        palette = labels.colors(by_label)
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(7, 3.8))
            axes = figure.subplots(1, 2)
            for half, ax in zip(("negative", "positive"), axes, strict=True):
                for text, members in by_label.items():
                    plots.plot_max_eigenvalues(
                        np.concatenate([m.arrays["eigenvalues"] for m in members]),
                        half,
                        label=text,
                        color=palette[text],
                        ax=ax,
                    )
                ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8)
            figure.suptitle(
                f"Hessian max eigenvalue spectra on {data}, {labels.stage(group[0])}\n"
                f"{labels.objective(group[0])}, {labels.seeds(by_label)}"
            )
            written += save(
                figure, out, f"hessian_{data}_epoch{epoch:03d}{labels.suffix(group[0])}", formats
            )
    return written


def draw_hessian_training(
    measurements: Iterable[Measurement], out: Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """For each dataset: ``hessian_DATASET_training``, spectra and trace against the epoch.

    Of every training of which three snapshots or more have been measured.
    """
    groups: dict[str, dict[str, list[Measurement]]] = defaultdict(lambda: defaultdict(list))
    for m in sorted(measurements, key=lambda m: m.checkpoint["epoch"]):
        groups[labels.dataset(m)][labels.training(m)].append(m)
    written = []
    for data, trainings in sorted(groups.items()):
        series = [labels.measured_alike(snapshots) for snapshots in trainings.values()]
        series = [snapshots for snapshots in series if len(snapshots) > 2]
        series.sort(key=lambda snapshots: labels.by_window(snapshots[0]))
        if not series:
            continue
        palette = labels.colors(labels.label(snapshots[0]) for snapshots in series)
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(11, 2.8))
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
            axes[1].legend(title="window")
            first = series[0][0]
            figure.suptitle(f"Hessian over training on {data}, {labels.objective(first)}")
            written += save(figure, out, f"hessian_{data}_training{labels.suffix(first)}", formats)
    return written


def draw_layers(
    measurements: Iterable[Measurement], out: Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """For each checkpoint whose layers were measured: ``hessian_NAME_layers``."""
    written = []
    for m in measurements:
        if "layers/eigenvalues" not in m.arrays:
            continue
        names = [text.decode() for text in m.arrays["layers/names"]]
        eigenvalues = m.arrays["layers/eigenvalues"]
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(5, 1.2 + 0.16 * len(names)))
            plots.plot_layers(names, eigenvalues, ax=figure.subplots())
            figure.suptitle(labels.title(m))
            stem = f"hessian_{labels.name(m)}_layers{labels.suffix(m)}"
            written += save(figure, out, stem, formats)
    return written


def draw_landscapes(
    measurements: Iterable[Measurement], out: Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """For each dataset: ``landscape_DATASET_lines``, ``..._contours`` and ``..._surfaces``."""
    groups: dict[str, list[Measurement]] = defaultdict(list)
    for m in measurements:
        groups[labels.dataset(m)].append(m)
    written = []
    for data, members in sorted(groups.items()):
        group = sorted(labels.measured_alike(members), key=labels.by_window)
        with mpl.rc_context(plots.STYLE):
            for kind, figure in (
                ("lines", _lines(group)),
                ("contours", _contours(group)),
                ("surfaces", _surfaces(group)),
            ):
                figure.suptitle(f"Loss landscape on {data}, {labels.objective(group[0])}")
                stem = f"landscape_{data}_{kind}{labels.suffix(group[0])}"
                written += save(figure, out, stem, formats)
    return written


def _lines(group: Sequence[Measurement]) -> Figure:
    shown = {**losses(group[0], "line"), "error (%)": None}
    figure = Figure(figsize=(3.2 * len(shown), 2.9))
    axes = figure.subplots(1, len(shown))
    palette = labels.colors(labels.label(m) for m in group)
    for m in group:
        curves = {**losses(m, "line"), "error (%)": 100 * m.arrays["line/error"]}
        for (ylabel, values), ax in zip(curves.items(), axes, strict=True):
            plots.plot_line(
                m.arrays["line/xs"],
                values,
                ylabel=ylabel,
                label=f"{labels.name(m)}: {labels.label(m)}",
                color=palette[labels.label(m)],
                ax=ax,
            )
    for ax in axes[:-1]:
        plots.log_scale(ax)
    axes[0].legend()
    return figure


def _contours(group: Sequence[Measurement]) -> Figure:
    rows = list(losses(group[0], "surface"))
    figure = Figure(figsize=(2.6 * len(group) + 0.9, 2.5 * len(rows) + 0.4))
    axes = figure.subplots(len(rows), len(group), squeeze=False, sharex=True, sharey=True)
    for loss, row in zip(rows, axes, strict=True):
        norm = plots.shared_norm([losses(m, "surface")[loss] for m in group])
        for m, ax in zip(group, row, strict=True):
            xs, ys = m.arrays["surface/xs"], m.arrays["surface/ys"]
            plots.plot_contours(xs, ys, losses(m, "surface")[loss], norm=norm, ax=ax)
            ax.set_title(f"{labels.name(m)}: {labels.label(m)}")
            ax.label_outer()
        ticks = norm.inverse(np.linspace(0, 1, 5))
        scale = ScalarMappable(norm, plots.STYLE["image.cmap"])
        bar = figure.colorbar(scale, ax=row, label=loss, ticks=ticks, format="%.3g")
        bar.ax.minorticks_off()
    return figure


def _surfaces(group: Sequence[Measurement]) -> Figure:
    rows = list(losses(group[0], "surface"))
    figure = Figure(figsize=(3.1 * len(group), 3.0 * len(rows) + 0.3))
    axes = figure.subplots(len(rows), len(group), squeeze=False, subplot_kw=dict(projection="3d"))
    for loss, row in zip(rows, axes, strict=True):
        norm = plots.shared_norm([losses(m, "surface")[loss] for m in group])
        for m, ax in zip(group, row, strict=True):
            xs, ys = m.arrays["surface/xs"], m.arrays["surface/ys"]
            plots.plot_surface(xs, ys, losses(m, "surface")[loss], norm=norm, ax=ax)
            ax.set_title(f"{labels.name(m)}: {labels.label(m)}, {loss}", y=0.95)
    return figure


def losses(measurement: Measurement, part: str) -> dict[str, np.ndarray]:
    """What is drawn of a "line" or "surface": NLL + L2, where there is a penalty, and NLL."""
    nll, l2 = (measurement.arrays.get(f"{part}/{key}") for key in ("nll", "l2"))
    assert nll is not None
    return {"NLL": nll} if l2 is None else {"NLL + L2": nll + l2, "NLL": nll}


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


def save(figure: Figure, out: Path, stem: str, formats: Sequence[str]) -> list[Path]:
    """Write `figure` in each format, whole or not at all."""
    paths = [out / f"{stem}.{extension}" for extension in formats]
    for path in paths:
        with replacing(path) as partial:
            figure.savefig(partial, format=path.suffix[1:], dpi=150)
    return paths
