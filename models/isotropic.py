"""The skeleton that all networks of one grid of tokens share, whatever mixes the tokens.

Patch embedding, position embedding, blocks, pooling, norm, head: `models.csan`, `models.convnext`,
`models.replknet` and `models.van` give it their blocks. Between two of them the training sees the
same tokens at the same width and depth, and what differs is in one file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.description import require, require_integer, require_number

Pooling = Literal["gap", "cls"]
MAX_SIZE = 2**20  # of the other options
MAX_DEPTH = 256
MAX_DROP = 0.999
MAX_TOKENS = 2**16
MAX_WEIGHTS = 2**28  # a gigabyte, as much as a ViT-L


class StochasticDepth(nn.Module):
    """Leave out a residual branch with probability `p`, drawn for each image (Huang et al., 2016).

    The branches that stay are scaled by 1 / (1 - p). In evaluation mode nothing is left out. The
    random numbers are those of torchvision's module of this name on a CPU, on every device.
    """

    kept: Tensor | None  # (B,), 1 where the branch stays and 0 elsewhere; None: drawn at every call

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("kept", None, persistent=False)

    def draw(self, images: int) -> Tensor:
        """Choose for so many images: (images,) on the CPU, 1 where the branch stays, else 0."""
        # In one dtype, or float64 would have other numbers, and not in place, for torch.vmap.
        return torch.bernoulli(torch.ones(images, dtype=torch.float32), 1 - self.p)

    def forward(self, x: Tensor) -> Tensor:
        """Mask: (B, ...) -> (B, ...)."""
        if not self.training or self.p == 0:
            return x
        kept = self.draw(len(x)) if self.kept is None else self.kept
        return x * (kept.to(x) / (1 - self.p)).view(-1, *[1] * (x.ndim - 1))


def random_branches(model: nn.Module) -> dict[str, StochasticDepth]:
    """What a forward pass in training mode draws, in this order, by the name of its buffer.

    With the drawn numbers as those buffers (`torch.func.functional_call`), nothing is random.
    """
    return {
        f"{name}.kept": module
        for name, module in model.named_modules()
        if isinstance(module, StochasticDepth) and module.p > 0
    }


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


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm of tokens (B, N, dim): a mean and a variance for each channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise: (B, N, dim) -> (B, N, dim)."""
        return super().forward(x.flatten(0, 1)).view_as(x)


class Isotropic(nn.Module):
    """A network whose blocks all work on one grid of tokens, for image classification.

    Patch embedding by a strided convolution, learned absolute position embedding, `depth` blocks,
    pooling, LayerNorm, Linear.

    Parameters
    ----------
    block : callable
        ``(grid, hidden, drop) -> nn.Module``, a block for `grid` tokens along each side of the
        image, with so wide a perceptron and so large a probability of skipping its residual
        branches. It maps tokens (B, N, dim) to the same shape, and states its `range`.
    mixer_weights : int
        Of a block beside its perceptron, about.
    pooling : {"gap", "cls"}
        Average over the image tokens, or a class token before them, which all blocks then see.
    image_size, channels, classes : int
        Pixels along each side of the image, its channels, and the number of classes.
    patch_size : int
        Pixels along each side of a token; divides `image_size`.
    dim, depth : int
        Width of the tokens, and number of blocks.
    mlp_ratio : float
        Hidden width of the perceptrons as a multiple of `dim`.
    stochastic_depth : float
        Probability of skipping a residual branch in the last block; it rises linearly from 0.
    position_std : float
        Standard deviation of the position embedding before training. By default it is as large as
        the patch embedding's output: a global window has no other sense of place, and with the
        usual 0.02, which Park and Kim have, it spends its first epochs looking for it.

    Attributes
    ----------
    data_dependent : bool
        Whether the weights by which tokens are mixed depend on the tokens.

    Raises
    ------
    InputError
        If an option is out of range.
    """

    data_dependent: ClassVar[bool]

    def __init__(
        self,
        block: Callable[[int, int, float], nn.Module],
        mixer_weights: int,
        pooling: Pooling = "gap",
        /,
        *,
        image_size: int,
        channels: int,
        classes: int,
        patch_size: int,
        dim: int,
        depth: int,
        mlp_ratio: float = 4.0,
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
        }.items():
            require_integer(name, value, 1, MAX_DEPTH if name == "depth" else MAX_SIZE)
        require(
            image_size % patch_size == 0, "patch_size", patch_size, f"a divisor of {image_size}"
        )
        require(pooling in get_args(Pooling), "pooling", pooling, f"one of {get_args(Pooling)}")
        require_number("mlp_ratio", mlp_ratio, 1 / dim, MAX_SIZE / dim)
        require_number("stochastic_depth", stochastic_depth, 0, MAX_DROP)
        require_number("position_std", position_std, 0, MAX_SIZE)
        self.grid = image_size // patch_size
        tokens = self.grid**2 + (pooling == "cls")
        require(tokens <= MAX_TOKENS, "image_size", image_size, f"at most {MAX_TOKENS} tokens")
        hidden = round(dim * mlp_ratio)
        weights = depth * (mixer_weights + 2 * dim * hidden)
        weights += dim * (channels * patch_size**2 + tokens + classes)
        most = min(most_weights, MAX_WEIGHTS)
        require(weights <= most, "dim", dim, f"at most {most} weights, not {weights}")

        self.patch_embedding = PatchEmbedding(channels, dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim)) if pooling == "cls" else None
        self.position_embedding = nn.Parameter(torch.randn(1, tokens, dim) * position_std)
        drops = (stochastic_depth * i / max(depth - 1, 1) for i in range(depth))
        self.blocks = nn.Sequential(*(block(self.grid, hidden, drop) for drop in drops))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        self.apply(_initialise)

    @property
    def range(self) -> int:
        """Tokens along each side of the square, around a token, that its mixer sees.

        On a grid of g x g tokens 2 g - 1 is global: every token is reached from every token.
        """
        return min(int(self.blocks[0].range), 2 * self.grid - 1)  # type: ignore[arg-type]

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
