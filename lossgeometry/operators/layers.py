"""The parts of a model: an operator for each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args

from torch import nn

from lossgeometry.batches import Data, as_batches
from lossgeometry.errors import InputError
from lossgeometry.objective import LossFunction
from lossgeometry.operators.base import CurvatureOperator
from lossgeometry.parameters import select_parameters

By = Literal["layer", "module", "block"]


def per_layer(
    operator: type[CurvatureOperator],
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Data,
    *,
    by: By = "layer",
    **options: Any,
) -> Iterator[tuple[str, CurvatureOperator]]:
    """One operator for each part of a model, the diagonal blocks of that of the whole.

    Parameters
    ----------
    operator
        `Hessian`, `GGN` or `Fisher`.
    model, loss_fn, data
        As of `operator`.
    by
        What a part is. For a parameter ``blocks.3.attn.qkv.weight``: "layer" is
        ``blocks.3.attn.qkv``, "module" is ``blocks.3.attn`` and "block" is ``blocks.3``.
    **options
        As of `operator`, without `params`.

    Yields
    ------
    tuple of str and CurvatureOperator
        The name of the part and its operator, in the order of the model. One is made when asked
        for: drop it before asking for the next, and the memory of one is all that is needed.

    Raises
    ------
    InputError
        `by` is none of the three, or `params` is given.

    See Also
    --------
    plots.plot_layers : the eigenvalues of all parts as one picture.
    Hessian : the whole; its `params` chooses any other part.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> from lossgeometry import Hessian, per_layer
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    >>> data = torch.randn(5, 3), torch.randn(5, 1)
    >>> {name: H.shape for name, H in per_layer(Hessian, model, mse_loss, data)}
    {'0': (8, 8), '2': (3, 3)}
    """
    if by not in get_args(By):
        raise InputError(f"by: {by!r}, expected one of {', '.join(get_args(By))}")
    if "params" in options:
        raise InputError("params: expected none, as each part has its own")
    batches = as_batches(data, count=options.get("count"))
    names = list(select_parameters(model))
    for part in dict.fromkeys(_part(name, by) for name in names):
        inside = [re.escape(name) for name in names if _part(name, by) == part]
        pattern = f"^({'|'.join(inside)})$"
        yield part, operator(model, loss_fn, batches, params=pattern, **options)


def _part(name: str, by: str) -> str:
    *path, _ = name.split(".")
    if not path:
        return name  # a parameter of the model itself
    if by == "layer":
        return ".".join(path)
    block = next((i for i, piece in enumerate(path) if piece.isdigit()), 0) + 1
    return ".".join(path[: block + (by == "module")])
