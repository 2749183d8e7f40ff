"""A model as a function of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def functional_call(model: nn.Module, tensors: Mapping[str, Tensor], *args: Any) -> Any:
    """``model(*args)`` with `tensors`, by the names of ``named_parameters`` and ``named_buffers``.

    Like `torch.func.functional_call`, which leaves the model changed if a module is registered
    under two names (PyTorch 2.14: its tensors are swapped in twice and put back in the same order).
    Every tensor of the model must be given.
    """
    listed = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    places = {
        f"{prefix}.{key}" if prefix else key: tensors[listed[id(t)]]
        for prefix, module in model.named_modules()  # each module once
        for key, t in (*module._parameters.items(), *module._buffers.items())
        if t is not None
    }
    return torch.func.functional_call(model, places, args, tie_weights=False)
