"""VAN: tokens are mixed by a convolution that gates them (Guo et al., *Visual Attention Network*).

2022, arXiv 2202.09741, on the skeleton of `models.isotropic`.

As published: BatchNorm, 1 x 1, GELU, large kernel attention, 1 x 1, with a shortcut around the last
four, on a residual branch with a layer scale of 1e-2; then BatchNorm and a perceptron, likewise.
Large kernel attention is a convolution, decomposed into a depthwise one, a dilated depthwise one
and a 1 x 1, whose result is multiplied with its input, elementwise: what a token gets depends on
the data. Changed to fit the skeleton: there is a position embedding, and a LayerNorm at the end;
the kernel is of any size (21 with dilation 3 in the paper); the perceptron has no 3 x 3 depthwise
convolution in its midst, as the range is to be the mixer's alone, and is as wide as it is told; and
weights begin as the skeleton's do, not at a standard deviation of 0.02.

`GatedConvNet` has a plain k x k kernel where VAN has the first two parts of its decomposition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.depthwise import DepthwiseConvolution
from models.description import require, require_integer
from models.isotropic import MAX_SIZE, Isotropic, StochasticDepth, TokenBatchNorm

LAYER_SCALE = 1e-2


class Gate(nn.Module):
    """Depthwise convolutions and a 1 x 1, whose result is multiplied with what went in."""

    def __init__(self, dim: int, *depthwise: DepthwiseConvolution) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(*depthwise)
        self.pointwise = nn.Linear(dim, dim)
        self.range = 1 + sum(convolution.range - 1 for convolution in depthwise)

    def forward(self, x: Tensor) -> Tensor:
        """Mix: (B, N, dim) -> (B, N, dim)."""
        return x * self.pointwise(self.depthwise(x))


def large_kernel_attention(dim: int, grid: int, kernel_size: int, dilation: int) -> Gate:
    """A gate by a K x K kernel with dilation d, decomposed as in VAN's Equation 3 and Figure 3.

    A depthwise convolution of 2 d - 1, one of ceil(K / d) with dilation d, and a 1 x 1. Together
    they see d ceil(K / d) + d - 1 tokens along each side: the 21 x 21 of the paper sees 23 x 23.
    """
    require_integer("dilation", dilation, 1, MAX_SIZE)
    dilated = -(-kernel_size // dilation)
    require(
        dilated % 2 == 1 or dilation % 2 == 0,
        "kernel_size",
        kernel_size,
        f"one whose part of {dilated} x {dilated} with dilation {dilation} has a centre",
    )
    return Gate(
        dim,
        DepthwiseConvolution(dim, grid, 2 * dilation - 1),
        DepthwiseConvolution(dim, grid, dilated, dilation=dilation),
    )


class Block(nn.Module):
    """A gate between two 1 x 1 convolutions, with a shortcut of its own; then a perceptron."""

    def __init__(self, gate: Gate, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.range = gate.range
        self.norm1 = TokenBatchNorm(dim)
        self.mixer = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), gate, nn.Linear(dim, dim))
        self.layer_scale1 = nn.Parameter(torch.full((dim,), LAYER_SCALE))
        self.norm2 = TokenBatchNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.layer_scale2 = nn.Parameter(torch.full((dim,), LAYER_SCALE))
        self.drop_path1 = StochasticDepth(drop)
        self.drop_path2 = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Transform: (B, N, dim) -> (B, N, dim)."""
        y = self.norm1(x)
        x = x + self.drop_path1(self.layer_scale1 * (y + self.mixer(y)))
        return x + self.drop_path2(self.layer_scale2 * self.mlp(self.norm2(x)))


class VAN(Isotropic):
    """Visual attention network on one grid of tokens.

    Parameters
    ----------
    dim : int
        Width of the tokens.
    kernel_size, dilation : int
        Of the large kernel, see `large_kernel_attention`.
    **skeleton
        Further options of `Isotropic`.

    Raises
    ------
    InputError
        If an option is out of range.
    """

    data_dependent = True

    def __init__(self, *, dim: int, kernel_size: int, dilation: int, **skeleton: Any) -> None:
        def block(grid: int, hidden: int, drop: float) -> Block:
            gate = large_kernel_attention(dim, grid, kernel_size, dilation)
            return Block(gate, dim, hidden, drop)

        super().__init__(block, 3 * dim**2 + kernel_size**2 * dim, dim=dim, **skeleton)


class GatedConvNet(Isotropic):
    """VAN with a plain kernel.

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

    data_dependent = True

    def __init__(self, *, dim: int, kernel_size: int, **skeleton: Any) -> None:
        def block(grid: int, hidden: int, drop: float) -> Block:
            gate = Gate(dim, DepthwiseConvolution(dim, grid, kernel_size))
            return Block(gate, dim, hidden, drop)

        super().__init__(block, 3 * dim**2 + kernel_size**2 * dim, dim=dim, **skeleton)
