"""What is drawn of a stored landscape. No PyTorch is needed."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from analysis.measurements.schema import Measurement


def losses(measurement: Measurement, part: str) -> dict[str, np.ndarray]:
    """What is drawn of a "line" or "surface": NLL and, where there is a penalty, NLL + L2."""
    nll = measurement.arrays[f"{part}/nll"]
    penalty = np.asarray(measurement.arrays.get(f"{part}/l2", 0.0))
    return {"NLL": nll} | ({"NLL + L2": nll + penalty} if (penalty > 0).any() else {})


def common_losses(group: Sequence[Measurement], part: str) -> list[str]:
    """Those that all measurements have: one without a penalty has only the NLL."""
    return min((list(losses(m, part)) for m in group), key=len)


def names(measurement: Measurement) -> tuple[str, str]:
    """Of the two directions."""
    first, second = measurement.arrays["cut/names"].tolist()
    return first.decode(), second.decode()


def extent(measurement: Measurement) -> list[float]:
    """Of the surface: least and largest step along either direction."""
    return [float(f(measurement.arrays[f"surface/{a}"])) for a in ("xs", "ys") for f in (min, max)]


def interpolated(measurement: Measurement) -> str:
    """What an adaptive surface is worth, as a second line of a title."""
    how = json.loads(measurement.arrays["surface/settings"].tobytes())
    if not how.get("interpolated"):
        return ""
    return (
        f"\n{how['evaluations']} of {measurement.arrays['surface/evaluated'].size} points, "
        f"error {how['objective_error']:.1%}"
    )
