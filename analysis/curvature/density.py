"""Density of all eigenvalues by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.curvature.eigensolver import SymmetricOperator
from analysis.curvature.trace import Estimate, dot_columns
from models.errors import InputError


@dataclass(frozen=True)
class SpectralDensity:
    """Gauss quadrature rules of the eigenvalue distribution, one from each random probe.

    Their mean is the distribution's estimate, their spread what it is worth.
    """

    nodes: np.ndarray  # (probes, steps) float64, ascending
    weights: np.ndarray  # (probes, steps), those of a probe add up to 1
    size: int  # P, the number of eigenvalues

    @property
    def bandwidth(self) -> float:
        """Standard deviation of the default smoothing: half of the range of nodes over the steps.

        Lanczos tells apart what is about the range over the steps apart, inside the spectrum.
        """
        return float(np.ptp(self.nodes)) / (2 * self.nodes.shape[1])

    def grid(self, n: int = 400) -> np.ndarray:
        """(n,) points that cover the spectrum with its smoothing."""
        margin = 4 * self.bandwidth
        return np.linspace(self.nodes.min() - margin, self.nodes.max() + margin, n)

    def density(self, grid: np.ndarray, bandwidth: float | None = None) -> np.ndarray:
        """Share of eigenvalues per unit at each point of `grid` (n,), smoothed by a Gaussian."""
        return self._by_probe(grid, bandwidth).mean(0)

    def standard_error(self, grid: np.ndarray, bandwidth: float | None = None) -> np.ndarray:
        """Standard error of `density` over the probes, (n,)."""
        return _standard_error(self._by_probe(grid, bandwidth))

    def count(self, lower: float, upper: float) -> Estimate:
        """Number of eigenvalues in [lower, upper], within what the quadrature resolves."""
        inside = (self.nodes >= lower) & (self.nodes <= upper)
        shares = np.where(np.isnan(self.nodes), np.nan, self.weights * inside).sum(1)
        return Estimate(
            self.size * float(shares.mean()), self.size * float(_standard_error(shares))
        )

    def _by_probe(self, grid: np.ndarray, bandwidth: float | None) -> np.ndarray:
        """(probes, n) densities."""
        width = self.bandwidth if bandwidth is None else bandwidth
        distances = (np.asarray(grid)[None, :, None] - self.nodes[:, None, :]) / width
        kernels = np.exp(-(distances**2) / 2) / (width * math.sqrt(2 * math.pi))
        return (self.weights[:, None, :] * kernels).sum(2)


def spectral_density(
    A: SymmetricOperator, *, probes: int = 8, steps: int = 64, seed: int = 0
) -> SpectralDensity:
    """Estimate the eigenvalue distribution of a symmetric operator.

    Stochastic Lanczos quadrature (Golub and Welsch 1969; Ghorbani, Krishnan and Xiao 2019,
    algorithm 1), all probes in lock-step. The Lanczos vectors are not reorthogonalised, so only
    three for each probe are kept: in floating point that makes copies of converged nodes, among
    which the weight of the eigenvalue is divided (Greenbaum 1989), and changes no sum.

    Parameters
    ----------
    A
        Any object with ``shape``, ``dtype``, ``device`` and ``A @ V`` for (P, k) tensors.
    probes
        Random vectors, at least 2.
    steps
        Lanczos steps for each probe, and nodes of its quadrature; no more than P are made.
    seed
        Of the probes.

    Returns
    -------
    SpectralDensity
        Nodes are NaN for a probe in which the operator returned NaN or infinity.

    Raises
    ------
    InputError
        If `probes` or `steps` is out of range.
    """
    if probes < 2:
        raise InputError(f"probes: {probes} found, expected at least 2")
    if steps < 1:
        raise InputError(f"steps: {steps} found, expected at least 1")
    size = A.shape[0]
    steps = min(steps, size)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, probes, generator=generator, dtype=torch.float64)
    current = (start / start.norm(dim=0)).to(A.device, A.dtype)
    previous = torch.zeros_like(current)
    beta = torch.zeros(probes, dtype=torch.float64, device=A.device)
    diagonals, off_diagonals = [], []
    for _ in tqdm(range(steps), desc="spectral density", unit="step", leave=False, disable=None):
        product = A @ current - beta.to(A.dtype) * previous
        alpha = dot_columns(current, product)
        product -= alpha.to(A.dtype) * current
        beta = dot_columns(product, product).sqrt()
        scale = torch.maximum(alpha.abs(), beta)
        # An invariant space: what is left is rounding, and the rule ends here with weight zero.
        beta = torch.where(beta <= 10 * torch.finfo(A.dtype).eps * scale, 0.0, beta)
        previous, current = current, product * torch.where(beta > 0, 1 / beta, beta).to(A.dtype)
        diagonals.append(alpha)
        off_diagonals.append(beta)
    return SpectralDensity(*_quadrature(torch.stack(diagonals), torch.stack(off_diagonals)), size)


def _quadrature(diagonals: Tensor, off_diagonals: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights (probes, steps) of the tridiagonal matrices in the columns."""
    alpha, beta = diagonals.T.cpu().numpy(), off_diagonals.T.cpu().numpy()[:, :-1]
    matrices = np.stack(
        [np.diag(a) + np.diag(b, 1) + np.diag(b, -1) for a, b in zip(alpha, beta, strict=True)]
    )
    finite = np.isfinite(matrices).all((1, 2))
    matrices[~finite] = 0.0
    nodes, vectors = np.linalg.eigh(matrices)
    nodes[~finite] = np.nan
    return nodes, vectors[:, 0, :] ** 2


def _standard_error(samples: np.ndarray) -> np.ndarray:
    return samples.std(0, ddof=1) / math.sqrt(len(samples))
