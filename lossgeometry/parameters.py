"""The trainable parameters of a model as named tensors and as one flat vector."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lossgeometry.errors import InputError


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` or (Distributed)DataParallel was given."""
    wrapped: object = model
    while isinstance(wrapped, nn.Module):
        model = wrapped
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        wrapped = model.module if parallel else getattr(model, "_orig_mod", None)
    return model


def select_parameters(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Parameter]:
    """Parameters that require gradients and whose name `pattern` is found in (None: all).

    Those that do not are constants, of which ``requires_grad_()`` makes variables. Shared
    parameters appear once, under their first name. Raises `InputError` if there is none, or one of
    them has no values or no derivatives.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model: a {type(model).__name__}, expected a torch.nn.Module; FunctionModule makes "
            "one of a function of parameters"
        )
    if isinstance(unwrapped(model), torch.jit.ScriptModule):
        raise InputError("model: made by TorchScript, expected the module that it was made of")
    parameters = dict(unwrapped(model).named_parameters())
    for name, parameter in parameters.items():
        if is_lazy(parameter) or parameter.is_meta:
            raise InputError(
                f"model: parameter {name} has no values yet, expected some: lazy layers have them "
                "once the model was called"
            )
    selected = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.requires_grad and (pattern is None or re.search(pattern, name))
    }
    if not parameters:
        raise InputError("model: it has no parameters")
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise InputError(
            "model: no parameter requires a gradient, expected some: model.requires_grad_() makes "
            "variables of all"
        )
    if not selected:
        raise InputError(
            f"params: no parameter name contains {pattern!r}; there are {', '.join(parameters)}"
        )
    for name, parameter in selected.items():
        if parameter.is_complex():
            raise InputError(
                f"model: parameter {name} is complex, expected real ones (torch.view_as_real)"
            )
        if parameter.is_inference():
            raise InputError(
                f"model: parameter {name} was made in torch.inference_mode, expected a model made "
                "outside"
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
