"""Slices and cuts as arrays of a measurement, and back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from analysis.landscape.cuts import Cut
from analysis.landscape.sampling import Slice
from analysis.measurements import Measurement


def pack(part: str, result: Slice) -> dict[str, np.ndarray]:
    """Arrays of a slice, by the names they are stored under."""
    arrays = {**result, "xs": result.xs, "done": result.done}
    if result.ys is not None:
        arrays["ys"] = result.ys
    return _below(part, arrays | {"attributes": _text(result.attributes)})


def unpack(part: str, measurement: Measurement | None) -> Slice | None:
    """Inverse of `pack`; None if the part has not been begun."""
    arrays = _above(part, measurement)
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
    return _below("cut", arrays) | _below("cut/extras", cut.extras)


def unpack_cut(measurement: Measurement | None) -> Cut | None:
    """Inverse of `pack_cut`; None if there is none."""
    arrays = _above("cut", measurement)
    if not arrays:
        return None
    ranges = json.loads(arrays["ranges"].tobytes())
    return Cut(
        directions=arrays["directions"],
        marks=arrays["marks"],
        extras=_above("cut/extras", measurement),
        **{key: tuple(values) for key, values in ranges.items()},
    )


def _text(value: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def _below(folder: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{folder}/{key}": array for key, array in arrays.items()}


def _above(folder: str, measurement: Measurement | None) -> dict[str, np.ndarray]:
    stored = measurement.arrays if measurement else {}
    start = f"{folder}/"
    return {k.removeprefix(start): array for k, array in stored.items() if k.startswith(start)}
