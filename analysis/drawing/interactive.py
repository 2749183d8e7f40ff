"""Loss surfaces to turn around: pages for a browser and files for ParaView."""

from __future__ import annotations

import html
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm

from analysis.measurements import labels
from analysis.measurements.landscapes import common_losses, losses, names
from analysis.measurements.schema import Measurement
from lossgeometry import plots
from lossgeometry.errors import InputError
from models.files import replacing


def write_html(group: Sequence[Measurement], path: Path, *, log: bool = True) -> list[Path]:
    """One self-contained page: a surface to rotate, whose values show under the pointer.

    Buttons switch between the checkpoints and between their losses; heights and colours of one loss
    are on the same scale for all. Needs plotly (``pip install 'locality-landscapes[export]'``).
    """
    graph = _require("plotly.graph_objects")
    figure = graph.Figure()
    views: list[tuple[str, dict[str, Any]]] = []
    for loss in common_losses(group, "surface"):
        norm = plots.shared_norm([losses(m, "surface")[loss] for m in group], log=log)
        ticks = np.asarray(norm.inverse(np.linspace(0, 1, 6)))
        scaled = np.log10 if isinstance(norm, LogNorm) else np.asarray
        height = dict(tickvals=scaled(ticks).tolist(), ticktext=plots.tell_apart(ticks))
        low, *_, high = height["tickvals"]
        axis = dict(title=dict(text=loss), range=[low, high], **height)
        for m, caption in zip(group, labels.captions(group), strict=True):
            values = losses(m, "surface")[loss]
            values = np.where(np.isfinite(values), values, np.nan)  # a hole
            first, second = map(html.escape, names(m))
            figure.add_surface(
                x=m.arrays["surface/xs"],
                y=m.arrays["surface/ys"],
                z=scaled(values),
                customdata=values,
                cmin=low,
                cmax=high,
                colorscale=plots.STYLE["image.cmap"],
                colorbar=dict(
                    title=dict(text=loss), tickvals=axis["tickvals"], ticktext=axis["ticktext"]
                ),
                hovertemplate=f"{first} %{{x:.3f}}<br>{second} %{{y:.3f}}<br>"
                f"{loss} %{{customdata:.5g}}<extra></extra>",
                visible=not views,
            )
            scene = {
                "scene.xaxis.title.text": first,
                "scene.yaxis.title.text": second,
                "scene.zaxis": axis,
            }
            views.append((f"{html.escape(caption)}, {loss}", scene))
    buttons = [
        dict(
            label=label,
            method="update",
            args=[{"visible": [j == i for j in range(len(views))]}, scene],
        )
        for i, (label, scene) in enumerate(views)
    ]
    figure.update_layout(
        title=html.escape(
            f"Loss landscape on {labels.comparable(group[0])}, {labels.split(group[0])} images"
        ),
        scene=dict(
            xaxis=dict(title=dict(text=views[0][1]["scene.xaxis.title.text"])),
            yaxis=dict(title=dict(text=views[0][1]["scene.yaxis.title.text"])),
            zaxis=views[0][1]["scene.zaxis"],
            aspectmode="cube",
            camera_eye=dict(x=1.6, y=1.6, z=1.1),
        ),
        height=700,
        margin=dict(l=0, r=0, t=60, b=10),
        updatemenus=[dict(type="buttons", x=0.01, xanchor="left", buttons=buttons)],
    )
    with replacing(path) as partial:
        partial.write_text(figure.to_html(div_id="landscape"))
    return [path]


def write_vtu(measurement: Measurement, path: Path) -> Path:
    """A surface as an unstructured grid, its height the NLL, all losses as point data.

    Cells with a point that is not finite are left out. Needs meshio.
    """
    meshio = _require("meshio")
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
    data["evaluated"] = measurement.arrays["surface/done"].ravel().astype(np.uint8)
    mesh = meshio.Mesh(points, [("quad", quads)], point_data=data)
    with replacing(path) as partial:
        mesh.write(partial, file_format="vtu")
    return path


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"formats: {package.partition('.')[0]} is not installed, expected "
            "pip install 'locality-landscapes[export]'"
        ) from error
