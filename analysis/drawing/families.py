"""Figures of several families of networks: range in each, and the paper's Figures 1, 4, 5 and 6."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from analysis.drawing import head, legend, save
from analysis.drawing.hessians import plot_halves
from analysis.measurements import labels
from analysis.measurements.comparisons import families, file_stem, in_families
from analysis.measurements.landscapes import losses
from analysis.measurements.schema import Measurement
from lossgeometry import plots
from lossgeometry.statistics import across_seeds
from models.description import token_range

Group = dict[str, list[Measurement]]  # by what `in_families` calls them
ENDS = (("train_nll", "train NLL", 1), ("test_error", "test error (%)", 100))
VIT, GAP, RESNET = "ViT (CLS)", "ViT (GAP)", "ResNet"
PAIR = (RESNET, VIT)  # of the paper's Figure 1
HISTORY, SPECTRUM = "history", "hessian/train"
SURFACE, WAY = "landscape/train", "landscape_pca/train"
KINDS = (HISTORY, SPECTRUM, SURFACE, WAY)  # of measurements, that these figures are of


def draw_families(
    measurements: Iterable[Measurement], out: Path, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """For each comparison of families: ``ranges_NAME``, and ``figureN_NAME`` as the paper has them.

    ``figure1`` is a surface, a trajectory and spectra of a ResNet and a ViT; ``figure4`` spectra of
    the two, and of the ViT on fewer images; ``figure5`` where trainings end, with arrows from a
    global range to local ones; ``figure6`` spectra with a class token and with an average. Each is
    drawn where what it shows has been measured. Spectra are those of the end of warm-up.
    """
    found = list(measurements)
    written = []
    for name, members in families(found).items():
        by_kind: dict[str, Group] = defaultdict(lambda: defaultdict(list))
        for m in sorted(members, key=labels.by_window):
            if m.name != SPECTRUM or _is_early(m):
                by_kind[m.name][in_families(m)].append(m)
        by_kind[SPECTRUM] |= _on_fewer_images(by_kind[SPECTRUM].get(VIT, []), found)
        for stem, draw in FIGURES.items():
            with mpl.rc_context(plots.STYLE):
                figure = draw(by_kind, name)
                if figure is not None:
                    written += save(figure, out, f"{stem}_{file_stem(name)}", formats)
    return written


def _is_early(m: Measurement) -> bool:
    return bool(m.checkpoint["epoch"] == m.checkpoint["recipe"]["warmup_epochs"])


def _on_fewer_images(whole: Sequence[Measurement], found: Sequence[Measurement]) -> Group:
    """Spectra of the same trainings on a part of the images."""
    own = {m.path for m in whole}
    but_images = {labels.training(m, but="images") for m in whole}
    fewer: Group = defaultdict(list)
    for m in found:
        images = m.checkpoint["images"]
        if m.name != SPECTRUM or not _is_early(m) or images is None or m.path in own:
            continue
        if labels.training(m, but="images") in but_images:
            fewer[f"{labels.label(m)}, {images} images"].append(m)
    return fewer


def _by_family(histories: Group) -> dict[str, Group]:
    """Families in their order, each from global to local."""
    found: dict[str, Group] = defaultdict(dict)
    for text, members in reversed(histories.items()):
        found[labels.family(members[0])][text] = members
    return {own: found[own] for own in labels.NETWORKS.values() if own in found}


def _range(members: Sequence[Measurement]) -> int | None:
    return token_range(members[0].checkpoint["architecture"])


def _ranges(by_kind: Mapping[str, Group], name: str) -> Figure | None:
    """Train NLL and test error against the range, a line for each family."""
    lines: dict[str, Group] = {}
    reach: dict[str, int] = {}  # of the names below the axis
    for own, of_text in _by_family(by_kind[HISTORY]).items():
        for text, members in of_text.items():
            if tokens := _range(members):
                place = text.removeprefix(f"{own} ")
                reach[place] = tokens
                lines.setdefault(own, {})[place] = members
    if len(reach) < 2:
        return None
    names = sorted(reach, key=lambda place: reach[place])
    figure = Figure(figsize=(7.5, 3.6))
    axes = figure.subplots(1, 2)
    for i, (own, of_range) in enumerate(lines.items()):
        for (key, ylabel, scale), ax in zip(ENDS, axes, strict=True):
            ends = [
                across_seeds([scale * float(m.arrays[key][-1]) for m in members])
                for members in of_range.values()
            ]
            places = np.array([names.index(place) for place in of_range])
            plots.plot_points(
                places + 0.06 * (i - (len(lines) - 1) / 2),  # intervals side by side
                np.array([end.mean for end in ends]),
                np.array([end.half_width for end in ends]),
                xlabel="range, in tokens",
                ylabel=ylabel,
                names=names,
                label=own,
                color=labels.FAMILY_COLORS.get(own),
                ax=ax,
            )
    legend(figure, axes[0], most=5)
    every = {f"{own} {place}": of[place] for own, of in lines.items() for place in of}
    head(figure, f"Range on {name}: mean and 95 % interval over {labels.seeds(every)}")
    return figure


def _plane(by_kind: Mapping[str, Group], name: str) -> Figure | None:
    """Train NLL against test error."""
    of_family = _by_family(by_kind[HISTORY])
    if not of_family:
        return None
    points: dict[str, list[tuple[str, float, float, float, float]]] = defaultdict(list)
    for own, of_text in of_family.items():
        for text, members in of_text.items():
            x, y = (across_seeds([float(m.arrays[key][-1]) for m in members]) for key, *_ in ENDS)
            # The others are of no range: each stands for itself.
            label, place = (own, text.removeprefix(f"{own} ")) if _range(members) else (text, "")
            points[label].append((place, x.mean, x.half_width, y.mean, y.half_width))
    figure = Figure(figsize=(6, 4.6))
    ax = figure.subplots()
    plots.plot_families(points, colors=labels.FAMILY_COLORS, ax=ax)
    legend(figure, ax, most=5)
    seeds = labels.seeds(by_kind[HISTORY])
    head(figure, f"Optimisation on {name}: mean and 95 % interval over {seeds}")
    return figure


def _spectra(*compared: str) -> Callable[[Mapping[str, Group], str], Figure | None]:
    """Max eigenvalues of networks of these texts, and of what else begins with the last one's."""

    def draw(by_kind: Mapping[str, Group], name: str) -> Figure | None:
        spectra = by_kind[SPECTRUM]
        if not all(text in spectra for text in compared):
            return None
        chosen = {
            text: labels.measured_alike(members)
            for text, members in spectra.items()
            if text in compared or text.startswith(f"{compared[-1]}, ")
        }
        figure = Figure(figsize=(7, 3.9))
        colors = dict(zip(chosen, labels.COLORS, strict=False))
        plot_halves(chosen, colors, figure.subplots(1, 2))
        first = chosen[compared[0]][0]
        head(
            figure,
            f"Hessian max eigenvalue spectra on {name}, {labels.stage(first)}\n"
            f"{labels.objective(first)}, {labels.seeds(chosen)}",
        )
        return figure

    return draw


def _figure1(by_kind: Mapping[str, Group], name: str) -> Figure | None:
    """Surfaces, then trajectories and spectra, of two networks."""
    kinds = (SURFACE, WAY, SPECTRUM)
    if not all(text in by_kind[kind] for kind in kinds for text in PAIR):
        return None
    figure = Figure(figsize=(9, 6.4))
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    above, below = halves
    surfaces = [losses(by_kind[SURFACE][text][0], "surface")["NLL"] for text in PAIR]
    norm = plots.shared_norm(surfaces)
    for i, (text, surface) in enumerate(zip(PAIR, surfaces, strict=True)):
        arrays = by_kind[SURFACE][text][0].arrays
        ax = above.add_subplot(1, 2, i + 1, projection="3d")
        plots.plot_surface(arrays["surface/xs"], arrays["surface/ys"], surface, norm=norm, ax=ax)
        ax.set_title(f"{text}, NLL", y=0.95)
    polar = below.add_subplot(1, 3, 1, projection="polar")
    colors = dict(zip(PAIR, labels.COLORS, strict=False))
    for text in PAIR:
        arrays = by_kind[WAY][text][0].arrays
        angles, distances = (arrays[f"cut/extras/polar/{key}"] for key in ("angles", "distances"))
        plots.plot_polar(angles, distances, label=text, color=colors[text], ax=polar)
    polar.set_title("as seen from the end")
    spectra = {text: labels.measured_alike(by_kind[SPECTRUM][text]) for text in PAIR}
    plot_halves(spectra, colors, [below.add_subplot(1, 3, i) for i in (2, 3)])
    first = spectra[VIT][0]
    where = f"spectra: {labels.objective(first)}, {labels.stage(first)}, {labels.seeds(spectra)}"
    head(figure, f"Surface and trajectory (one seed), and spectra, on {name}\n{where}")
    return figure


FIGURES: dict[str, Callable[[Mapping[str, Group], str], Figure | None]] = {
    "ranges": _ranges,
    "figure1": _figure1,
    "figure4": _spectra(*PAIR),
    "figure5": _plane,
    "figure6": _spectra(VIT, GAP),
}
