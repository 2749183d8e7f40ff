"""Spectral densities by stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.curvature.eigensolver import SymmetricOperator
from analysis.curvature.krylov import orthogonalise
from models.errors import InputError

MEMORY = 2 * 1024**3  # bytes for the bases of the probes that advance together


@dataclass(frozen=True)
class SpectralDensity:
    """Distribution of the eigenvalues of an operator, as one quadrature rule for each random probe.

    The mean of ``(weights * f(nodes)).sum(1)`` over the probes estimates the mean of `f` over all
    eigenvalues. A probe that met NaN or infinity has NaN nodes and weights.
    """

    nodes: Tensor  # (probes, steps) float64, ascending
    weights: Tensor  # (probes, steps) float64, summing to 1 for each probe
    size: int  # P, the number of eigenvalues
    matvecs: int

    @property
    def bandwidth(self) -> float:
        """Default standard deviation of the kernel: a hundredth of the range of the nodes."""
        lowest, highest = float(self.nodes.min()), float(self.nodes.max())
        return (highest - lowest or abs(highest) or 1.0) / 100

    def grid(self, points: int = 1001) -> Tensor:
        """(points,) equidistant eigenvalues, five default bandwidths beyond the nodes."""
        margin = 5 * self.bandwidth
        first, last = float(self.nodes.min()) - margin, float(self.nodes.max()) + margin
        return torch.linspace(first, last, points, dtype=torch.float64)

    def density(self, grid: Tensor, bandwidth: float | None = None) -> Tensor:
        """Density at each of (n,) eigenvalues, of integral 1, every node widened to a Gaussian."""
        return self._per_probe(grid, bandwidth).mean(0)

    def standard_error(self, grid: Tensor, bandwidth: float | None = None) -> Tensor:
        """(n,) standard errors of the density over probes; NaN for a single probe."""
        return _standard_error(self._per_probe(grid, bandwidth))

    def count(self, lower: float = -math.inf, upper: float = math.inf) -> tuple[float, float]:
        """Number of eigenvalues with ``lower <= λ < upper``, and its standard error."""
        inside = (self.nodes >= lower) & (self.nodes < upper)
        counts = self.size * (self.weights * inside).sum(1)
        return float(counts.mean()), float(_standard_error(counts))

    def _per_probe(self, grid: Tensor, bandwidth: float | None) -> Tensor:
        sigma = self.bandwidth if bandwidth is None else bandwidth
        grid = torch.as_tensor(grid, dtype=torch.float64)
        rows = []
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            kernel = torch.exp(-(((grid[:, None] - nodes) / sigma) ** 2) / 2)
            rows.append(kernel @ weights / (sigma * math.sqrt(2 * math.pi)))
        return torch.stack(rows)


def spectral_density(
    A: SymmetricOperator, *, probes: int = 8, steps: int = 64, seed: int = 0
) -> SpectralDensity:
    """Spectral density of a symmetric operator by stochastic Lanczos quadrature.

    Lanczos from random vectors, with full reorthogonalisation; the probes advance together, in
    groups whose bases fit into 2 GiB, by products of `A` with a block of vectors.

    Parameters
    ----------
    A
        Any object with ``shape``, ``dtype``, ``device`` and ``A @ V`` for (P, k) tensors.
    probes
        Random vectors. The standard error falls with their square root.
    steps
        Products with each, at most P. The resolution in the eigenvalue is their inverse.
    seed
        Of the random vectors.

    Raises
    ------
    InputError
        `probes` or `steps` below 1.
    """
    if probes < 1 or steps < 1:
        raise InputError(f"probes, steps: {probes} and {steps}, expected at least 1 of both")
    P = A.shape[0]
    steps = min(steps, P)
    bytes_per_probe = steps * P * torch.finfo(A.dtype).bits // 8
    group = max(1, MEMORY // bytes_per_probe)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(probes, P, generator=generator, dtype=torch.float64)
    T = torch.cat([_lanczos(A, block.to(A.device, A.dtype), steps) for block in start.split(group)])
    finite = T.isfinite().all(-1).all(-1)
    nodes, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], T, 0.0))
    nodes[~finite] = torch.nan
    return SpectralDensity(nodes, vectors[:, 0].square() + 0 * nodes, P, probes * steps)


def _lanczos(A: SymmetricOperator, start: Tensor, steps: int) -> Tensor:
    """Tridiagonal matrices (probes, steps, steps), float64, of the rows of `start`."""
    probes, P = start.shape
    basis = torch.empty(probes, steps, P, dtype=start.dtype, device=start.device)
    T = torch.zeros(probes, steps, steps, dtype=torch.float64)
    w = start
    norm = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64)
    scale = torch.zeros_like(norm)
    for j in range(steps):
        # A space that is invariant goes on with zeros, which have no weight in the quadrature.
        exhausted = norm <= 10 * torch.finfo(start.dtype).eps * scale
        basis[:, j] = torch.where(exhausted, 0.0, w.T / norm).T
        w = (A @ basis[:, j].T).T.contiguous()
        coefficients, norm = orthogonalise(w, basis[:, : j + 1])
        scale = torch.maximum(scale, coefficients[:, -1].abs() + norm)
        T[:, j, j] = coefficients[:, -1].cpu()
        if j + 1 < steps:
            beta = torch.where(norm <= 10 * torch.finfo(start.dtype).eps * scale, 0.0, norm).cpu()
            T[:, j, j + 1] = T[:, j + 1, j] = beta
    return T


def _standard_error(samples: Tensor) -> Tensor:
    """Over the first dimension."""
    return samples.std(0) / math.sqrt(len(samples)) if len(samples) > 1 else samples[0] * math.nan
