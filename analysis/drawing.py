"""Which measurements go into which figure. How they are drawn is in `analysis.plots`.

Every function writes into the folder `out` and returns the files it wrote. No PyTorch is needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from analysis import plots
from analysis.measurements import Measurement, collect
from analysis.statistics import across_seeds
from models.errors import InputError
from models.files import replacing

FORMATS = ("png", "svg", "pdf")
WINDOW_COLORS = {3: plots.COLORS[2], 5: plots.COLORS[1], 8: plots.COLORS[0]}


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
        own = [m for m in spectra if _home(m) == folder]
        written += draw_hessians(own, out, formats)
        written += draw_layers(own, out, formats)
        written += draw_hessian_comparison(spectra, out, formats)
        written += draw_hessian_training(spectra, out, formats)
        surfaces = collect([folder], f"landscape/{objective}")
        written += draw_landscapes(surfaces, out, formats)
    return written + draw_nll(collect([folder], "history"), out, formats)


def name(measurement: Measurement) -> str:
    """Short name of the checkpoint: ``csan8``, or ``csan8-epoch005`` for a snapshot."""
    path = measurement.path
    return f"{path.parent.name}-{path.stem}" if _is_snapshot(path) else path.stem


def _is_snapshot(path: Path) -> bool:
    return path.stem.startswith("epoch") and path.stem[5:].isdigit()


def _home(measurement: Measurement) -> Path:
    """Folder of the trained checkpoint that a measurement belongs to."""
    path = measurement.path
    return path.parent.parent if _is_snapshot(path) else path.parent


def label(measurement: Measurement) -> str:
    """What distinguishes the architecture: ``3×3``, ``8×8 (global)``, ``3×3, 3 heads``."""
    architecture = measurement.checkpoint["architecture"]
    window = architecture["window"]
    text = f"{window}×{window}"
    if window * architecture["patch_size"] >= architecture["image_size"]:
        text += " (global)"
    if architecture["head_window"] > 1:
        text += f", {architecture['head_window']} heads"
    text += "".join(
        f", {architecture[option]}"
        for option, usual in (("border", "clamp"), ("pooling", "gap"))
        if architecture[option] != usual
    )
    return text


def colors(labels: Iterable[str]) -> dict[str, str]:
    """The same colour for the same window everywhere; the rest from what remains of the cycle."""
    unique = list(dict.fromkeys(labels))
    fixed = {f"{w}×{w}": color for w, color in WINDOW_COLORS.items()}
    assigned = {text: fixed[text.split(" ")[0]] for text in unique if text.split(" ")[0] in fixed}
    free = [color for color in plots.COLORS if color not in assigned.values()]
    rest = [text for text in unique if text not in assigned]
    return assigned | {text: free[i % len(free)] for i, text in enumerate(rest)}


def stage(measurement: Measurement) -> str:
    """At which point of its training the checkpoint was kept."""
    epoch, recipe = measurement.checkpoint["epoch"], measurement.checkpoint["recipe"]
    if epoch == recipe["epochs"]:
        return f"end of training (epoch {epoch})"
    if epoch == recipe["warmup_epochs"]:
        return f"end of warm-up (epoch {epoch})"
    return f"epoch {epoch}"


def draw_hessians(
    measurements: Iterable[Measurement], out: Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """For each checkpoint: ``hessian_NAME``, its max eigenvalues and its spectral density."""
    written = []
    for m in measurements:
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(9, 3))
            negative, positive, density = figure.subplots(1, 3)
            color = colors([label(m)])[label(m)]
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
                f"{name(m)}: window {label(m)}, {stage(m)}\n{objective(m)}; max eigenvalues: top "
                f"{k} of each of {batches} mini-batches of {m.options['batch_size']} images"
            )
            written += save(figure, out, f"hessian_{name(m)}{suffix(m)}", formats)
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
        groups[dataset(m), m.checkpoint["epoch"]].append(m)
    written = []
    for (data, epoch), members in sorted(groups.items()):
        group = _measured_alike(members)
        by_label = by_architecture(group)
        if len(by_label) < 2:
            continue
        palette = colors(by_label)
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
                f"Hessian max eigenvalue spectra on {data}, {stage(group[0])}\n"
                f"{objective(group[0])}, {_seeds(by_label)}"
            )
            written += save(
                figure, out, f"hessian_{data}_epoch{epoch:03d}{suffix(group[0])}", formats
            )
    return written


def draw_hessian_training(
    measurements: Iterable[Measurement], out: Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """For each dataset: ``hessian_DATASET_training``, spectra and trace against the epoch.

    Of every training of which three snapshots or more have been measured.
    """
    groups: dict[str, dict[str, list[Measurement]]] = defaultdict(lambda: defaultdict(list))
    for m in sorted(measurements, key=lambda m: (by_window(m), m.checkpoint["epoch"])):
        groups[dataset(m)][training(m)].append(m)
    written = []
    for data, trainings in sorted(groups.items()):
        series = [snapshots for snapshots in trainings.values() if len(snapshots) > 2]
        if not series:
            continue
        palette = colors(label(snapshots[0]) for snapshots in series)
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(11, 2.8))
            axes = figure.subplots(1, 4)
            for snapshots in series:
                text = label(snapshots[0])
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
            figure.suptitle(f"Hessian over training on {data}, {objective(first)}")
            written += save(figure, out, f"hessian_{data}_training{suffix(first)}", formats)
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
            figure.suptitle(f"{name(m)}: window {label(m)}, {stage(m)}\n{objective(m)}")
            written += save(figure, out, f"hessian_{name(m)}_layers{suffix(m)}", formats)
    return written


def draw_landscapes(
    measurements: Iterable[Measurement], out: Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """For each dataset: ``landscape_DATASET_lines``, ``..._contours`` and ``..._surfaces``."""
    groups: dict[str, list[Measurement]] = defaultdict(list)
    for m in measurements:
        groups[dataset(m)].append(m)
    written = []
    for data, members in sorted(groups.items()):
        group = sorted(_measured_alike(members), key=by_window)
        with mpl.rc_context(plots.STYLE):
            for kind, figure in (
                ("lines", _lines(group)),
                ("contours", _contours(group)),
                ("surfaces", _surfaces(group)),
            ):
                figure.suptitle(f"Loss landscape on {data}, {objective(group[0])}")
                written += save(figure, out, f"landscape_{data}_{kind}{suffix(group[0])}", formats)
    return written


def _lines(group: Sequence[Measurement]) -> Figure:
    shown = {**losses(group[0], "line"), "error (%)": None}
    figure = Figure(figsize=(3.2 * len(shown), 2.9))
    axes = figure.subplots(1, len(shown))
    palette = colors(label(m) for m in group)
    for m in group:
        curves = {**losses(m, "line"), "error (%)": 100 * m.arrays["line/error"]}
        for (ylabel, values), ax in zip(curves.items(), axes, strict=True):
            plots.plot_line(
                m.arrays["line/xs"],
                values,
                ylabel=ylabel,
                label=f"{name(m)}: {label(m)}",
                color=palette[label(m)],
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
            ax.set_title(f"{name(m)}: {label(m)}")
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
            ax.set_title(f"{name(m)}: {label(m)}, {loss}", y=0.95)
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
        groups[dataset(m)].append(m)
    written = []
    for data, members in sorted(groups.items()):
        longest = max(m.checkpoint["recipe"]["epochs"] for m in members)
        by_label = by_architecture(
            m for m in members if m.checkpoint["recipe"]["epochs"] == longest
        )
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(8, 3.2))
            curves, plane = figure.subplots(1, 2)
            points = {}
            palette = colors(by_label)
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
                f"{_seeds(by_label)}"
            )
            written += save(figure, out, f"nll_{data}", formats)
    return written


def by_architecture(measurements: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Measurements by `label`, from local to global: the seeds of one architecture and recipe.

    Where a label would stand for several, it also names the options in which they differ.
    """
    alike: dict[str, list[Measurement]] = defaultdict(list)
    for m in sorted(measurements, key=by_window):
        alike[training(m, but="seed")].append(m)
    by_label: dict[str, list[list[Measurement]]] = defaultdict(list)
    for members in alike.values():
        by_label[label(members[0])].append(members)
    named = {}
    for text, configurations in by_label.items():
        options = [
            members[0].checkpoint["architecture"] | members[0].checkpoint["recipe"]
            for members in configurations
        ]
        differ = [key for key in options[0] if len({repr(o.get(key)) for o in options}) > 1]
        for members, own in zip(configurations, options, strict=True):
            named[text + "".join(f", {key} {own.get(key)}" for key in differ)] = members
    return named


def _seeds(groups: Mapping[str, Sequence[Measurement]]) -> str:
    """How many seeds there are for each label."""
    counts = sorted({len(members) for members in groups.values()})
    plural = "s" if counts[-1] > 1 else ""
    return f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seed{plural}"


def _measured_alike(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Those with the most common options: what was measured differently is not comparable."""
    options = [repr(sorted(m.options.items())) for m in measurements]
    common = max(options, key=options.count)
    return [m for m, own in zip(measurements, options, strict=True) if own == common]


def dataset(measurement: Measurement) -> str:
    """Name of the dataset, with the number of images if it was a part of it."""
    spec, images = measurement.checkpoint["dataset"], measurement.checkpoint["images"]
    return Path(spec).stem if images is None else f"{Path(spec).stem}-{images}"


def training(measurement: Measurement, *, but: str = "") -> str:
    """What all checkpoints of one training share; all but the option `but`."""
    made_by = ("architecture", "recipe", "dataset", "images", "seed")
    return repr([measurement.checkpoint[key] for key in made_by if key != but])


def objective(measurement: Measurement) -> str:
    """In words, what was differentiated or evaluated."""
    kind, split = measurement.options["objective"], measurement.options["split"]
    images = {"train": "augmented", "clean": "clean"}[kind]
    return f"{'NLL + L2' if kind == 'train' else 'NLL'} on {images} {split} images"


def suffix(measurement: Measurement) -> str:
    """Of file names: nothing for the usual objective, else which one it is."""
    which = measurement.name.partition("/")[2]
    return "" if which == "train" else f"_{which}"


def by_window(measurement: Measurement) -> tuple[int, int, str]:
    """Order of curves and panels: from local to global."""
    architecture = measurement.checkpoint["architecture"]
    return architecture["window"], architecture["head_window"], str(measurement.path)


def save(figure: Figure, out: Path, stem: str, formats: Sequence[str]) -> list[Path]:
    """Write `figure` in each format, whole or not at all."""
    paths = [out / f"{stem}.{extension}" for extension in formats]
    for path in paths:
        with replacing(path) as partial:
            figure.savefig(partial, format=path.suffix[1:], dpi=150)
    return paths
