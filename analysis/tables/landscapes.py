"""Tables of what was measured of a landscape. No PyTorch is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.measurements import labels
from analysis.measurements.schema import Measurement
from analysis.tables import Content, print_table
from lossgeometry.landscape.flatness import Flatness, barrier, flatness


def print_landscapes(measurements: Sequence[Measurement]) -> None:
    """Tables of the loss along the line and of what the cut says beyond, then what is missing."""
    for title, columns, rows in (
        along_line(measurements),
        flatness_rows(measurements),
        barriers(measurements),
    ):
        if rows:
            print_table(f"{title}, {labels.objective(measurements[0])}", columns, rows)
    for name, m in zip(labels.names(measurements), measurements, strict=True):
        unknown = int((~np.isfinite(m.arrays["surface/nll"])).sum())
        if unknown:
            total = m.arrays["surface/nll"].size
            print(f"{name}: not a number at {unknown} of {total} points of the surface")
        if m.options.get("adaptive") and m.arrays["surface/evaluated"].all():
            print(f"{name}: not smooth enough, all points of the surface evaluated")
        print(f"stored in {m.path}:/{m.name}")


def along_line(measurements: Sequence[Measurement]) -> Content:
    """Loss and error at the weights, and at the farther end of the line."""
    rows = []
    for own, m in zip(labels.names(measurements), measurements, strict=True):
        xs, nll = m.arrays["line/xs"], m.arrays["line/nll"]
        loss = nll + m.arrays.get("line/l2", 0.0)
        here, there = np.abs(xs).argmin(), np.abs(xs).argmax()
        rows.append(
            [
                own,
                labels.label(m),
                *(f"{values[here]:.4g}" for values in (nll, loss)),
                f"{m.arrays['test_line/nll'][here]:.4g}",
                f"{xs[there]:.3g}",
                *(f"{values[there]:.4g}" for values in (nll, loss)),
                f"{m.arrays['test_line/nll'][there]:.4g}",
            ]
        )
    name = str(measurements[0].options["directions"])
    columns = ["checkpoint", labels.kind(measurements), "at 0: NLL", "with L2", "clean test NLL"]
    columns += ["at x =", "NLL", "with L2", "clean test NLL"]
    return f"Along direction 1 ({name})", columns, rows


def flatness_of(measurement: Measurement) -> Flatness | None:
    """Flatness of the NLL along the random lines of a measurement; None if it has none."""
    arrays = measurement.arrays
    lines = [
        arrays[f"lines/{i}/nll"]
        for i in range(measurement.options["lines"] or 0)
        if f"lines/{i}/nll" in arrays
    ]
    return flatness(arrays["line/xs"], np.stack(lines)) if lines else None


def flatness_rows(measurements: Sequence[Measurement]) -> Content:
    """How flat the minimum is along random directions, with 95 % intervals over them alone.

    The images, and what augmentation and mixup drew for them, are the same along all.
    """
    rows = []
    for own, m in zip(labels.names(measurements), measurements, strict=True):
        found = flatness_of(m)
        if found is not None:
            estimates = found.estimates()
            digits = {"curvature": ".2f", "width": ".3f", "asymmetry": ".3f", "sharpness": ".2f"}
            cells = {key: estimates[key].format(form) for key, form in digits.items()}
            wide = np.isposinf(found.width).sum()
            if wide:
                cells["width"] = f"not reached: {wide} of {len(found.width)}"
            if np.isnan(found.sharpness).all() and np.isfinite(found.curvature).any():
                cells["sharpness"] = "grid too coarse"
            rows.append([own, labels.label(m), *cells.values()])
    n = measurements[0].options["lines"]
    columns = [
        "checkpoint",
        labels.kind(measurements),
        "curvature",
        "width at +0.1",
        "asymmetry",
        "sharpness %",
    ]
    return f"Flatness of the NLL over {n} random directions; ± 95 % interval", columns, rows


def barriers(measurements: Sequence[Measurement]) -> Content:
    """Height of the barriers on the paths to another checkpoint."""
    rows = []
    for own, m in zip(labels.names(measurements), measurements, strict=True):
        for path in ("linear", "bezier"):
            nll = m.arrays.get(f"cut/extras/{path}/nll")
            if nll is not None:
                ts, error = m.arrays["cut/extras/ts"], m.arrays[f"cut/extras/{path}/error"]
                heights = (barrier(ts, nll), 100 * barrier(ts, error))
                cells = [f"{nll[0]:.4g}", f"{nll[-1]:.4g}", *(f"{h:.4g}" for h in heights)]
                rows.append([own, labels.label(m), path, *cells])
    columns = [
        "checkpoint",
        labels.kind(measurements),
        "path",
        "NLL here",
        "NLL there",
        "NLL barrier",
        "error barrier %",
    ]
    return "Paths to the other checkpoint", columns, rows
