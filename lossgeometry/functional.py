"""A model as a function of its parameters and buffers, and a function of parameters as a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def functional_call(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *args: Any,
    via: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Any:
    """``model(*args, **kwargs)`` with `tensors` for what ``named_parameters`` and buffers name.

    Like `torch.func.functional_call`, which leaves the model changed if a module is registered
    under two names (PyTorch 2.14: its tensors are swapped in twice and put back in the same order).
    Every tensor of the model must be given. With `via`, it is ``via(model, *args, **kwargs)``.
    """
    listed = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    called = model if via is None else _Via(model, via)
    places = {
        f"{prefix}.{key}" if prefix else key: tensors[listed[id(t)]]
        for prefix, module in called.named_modules()  # each module once
        for key, t in (*module._parameters.items(), *module._buffers.items())
        if t is not None
    }
    return torch.func.functional_call(called, places, args, kwargs, tie_weights=False)


class _Via(nn.Module):
    """A model that is called by a function of it."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.model, *args, **kwargs)


class FunctionModule(nn.Module):
    """``function(parameters, *inputs)``, anything differentiable, as a model.

    Parameters
    ----------
    function
        Of a dict of tensors and of the inputs of a batch, if there are any.
    parameters
        ``{name: tensor}``; they share memory with the parameters of the model.

    See Also
    --------
    Hessian : of the function, if ``loss_fn`` is None.

    Examples
    --------
    >>> import torch
    >>> from lossgeometry import FunctionModule, Hessian
    >>> start = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    >>> model = FunctionModule(lambda p: p["a"] ** 2 * p["b"], start)
    >>> H = Hessian(model, None, ((), None))  # no inputs, no targets: the output is the loss
    >>> H @ torch.eye(2)
    tensor([[4., 2.],
            [2., 0.]])
    """

    def __init__(self, function: Callable[..., Any], parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        self._places = {name: name.replace(".", "/") for name in parameters}
        for name, tensor in parameters.items():
            self.register_parameter(self._places[name], nn.Parameter(tensor.detach()))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The function at the present parameters."""
        tensors = {name: getattr(self, place) for name, place in self._places.items()}
        return self.function(tensors, *inputs, **named)
