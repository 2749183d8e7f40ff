"""The paper's own loss surfaces beside those measured here."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from analysis.measurements import labels
from analysis.measurements.files import collect, sparing
from analysis.measurements.landscapes import losses
from analysis.measurements.schema import Measurement
from lossgeometry import plots
from lossgeometry.errors import InputError

PENALTY = 0.05  # what the paper's plot multiplies its L2 with
COLUMNS = {"x": 0, "y": 1, "l2": 3, "nll": 4}
NETWORKS = {"resnet50": "ResNet-50", "vit_ti": "ViT-Ti"}  # what their files are named for


@dataclass(frozen=True)
class Surface:
    """A named loss surface."""

    title: str
    xs: np.ndarray  # (nx,)
    ys: np.ndarray  # (ny,)
    values: np.ndarray  # (ny, nx)


def read_surface(path: Path) -> Surface:
    """NLL + 0.05 L2 of a published file.

    Raises `InputError` if it cannot be read, or its points are not a whole grid.
    """
    try:
        # A name alone might be unpacked or downloaded; an empty file is complained of below.
        with path.open(encoding="utf-8") as lines, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = np.loadtxt(lines, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}, expected lines of comma-separated numbers") from error
    if table.shape[0] == 0 or table.shape[1] <= max(COLUMNS.values()):
        raise InputError(f"{path}: a table of {table.shape}, expected x, y, L1, L2, NLL, ...")
    x, y, l2, nll = (table[:, column] for column in COLUMNS.values())
    if not np.isfinite(x).all() or not np.isfinite(y).all():
        raise InputError(f"{path}: points that are not finite, expected a grid")
    xs, column = np.unique(x.round(9), return_inverse=True)
    ys, row = np.unique(y.round(9), return_inverse=True)
    if (
        len(np.unique(row * len(xs) + column)) != len(xs) * len(ys)
        or len(table) != xs.size * ys.size
    ):
        raise InputError(
            f"{path}: {len(table)} points, expected each of a {len(ys)} x {len(xs)} grid once"
        )
    if min(len(xs), len(ys)) < 2:
        raise InputError(f"{path}: a grid of {len(ys)} x {len(xs)}, expected at least 2 x 2")
    values = np.empty((len(ys), len(xs)))
    values[row, column] = nll + PENALTY * l2
    known = (words for name, words in NETWORKS.items() if path.stem.endswith(name))
    return Surface(next(known, path.stem), xs, ys, values)


def own_surfaces(folder: Path, left_out: list[InputError]) -> list[Surface]:
    """NLL + L2 of the trained checkpoints right in `folder`, along random directions."""

    def read(found: Sequence[Measurement]) -> list[Surface]:
        return [
            Surface(
                title,
                m.arrays["surface/xs"],
                m.arrays["surface/ys"],
                list(losses(m, "surface").values())[-1],
            )
            for title, m in zip(labels.captions(found), found, strict=True)
        ]

    found = collect(sorted(folder.glob("*.h5")), "landscape/train", left_out)
    return sparing(read, sorted(found, key=labels.by_window), left_out)


def draw(rows: dict[str, Sequence[Surface]], kind: str, *, log: bool) -> Figure:
    """One row of panels for each source; every panel has a scale of its own."""
    widest = max(len(surfaces) for surfaces in rows.values())
    figure = Figure(figsize=(3.2 * widest, 3.1 * len(rows)))
    projection = {"projection": "3d" if kind == "surfaces" else None}
    parts = figure.subfigures(len(rows), squeeze=False).flat
    for part, (source, surfaces) in zip(parts, rows.items(), strict=True):
        axes = part.subplots(1, len(surfaces), squeeze=False, subplot_kw=projection)
        for surface, ax in zip(surfaces, axes.flat, strict=True):
            norm = plots.shared_norm([surface.values], log=log)
            plot = plots.plot_surface if kind == "surfaces" else plots.plot_contours
            plot(surface.xs, surface.ys, surface.values, norm=norm, ax=ax)
            ax.set_title(plots.fitted(f"{source}, {surface.title}", 3))
    figure.suptitle("NLL + L2 around trained weights, each on a scale of its own")
    return figure
