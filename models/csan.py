"""Convolutional self-attention network: a vision transformer whose attention sees a local window.

Every token attends to a `window` x `window` neighbourhood of image tokens and, in the
two-dimensional variant of Yang et al. (*Convolutional Self-Attention Networks*, NAACL 2019), to the
same neighbourhood in `head_window` neighbouring heads. Park and Kim (*How Do Vision Transformers
Work?*, ICLR 2022, Figure 7) use ``head_window=1`` on the 8 x 8 tokens of a CIFAR image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.description import require, require_integer
from models.isotropic import MAX_SIZE, Isotropic, Pooling, StochasticDepth

Border = Literal["clamp", "mask", "zero"]
MAX_SCORES = 2**27  # of all blocks for one image: half a gigabyte of masks


def window_start(position: int, length: int, window: int) -> int:
    """First index of the window around one of `length` positions, shifted inwards at the ends."""
    return min(max(position - window // 2, 0), max(length - window, 0))


def window_mask(grid: int, window: int, border: Border) -> Tensor:
    """Which keys a query sees.

    Returns a boolean (N, N) tensor, N = grid * grid tokens in row-major order, True where query i
    sees key j. With border "clamp" every row has exactly ``window ** 2`` keys; otherwise the window
    stays centred and is cut off at the border of the image. A window of `grid` or more is global.
    """
    positions = torch.arange(grid)
    if window >= grid:  # global attention: nothing lies beyond the border
        return torch.ones(grid**2, grid**2, dtype=torch.bool)
    start = positions[:, None] - window // 2
    if border == "clamp":
        start = start.clamp(0, grid - window)
    sees = (positions >= start) & (positions < start + window)  # along one axis
    return (sees[:, None, :, None] & sees[None, :, None, :]).reshape(grid**2, grid**2)


class WindowAttention(nn.Module):
    """Multi-head self-attention within a window of positions and of heads.

    The window is a mask over the dense N x N scores: on grids of some hundred tokens this is faster
    than gathering each query's neighbours, and softmax(q k^T) v in plain operations has
    derivatives of every order in every mode. The fused kernels, which do not, are for inference.

    Parameters
    ----------
    dim, heads : int
        Width of the tokens, and the number of heads that share it.
    grid : int
        Tokens along each side of the image.
    window, head_window : int
        Keys along each axis of the image, and heads whose keys are seen.
    border : {"clamp", "mask", "zero"}
        What a window that reaches beyond the image holds: it is shifted inwards, those keys do not
        exist, or they are zero keys and values that take part in the softmax.
    class_token : bool
        Whether a class token, which sees and is seen by every token, precedes the image tokens.

    Attributes
    ----------
    range : int
        `window`, or 2 `grid` - 1 where that is all of the image.
    """

    bias: Tensor | None  # ([heads,] N, head_window * N), 0 where a query sees a key, or -inf
    zero_keys: Tensor | None  # (N,), how many zero keys each query sees

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: int,
        window: int,
        head_window: int = 1,
        border: Border = "clamp",
        class_token: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.head_window, self.tokens = heads, head_window, grid**2 + class_token
        self.scale = (dim // heads) ** -0.5
        self.range = window if window < grid else 2 * grid - 1
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

        sees = window_mask(grid, window, border)
        padded = window**2 - sees.sum(1) if border == "zero" and window < grid else None
        if class_token:
            sees = F.pad(sees, (1, 0, 1, 0), value=True)
            padded = F.pad(padded, (1, 0)) if padded is not None else None
        bias = torch.zeros(sees.shape).masked_fill(~sees, -torch.inf).repeat(1, head_window)
        self.register_buffer("bias", None if window >= grid else bias, persistent=False)
        self.register_buffer(
            "zero_keys", None if padded is None else padded * head_window, persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend: (B, N, dim) -> (B, N, dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.head_window > 1:  # (B, heads, N, d) -> (B, heads, head_window * N, d)
            # Slices, as the derivative of an indexed tensor is not the same at every run on a GPU.
            starts = [window_start(i, self.heads, self.head_window) for i in range(self.heads)]
            k, v = (
                torch.stack([t[:, i : i + self.head_window].flatten(1, 2) for i in starts], 1)
                for t in (k, v)
            )
        if self.zero_keys is None and not torch.is_grad_enabled():
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
            return self.proj(out.transpose(1, 2).flatten(2))
        scores = q * self.scale @ k.transpose(-2, -1)
        if self.bias is not None:
            scores = scores + self.bias
        if self.zero_keys is None:
            out = scores.softmax(-1) @ v
        else:  # n zero keys (score 0) with zero values weigh as much as one with score log(n)
            extra = self.zero_keys.to(scores.dtype).log()[:, None].expand(*scores.shape[:-1], 1)
            out = torch.cat([scores, extra], -1).softmax(-1)[..., :-1] @ v
        return self.proj(out.transpose(1, 2).flatten(2))


def common_masks(attentions: Sequence[WindowAttention]) -> list[dict[str, Tensor]]:
    """Masks by which one module computes what each of several does that differ in their windows.

    With an item's buffers in the place of its own, the module of the largest head window does what
    that item's module does, to rounding: of the heads that it sees, some are masked.
    """
    heads, tokens = attentions[0].heads, attentions[0].tokens
    most = max(attention.head_window for attention in attentions)
    padded = any(attention.zero_keys is not None for attention in attentions)
    masks = []
    for own in attentions:
        bias = torch.full((heads, tokens, most, tokens), -torch.inf, device=own.proj.weight.device)
        for head in range(heads):
            start = window_start(head, heads, own.head_window) - window_start(head, heads, most)
            seen = 0 if own.bias is None else own.bias[:, None, :tokens]
            bias[head, :, start : start + own.head_window] = seen
        masks.append({"bias": bias.flatten(2)})
        if padded:
            none = bias.new_zeros(tokens)
            masks[-1]["zero_keys"] = none if own.zero_keys is None else own.zero_keys.to(none)
    return masks


class Block(nn.Module):
    """Pre-norm transformer block: window attention, then a two-layer perceptron."""

    def __init__(self, attention: WindowAttention, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.range = attention.range
        self.norm1 = nn.LayerNorm(dim)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop_path1 = StochasticDepth(drop)
        self.drop_path2 = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Transform: (B, N, dim) -> (B, N, dim)."""
        x = x + self.drop_path1(self.attention(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class CSAN(Isotropic):
    """Convolutional self-attention network: its blocks are those of a vision transformer.

    Parameters
    ----------
    dim, heads : int
        Width of the tokens, and number of attention heads, which divides it.
    window : int
        Tokens along each side of the window a token attends to; the token grid or more is global.
    head_window : int
        Heads a query sees: 1 is 1D-CSAN, more is 2D-CSAN. Shifted inwards at the first and last.
    border : {"clamp", "mask", "zero"}
        Treatment of windows that reach beyond the image, see `WindowAttention`.
    pooling : {"gap", "cls"}
        Average over the image tokens, or a class token.
    **skeleton
        Further options of `Isotropic`.

    Raises
    ------
    InputError
        If an option is out of range.
    """

    data_dependent = True

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: int,
        head_window: int = 1,
        border: Border = "clamp",
        pooling: Pooling = "gap",
        **skeleton: Any,
    ) -> None:
        require_integer("dim", dim, 1, MAX_SIZE)
        require_integer("heads", heads, 1, MAX_SIZE)
        require_integer("window", window, 1, MAX_SIZE)
        require(dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        require(
            type(head_window) is int and 1 <= head_window <= heads,
            "head_window",
            head_window,
            f"from 1 to heads = {heads}",
        )
        require(border in get_args(Border), "border", border, f"one of {get_args(Border)}")

        def block(grid: int, hidden: int, drop: float) -> Block:
            depth, tokens = skeleton["depth"], grid**2 + (pooling == "cls")
            require(
                depth * head_window * tokens**2 <= MAX_SCORES,
                "image_size",
                skeleton["image_size"],
                f"at most {MAX_SCORES} attention scores, found "
                f"{depth} x {head_window} x {tokens}^2",
            )
            attention = WindowAttention(
                dim, heads, grid, window, head_window, border, pooling == "cls"
            )
            return Block(attention, dim, hidden, drop)

        super().__init__(block, 4 * dim**2, pooling, dim=dim, **skeleton)
