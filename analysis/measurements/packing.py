"""Slices and cuts as arrays of a measurement, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.cuts import Cut
from lossgeometry.landscape.sampling import Slice
from lossgeometry.running.saving import above, below


def pack(part: str, result: Slice) -> dict[str, np.ndarray]:
    """Arrays of a slice, by the names they are stored under."""
    arrays = {**result, "xs": result.xs, "done": result.done}
    if result.ys is not None:
        arrays["ys"] = result.ys
    return below(part, arrays | {"attributes": _text(result.attributes)})


def unpack(part: str, stored: Mapping[str, np.ndarray]) -> Slice | None:
    """Inverse of `pack`; None if the part has not been begun."""
    arrays = above(part, stored)
    if "done" not in arrays:
        return None
    return Slice(
        xs=arrays.pop("xs"),
        ys=arrays.pop("ys", None),
        done=arrays.pop("done"),
        attributes=json.loads(arrays.pop("attributes").tobytes()),
        metrics=arrays,
    )


def pack_cut(cut: Cut) -> dict[str, np.ndarray]:
    """Arrays of a cut, its directions included, by the names they are stored under."""
    ranges = {"names": cut.names, "low": cut.low, "high": cut.high}
    arrays = {"directions": cut.directions, "marks": cut.marks, "ranges": _text(ranges)}
    return below("cut", arrays) | below("cut/extras", cut.extras)


def unpack_cut(stored: Mapping[str, np.ndarray]) -> Cut | None:
    """Inverse of `pack_cut`; None if there is none."""
    arrays = above("cut", stored)
    if not arrays:
        return None
    ranges = json.loads(arrays["ranges"].tobytes())
    return Cut(
        directions=arrays["directions"],
        marks=arrays["marks"],
        extras=above("extras", arrays),
        **{key: tuple(values) for key, values in ranges.items()},
    )


def _text(value: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
