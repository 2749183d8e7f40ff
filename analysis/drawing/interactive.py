"""Loss surfaces to turn around: pages for a browser and files for ParaView."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.measurements import labels
from analysis.measurements.landscapes import common_losses, interpolated, losses, names
from analysis.measurements.schema import Measurement
from lossgeometry.errors import InputError
from lossgeometry.pages.charts import Legend, Surface, surfaces
from lossgeometry.pages.page import Chart, write_page
from models.files import replacing


def write_html(group: Sequence[Measurement], path: Path, *, log: bool = True) -> list[Path]:
    """One self-contained page: surfaces to rotate, whose values show under the pointer.

    Needs plotly (``pip install 'locality-landscapes[export]'``).
    """
    return [write_page(path, "Loss landscape", [surface_chart(group, log=log)])]


def surface_chart(group: Sequence[Measurement], *, log: bool = True) -> Chart:
    """The surfaces of measurements that are compared, the first seeds of each switched on."""
    texts = labels.captions(group)
    common = common_losses(group, "surface")
    found = {
        (text, ""): Surface(
            m.arrays["surface/xs"],
            m.arrays["surface/ys"],
            {loss: losses(m, "surface")[loss] for loss in common},
            names(m),
            m.arrays["cut/points"],
            interpolated(m).strip(),
        )
        for text, m in zip(texts, group, strict=True)
    }
    title = f"Loss surfaces on {labels.comparable(group[0])}, {labels.split(group[0])} images"
    note = "Around trained weights, at (0, 0); all on the scale of their loss. Drag to turn all."
    unknown = sum(
        int((~np.isfinite(own)).sum()) for s in found.values() for own in s.losses.values()
    )
    if unknown:
        note += f" {unknown} values that are not finite are holes."
    return surfaces(title, network_legend(group, texts), found, log=log, note=note)


def network_legend(group: Sequence[Measurement], texts: Sequence[str]) -> Legend:
    """Of networks by their names, those of one kind in one colour, the first of it switched on."""
    kinds = labels.kinds(group)
    palette = labels.colors(kinds)
    firsts = {kind: m.path for kind, m in reversed(list(zip(kinds, group, strict=True)))}
    shown = [text for text, m in zip(texts, group, strict=True) if m.path in firsts.values()]
    colors = {text: palette[kind] for text, kind in zip(texts, kinds, strict=True)}
    return Legend([(text, "") for text in texts], "checkpoint", colors=colors, shown=shown)


def write_vtu(measurement: Measurement, path: Path) -> Path:
    """A surface as an unstructured grid, its height the NLL, all losses as point data.

    Cells with a point that is not finite are left out. Needs meshio.
    """
    try:
        meshio = importlib.import_module("meshio")
    except ImportError as error:
        raise InputError(
            "formats: meshio is not installed, expected pip install 'locality-landscapes[export]'"
        ) from error
    values = losses(measurement, "surface")
    height = values["NLL"]
    ys, xs = np.meshgrid(
        measurement.arrays["surface/ys"], measurement.arrays["surface/xs"], indexing="ij"
    )
    rows, columns = height.shape
    corner = np.arange(rows * columns).reshape(rows, columns)
    quads = np.stack(
        [corner[:-1, :-1], corner[:-1, 1:], corner[1:, 1:], corner[1:, :-1]], axis=-1
    ).reshape(-1, 4)
    finite = np.isfinite(height).ravel()
    quads = quads[finite[quads].all(axis=1)]
    points = np.stack([xs, ys, np.where(np.isfinite(height), height, 0.0)], axis=-1).reshape(-1, 3)
    data = {name: array.ravel() for name, array in values.items()}
    data["evaluated"] = measurement.arrays["surface/evaluated"].ravel().astype(np.uint8)
    mesh = meshio.Mesh(points, [("quad", quads)], point_data=data)
    with replacing(path) as partial:
        mesh.write(partial, file_format="vtu")
    return path
