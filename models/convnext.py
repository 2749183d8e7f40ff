"""ConvNeXt: tokens are mixed by a depthwise convolution (Liu et al., *A ConvNet for the 2020s*).

CVPR 2022, arXiv 2201.03545; its isotropic variant, of Table 2, on the skeleton of
`models.isotropic`.

As published: one residual branch of depthwise convolution, LayerNorm, 1 x 1, GELU, 1 x 1 and a
layer scale of 1e-6, skipped by stochastic depth. Changed to fit the skeleton: there is a position
embedding, the kernel is of any odd size (7 in the paper), the perceptron as wide as it is told (4
times the tokens in the paper), and weights begin as the skeleton's do, not at a standard deviation
of 0.02.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.depthwise import DepthwiseConvolution
from models.isotropic import Isotropic, StochasticDepth

LAYER_SCALE = 1e-6


class Block(nn.Module):
    """Depthwise convolution, LayerNorm and an inverted bottleneck, on one residual branch."""

    def __init__(self, mixer: DepthwiseConvolution, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.range = mixer.range
        self.mixer = mixer
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.layer_scale = nn.Parameter(torch.full((dim,), LAYER_SCALE))
        self.drop_path = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Transform: (B, N, dim) -> (B, N, dim)."""
        return x + self.drop_path(self.layer_scale * self.mlp(self.norm(self.mixer(x))))


class ConvNeXt(Isotropic):
    """Isotropic ConvNeXt.

    Parameters
    ----------
    dim : int
        Width of the tokens.
    kernel_size : int
        Tokens along each side of the depthwise kernel, odd.
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
            return Block(DepthwiseConvolution(dim, grid, kernel_size), dim, hidden, drop)

        super().__init__(block, kernel_size**2 * dim, dim=dim, **skeleton)
