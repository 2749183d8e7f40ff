"""Convolutional self-attention network: a vision transformer whose attention sees a local window.

Every token attends to a `window` x `window` neighbourhood of image tokens and, in the
two-dimensional variant of Yang et al. (*Convolutional Self-Attention Networks*, NAACL 2019), to the
same neighbourhood in `head_window` neighbouring heads. Park and Kim (*How Do Vision Transformers
Work?*, ICLR 2022, Figure 7) use ``head_window=1`` on the 8 x 8 tokens of a CIFAR image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.description import require, require_integer, require_number

Border = Literal["clamp", "mask", "zero"]
Pooling = Literal["gap", "cls"]
MAX_SIZE = 2**20  # of the other options
MAX_DEPTH = 256
MAX_DROP = 0.999
MAX_WEIGHTS = 2**28  # a gigabyte, as much as a ViT-L
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


class StochasticDepth(nn.Module):
    """Leave out a residual branch with probability `p`, drawn for each image (Huang et al., 2016).

    The branches that stay are scaled by 1 / (1 - p). In evaluation mode nothing is left out. The
    random numbers are those of torchvision's module of this name.
    """

    kept: Tensor | None  # (B,), 1 where the branch stays and 0 elsewhere; None: drawn at every call

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("kept", None, persistent=False)

    def draw(self, images: int, device: torch.device) -> Tensor:
        """Choose for so many images: (images,), 1 where the branch stays and 0 elsewhere."""
        # In one dtype, or a GPU would draw others in float64, and not in place, for torch.vmap.
        return torch.bernoulli(torch.ones(images, dtype=torch.float32, device=device), 1 - self.p)

    def forward(self, x: Tensor) -> Tensor:
        """Mask: (B, ...) -> (B, ...)."""
        if not self.training or self.p == 0:
            return x
        kept = self.draw(len(x), x.device) if self.kept is None else self.kept
        return x * (kept.to(x.dtype) / (1 - self.p)).view(-1, *[1] * (x.ndim - 1))


def random_branches(model: nn.Module) -> dict[str, StochasticDepth]:
    """What a forward pass in training mode draws, in this order, by the name of its buffer.

    With the drawn numbers as those buffers (`torch.func.functional_call`), nothing is random.
    """
    return {
        f"{name}.kept": module
        for name, module in model.named_modules()
        if isinstance(module, StochasticDepth) and module.p > 0
    }


class Block(nn.Module):
    """Pre-norm transformer block: window attention, then a two-layer perceptron."""

    def __init__(self, attention: WindowAttention, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
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


class PatchEmbedding(nn.Conv2d):
    """A convolution of patches that do not overlap, as a product of matrices.

    That is faster on a CPU, and under `torch.vmap` over the weights on a GPU, too, where it would
    be a convolution in groups.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Embed: (B, channels, height, width) -> (B, N, dim), tokens in row-major order."""
        height, width = self.kernel_size
        patches = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class CSAN(nn.Module):
    """Convolutional self-attention network for image classification.

    Patch embedding by a strided convolution, learned absolute position embedding, `depth` pre-norm
    blocks, pooling, LayerNorm, Linear.

    Parameters
    ----------
    image_size, channels, classes : int
        Pixels along each side of the image, its channels, and the number of classes.
    patch_size : int
        Pixels along each side of a token; divides `image_size`.
    dim, depth, heads : int
        Width of the tokens, number of blocks, number of attention heads; `heads` divides `dim`.
    mlp_ratio : float
        Hidden width of the perceptrons as a multiple of `dim`.
    window : int
        Tokens along each side of the window a token attends to; the token grid or more is global.
    head_window : int
        Heads a query sees: 1 is 1D-CSAN, more is 2D-CSAN. Shifted inwards at the first and last.
    border : {"clamp", "mask", "zero"}
        Treatment of windows that reach beyond the image, see `WindowAttention`.
    pooling : {"gap", "cls"}
        Average over the image tokens, or a class token.
    stochastic_depth : float
        Probability of skipping a residual branch in the last block; it rises linearly from 0.
    position_std : float
        Standard deviation of the position embedding before training. By default it is as large as
        the patch embedding's output: a global window has no other sense of place, and with the
        usual 0.02, which Park and Kim have, it spends its first epochs looking for it.

    Raises
    ------
    InputError
        If an option is out of range.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        classes: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        window: int,
        head_window: int = 1,
        border: Border = "clamp",
        pooling: Pooling = "gap",
        stochastic_depth: float = 0.0,
        position_std: float = 0.5,
        most_weights: int = MAX_WEIGHTS,
    ) -> None:
        super().__init__()
        for name, value in {
            "image_size": image_size,
            "channels": channels,
            "classes": classes,
            "patch_size": patch_size,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "window": window,
        }.items():
            require_integer(name, value, 1, MAX_DEPTH if name == "depth" else MAX_SIZE)
        require(
            image_size % patch_size == 0, "patch_size", patch_size, f"a divisor of {image_size}"
        )
        require(dim % heads == 0, "heads", heads, f"a divisor of dim = {dim}")
        require(
            type(head_window) is int and 1 <= head_window <= heads,
            "head_window",
            head_window,
            f"from 1 to heads = {heads}",
        )
        require(border in get_args(Border), "border", border, f"one of {get_args(Border)}")
        require(pooling in get_args(Pooling), "pooling", pooling, f"one of {get_args(Pooling)}")
        require_number("mlp_ratio", mlp_ratio, 1 / dim, MAX_SIZE / dim)
        require_number("stochastic_depth", stochastic_depth, 0, MAX_DROP)
        require_number("position_std", position_std, 0, MAX_SIZE)
        tokens = (image_size // patch_size) ** 2 + (pooling == "cls")
        hidden = int(dim * mlp_ratio)
        weights = depth * dim * (4 * dim + 2 * hidden) + dim * (channels * patch_size**2 + classes)
        most = min(most_weights, MAX_WEIGHTS)
        require(weights <= most, "dim", dim, f"at most {most} weights, not {weights}")
        require(
            depth * head_window * tokens**2 <= MAX_SCORES,
            "image_size",
            image_size,
            f"at most {MAX_SCORES} attention scores, found {depth} x {head_window} x {tokens}^2",
        )

        grid = image_size // patch_size
        self.patch_embedding = PatchEmbedding(channels, dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim)) if pooling == "cls" else None
        self.position_embedding = nn.Parameter(torch.randn(1, tokens, dim) * position_std)
        self.blocks = nn.Sequential(
            *(
                Block(
                    WindowAttention(
                        dim, heads, grid, window, head_window, border, pooling == "cls"
                    ),
                    dim,
                    hidden,
                    stochastic_depth * i / max(depth - 1, 1),
                )
                for i in range(depth)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits: (B, channels, image_size, image_size) -> (B, classes)."""
        x = self.patch_embedding(images)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        x = self.blocks(x + self.position_embedding)
        x = x.mean(1) if self.class_token is None else x[:, 0]
        return self.head(self.norm(x))


def _initialise(module: nn.Module) -> None:
    """Glorot's uniform weights and zero biases, as in the original vision transformer."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
