"""Networks without weights, to be counted and compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FILLING = {
    getattr(torch.Tensor, f"{name}_")
    for name in ("uniform", "normal", "erfinv", "clamp", "mul", "add", "fill", "zero")
}


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Networks that are built take no memory: they are on the meta device."""
    with torch.device("meta"), _NothingFilled():
        yield


class _NothingFilled(TorchFunctionMode):
    """What fills a tensor on the meta device, where that takes longest of all, is left out."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if function in FILLING and arguments[0].is_meta:
            return arguments[0]
        return function(*arguments, **(options or {}))
