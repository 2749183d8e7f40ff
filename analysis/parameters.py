"""The trainable parameters of a model as named tensors and as one flat vector."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from models.errors import InputError


def select_parameters(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Parameter]:
    """Parameters of `model` whose name the regular expression `pattern` is found in (None: all).

    Shared parameters appear once, under their first name. Raises `InputError` if there is none.
    """
    parameters = dict(model.named_parameters())
    selected = {
        name: parameter
        for name, parameter in parameters.items()
        if pattern is None or re.search(pattern, name)
    }
    if not selected:
        raise InputError(
            f"params: no parameter name contains {pattern!r}; there are {', '.join(parameters)}"
            if parameters
            else "model: it has no parameters"
        )
    return selected


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """One (P,) vector of all entries, in order."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut a (P,) vector into views with the names and shapes of `like`; inverse of `flatten`."""
    pieces = vector.split([tensor.numel() for tensor in like.values()])
    return {
        name: piece.view(tensor.shape)
        for piece, (name, tensor) in zip(pieces, like.items(), strict=True)
    }


def unflatten_rows(rows: Tensor, like: Mapping[str, Tensor]) -> list[Tensor]:
    """Cut the rows of a matrix (n, P) into tensors (n, ...) of the shapes of `like`."""
    pieces = rows.split([tensor.numel() for tensor in like.values()], dim=1)
    return [
        piece.reshape(len(rows), *tensor.shape)
        for piece, tensor in zip(pieces, like.values(), strict=True)
    ]
