"""Cross-entropy over many classes, whose derivatives are made in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MANY = 2**20  # entries of the logits that are at work at once; fewer are left to PyTorch


class InPieces(TorchFunctionMode):
    """Inside, cross-entropies of many logits keep nothing of the size of these for derivatives.

    PyTorch keeps the log-probabilities, and makes several tensors of their size for a second
    derivative. Cross-entropy is a weighted sum of ``log Σ_c exp(z_c)`` less what is linear in the
    logits z, and the derivatives of the former are in closed form, with p the softmax of z: p, and
    ``diag(p) - ppᵀ``.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.cross_entropy:
            return _cross_entropy(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    if logits.numel() <= MANY or logits.ndim < 2 or (size_average, reduce) != (None, None):
        return F.cross_entropy(
            *(logits, target, weight, size_average, ignore_index, reduce, reduction),
            label_smoothing=label_smoothing,
        )
    classes = logits.shape[1]
    weights = logits.new_ones(classes) if weight is None else weight
    normaliser = _LogSumExp.apply(logits)
    smooth = label_smoothing / classes
    if target.is_floating_point():
        target = (target * (1 - label_smoothing) + smooth).movedim(1, -1) * weights
        losses = target.sum(-1) * normaliser - (target * logits.movedim(1, -1)).sum(-1)
        total: Tensor | int = losses.numel()
    else:
        counts = target != ignore_index
        index = target.where(counts, 0).long()
        own = weights[index] * counts
        chosen = logits.gather(1, index[:, None]).squeeze(1)
        losses = (1 - label_smoothing) * own * (normaliser - chosen)
        if label_smoothing:
            spread = weights.sum() * normaliser - logits.movedim(1, -1) @ weights
            losses = losses + smooth * (counts * spread)
        total = own.sum()
    if reduction == "none":
        return losses
    return losses.sum() / total if reduction == "mean" else losses.sum()


class _LogSumExp(torch.autograd.Function):
    """Over the classes, the second dimension."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        found = logits.new_empty(logits.shape[:1] + logits.shape[2:])
        for z, out in _pieces(logits.movedim(1, -1), found):
            out.copy_(z.logsumexp(-1))
        ctx.save_for_backward(logits, found)
        return found

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        logits, found = ctx.saved_tensors
        return _Softmax.apply(logits, found.detach(), slope)  # all derivatives are of the former


class _Softmax(torch.autograd.Function):
    """Of the logits, times `slope`; the normaliser is a function of them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, normaliser: Tensor, slope: Tensor) -> Tensor:
        found = torch.empty_like(logits)
        for z, n, s, out in _pieces(
            *(logits.movedim(1, -1), normaliser, slope, found.movedim(1, -1))
        ):
            torch.mul((z - n[..., None]).exp_(), s[..., None], out=out)
        ctx.save_for_backward(logits, normaliser, slope)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor, None, Tensor]:
        logits, normaliser, slope = ctx.saved_tensors
        found, along = torch.empty_like(tangent), torch.empty_like(tangent[:, 0])
        for z, n, s, t, out, mean in _pieces(
            *(logits.movedim(1, -1), normaliser, slope, tangent.movedim(1, -1)),
            *(found.movedim(1, -1), along),
        ):
            p = (z - n[..., None]).exp_()
            mean.copy_((p * t).sum(-1))
            out.copy_(p.mul_(t - mean[..., None]).mul_(s[..., None]))
        return found, None, along


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same data, where the first tensor has `MANY` entries at most, or one datum."""
    first = tensors[0]
    if first.ndim > 2 and first[0].numel() > MANY:
        for parts in zip(*tensors, strict=True):
            yield from _pieces(*parts)
        return
    size = max(MANY // max(first[0].numel(), 1), 1)
    yield from zip(*(tensor.split(size) for tensor in tensors), strict=True)
