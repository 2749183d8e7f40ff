"""Models computed as they are written, by functions that have a second derivative."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import checkpoint

from lossgeometry.errors import InputError


@contextlib.contextmanager
def computing_plainly(compiled: bool = False) -> Iterator[None]:
    """Inside, models are computed as they are written.

    What `torch.utils.checkpoint` would compute anew in the backward pass, where other parameters
    are in place, is kept. TransformerEncoder has no way of its own to evaluate, which is another
    function where there is padding. Functions whose second derivative PyTorch lacks, or has wrong,
    are replaced by the same ones in pieces. And what `torch.compile` has made, which cannot be
    differentiated twice, is run without, if there is any.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_replaced)
            if compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def require_derivatives() -> None:
    """Raise `InputError` inside of `torch.inference_mode`, where all derivatives are zeros."""
    if torch.is_inference_mode_enabled():
        raise InputError("torch.inference_mode: nothing has a derivative in it, expected no_grad")


class _Replaced:
    """Inside, in whatever thread, other functions have the places of PyTorch's."""

    def __init__(self, places: list[tuple[Any, str, Any]]) -> None:
        self._places = [place for place in places if hasattr(*place[:2])]
        self._originals = [getattr(owner, name) for owner, name, _ in self._places]
        self._inside = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                for owner, name, function in self._places:
                    setattr(owner, name, function)

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for (owner, name, _), original in zip(self._places, self._originals, strict=True):
                    setattr(owner, name, original)


class _PlainCheckpoint:
    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _plain_checkpoint(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    result = F.relu6(input + 3) / 6
    return input.copy_(result) if inplace else result


def _hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    factor = input.clone() if inplace else input
    result = factor * F.relu6(factor + 3) / 6
    return input.copy_(result) if inplace else result


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """In evaluation mode in pieces: PyTorch's gradient of one image may be wrong (2.14).

    Laid out as PyTorch does: the numbers that dropout draws depend on that.
    """
    if training or running_mean is None or running_var is None:
        return _BATCH_NORM(input, running_mean, running_var, weight, bias, training, momentum, eps)
    shape = (1, -1, *[1] * (input.ndim - 2))
    precise = torch.promote_types(running_var.dtype, torch.float32)
    scale = torch.rsqrt(running_var.to(precise) + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    return (input * scale.view(shape) + shift.view(shape)).to(input.dtype).contiguous()


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """In functions whose gradient is right, as PyTorch's of one image is not.

    In single precision at least: group_norm's second derivative of a half one is rounded more.
    """
    if use_input_stats:
        precise = torch.promote_types(input.dtype, torch.float32)
        weight, bias = (t if t is None else t.to(precise) for t in (weight, bias))
        x = input.to(precise).contiguous()
        return F.group_norm(x, x.shape[1], weight, bias, eps).to(input.dtype)
    return _batch_norm(input, running_mean, running_var, weight, bias, eps=eps)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Without what makes its gradients sparse, or other than derivatives."""
    if max_norm is not None:
        raise InputError(
            f"model: an embedding of max_norm={max_norm} changes its weights as it is used, "
            "expected max_norm=None"
        )
    return _EMBEDDING(input, weight, padding_idx)


_EMBEDDING, _BATCH_NORM = F.embedding, F.batch_norm


def _once_differentiable(*_: Any) -> NoReturn:
    raise InputError(
        "model: it has an autograd function that is once_differentiable, expected one that can be "
        "differentiated twice"
    )


_replaced = _Replaced(
    [
        (checkpoint, "CheckpointFunction", _PlainCheckpoint),
        *(  # by the names that versions of PyTorch have for it
            (checkpoint, name, _plain_checkpoint)
            for name in vars(checkpoint)
            if name.startswith("_checkpoint_without_reentrant_generator")
        ),
        (F, "hardsigmoid", _hardsigmoid),
        (F, "hardswish", _hardswish),
        (F, "embedding", _embedding),
        (F, "batch_norm", _batch_norm),
        (F, "instance_norm", _instance_norm),
        (torch, "_weight_norm", _weight_norm),
        (sys.modules["torch.nn.utils.weight_norm"], "_weight_norm", _weight_norm),
        # What would be an error of the next backward pass, unless that passes it by.
        (torch._C._functions, "DelayedError", _once_differentiable),
    ]
)
