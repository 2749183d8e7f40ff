"""RepLKNet: a large depthwise kernel with a small one beside it.

Ding et al., *Scaling Up Your Kernels to 31x31*, CVPR 2022, arXiv 2203.06717, on the skeleton of
`models.isotropic`.

As published: a block of BatchNorm, 1 x 1, ReLU, two parallel depthwise convolutions, ReLU, 1 x 1;
then a ConvFFN of BatchNorm, 1 x 1, GELU, 1 x 1; both residual, with a BatchNorm after every
convolution, and no biases beside those. Changed to fit the skeleton: there is a position
embedding, and a LayerNorm at the end; the kernels are of any odd size from 3 (31 in the paper, with
5 beside it), the ConvFFN as wide as it is told (4 times the tokens in the paper).

BatchNorm normalises over the tokens of all images of a mini-batch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from models.depthwise import DepthwiseConvolution, folded
from models.description import require_integer
from models.isotropic import Isotropic, StochasticDepth, TokenBatchNorm

SMALL_KERNEL = 5


class LargeKernel(nn.Module):
    """A large depthwise convolution and a small one, each with its BatchNorm, summed.

    The small kernel is the 5 x 5 of the paper; beside a kernel that is no larger, the next smaller
    odd one.
    """

    def __init__(self, dim: int, grid: int, kernel_size: int) -> None:
        super().__init__()
        require_integer("kernel_size", kernel_size, 3, 2**10)
        small = min(SMALL_KERNEL, kernel_size - 2)
        self.large = DepthwiseConvolution(dim, grid, kernel_size, bias=False)
        self.large_norm = TokenBatchNorm(dim)
        self.small = DepthwiseConvolution(dim, grid, small, bias=False)
        self.small_norm = TokenBatchNorm(dim)
        self.range = self.large.range

    def forward(self, x: Tensor) -> Tensor:
        """Mix: (B, N, dim) -> (B, N, dim)."""
        return self.large_norm(self.large(x)) + self.small_norm(self.small(x))

    @torch.no_grad()
    def folded(self) -> DepthwiseConvolution:
        """One convolution that does the same, with the running statistics of the BatchNorms."""
        dim, _, kernel_size, _ = self.large.weight.shape
        one = DepthwiseConvolution(dim, self.large.grid, kernel_size).to(self.large.weight)
        kernels, biases = [], []
        pairs = ((self.large, self.large_norm), (self.small, self.small_norm))
        for convolution, norm in pairs:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            kernels.append(convolution.weight * scale[:, None, None, None])
            biases.append(norm.bias - norm.running_mean * scale)
        one.weight.copy_(folded(kernels))
        assert one.bias is not None
        one.bias.copy_(torch.stack(biases).sum(0))
        return one


class Block(nn.Module):
    """A large kernel between two 1 x 1 convolutions, then a ConvFFN."""

    def __init__(self, mixer: nn.Module, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.range = mixer.range
        self.norm1 = TokenBatchNorm(dim)
        self.inwards = nn.Sequential(
            nn.Linear(dim, dim, bias=False), TokenBatchNorm(dim), nn.ReLU()
        )
        self.mixer = mixer
        self.outwards = nn.Sequential(
            nn.ReLU(), nn.Linear(dim, dim, bias=False), TokenBatchNorm(dim)
        )
        self.norm2 = TokenBatchNorm(dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, hidden, bias=False),
            TokenBatchNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, dim, bias=False),
            TokenBatchNorm(dim),
        )
        self.drop_path1 = StochasticDepth(drop)
        self.drop_path2 = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Transform: (B, N, dim) -> (B, N, dim)."""
        x = x + self.drop_path1(self.outwards(self.mixer(self.inwards(self.norm1(x)))))
        return x + self.drop_path2(self.ffn(self.norm2(x)))


class RepLKNet(Isotropic):
    """RepLKNet on one grid of tokens.

    Parameters
    ----------
    dim : int
        Width of the tokens.
    kernel_size : int
        Tokens along each side of the large depthwise kernel, odd, at least 3.
    **skeleton
        Further options of `Isotropic`.

    Raises
    ------
    InputError
        If an option is out of range.
    """

    data_dependent = False

    def __init__(self, *, dim: int, kernel_size: int, **skeleton: Any) -> None:
        def block(grid: int, hidden: int, drop: float) -> Block:
            return Block(LargeKernel(dim, grid, kernel_size), dim, hidden, drop)

        super().__init__(block, 2 * dim**2 + kernel_size**2 * dim, dim=dim, **skeleton)


def fold(model: RepLKNet) -> RepLKNet:
    """Fold the small kernels of a network into the large ones.

    That is the same function, of fewer weights, in evaluation mode; to be trained, a network needs
    its branches.

    Returns
    -------
    RepLKNet
        A copy; `model` is as it was.
    """
    copied = copy.deepcopy(model)
    for block in copied.blocks:
        assert isinstance(block.mixer, LargeKernel), "it is folded already"
        block.mixer = block.mixer.folded()
    return copied.eval()
