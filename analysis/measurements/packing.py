"""Slices and cuts as arrays of a measurement, and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import nn

from analysis.cuts import Cut
from lossgeometry.landscape.sampling import Slice
from lossgeometry.parameters import select_parameters
from lossgeometry.running.saving import above, below
from lossgeometry.storing import from_arrays, parameters, to_arrays


def pack(part: str, result: Slice) -> dict[str, np.ndarray]:
    """Arrays of a slice, by the names they are stored under."""
    return below(part, to_arrays(result))


def unpack(part: str, stored: Mapping[str, np.ndarray]) -> Slice | None:
    """Inverse of `pack`; None if the part has not been begun."""
    arrays = above(part, stored)
    return from_arrays(Slice, arrays) if arrays else None


def pack_cut(cut: Cut, model: nn.Module) -> dict[str, np.ndarray]:
    """Arrays of a cut, its directions included, by the names they are stored under."""
    arrays = {
        "directions": cut.directions,
        "parameters": parameters(select_parameters(model)),
        "names": np.char.encode(cut.names, "utf-8"),
        "low": np.array(cut.low),
        "high": np.array(cut.high),
        "points": cut.points,
    }
    return below("cut", arrays) | below("cut/extras", cut.extras)


def unpack_cut(stored: Mapping[str, np.ndarray]) -> Cut | None:
    """Inverse of `pack_cut`; None if there is none."""
    arrays = above("cut", stored)
    if not arrays:
        return None
    names, low, high = (arrays[key].tolist() for key in ("names", "low", "high"))
    return Cut(
        directions=arrays["directions"],
        names=(names[0].decode(), names[1].decode()),
        low=(low[0], low[1]),
        high=(high[0], high[1]),
        points=arrays["points"],
        extras=above("extras", arrays),
    )
