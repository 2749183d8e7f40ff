"""Density of all eigenvalues by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lossgeometry.algorithms.eigensolver import SymmetricOperator
from lossgeometry.algorithms.estimate import Estimate
from lossgeometry.algorithms.trace import dot_columns
from lossgeometry.errors import InputError
from lossgeometry.storing import Result
from lossgeometry.symmetry import require_small_asymmetry, require_symmetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, repr=False)
class SpectralDensity(Result):
    """Lanczos' tridiagonal matrices from random probes, and what they say of the eigenvalues.

    Each is a Gauss quadrature rule of the eigenvalue distribution as its probe weighs it. The mean
    of the rules is the distribution's estimate; `estimate` and `count` say what it is worth.

    See Also
    --------
    spectral_density : computes it.
    plots.plot_spectral_density : several of them in one picture.

    Examples
    --------
    >>> import torch
    >>> from lossgeometry import spectral_density
    >>> D = spectral_density(torch.diag(torch.linspace(-1, 3, 200)), probes=4, steps=20)
    >>> grid = D.grid()
    >>> round(float(D.density(grid).sum() * (grid[1] - grid[0])), 3)  # a share of one
    1.0
    """

    diagonals: np.ndarray  # (probes, steps) float64
    off_diagonals: np.ndarray  # (probes, steps), the last is to a step that was not made
    size: int  # P, the number of eigenvalues
    eps: float  # machine epsilon of the precision of the products
    _shown = ("nodes",)

    @property
    def matvecs(self) -> int:
        """Products that were made, one for each step of each probe."""
        return self.diagonals.size

    @property
    def nodes(self) -> np.ndarray:
        """(probes, steps) float64, ascending; NaN where the operator returned NaN or infinity."""
        return self._rules[0][0]

    @property
    def weights(self) -> np.ndarray:
        """(probes, steps), those of a probe add up to 1."""
        return self._rules[0][1]

    @property
    def bandwidth(self) -> float:
        """Standard deviation of the default smoothing, half of the range of nodes over the steps.

        Inside the spectrum, Lanczos resolves eigenvalues that are about the range over the steps
        apart. It is no less than rounding, where all eigenvalues are the same.
        """
        return float(np.maximum(np.ptp(self.nodes) / (2 * self.nodes.shape[1]), self._rounding))

    def grid(self, n: int = 400) -> np.ndarray:
        """(n,) points that cover the spectrum with its smoothing."""
        margin = 4 * self.bandwidth
        return np.linspace(self.nodes.min() - margin, self.nodes.max() + margin, n)

    def density(self, grid: np.ndarray, bandwidth: float | None = None) -> np.ndarray:
        """Share of eigenvalues per unit at each point of `grid` (n,), smoothed by a Gaussian."""
        return self.estimate(grid, bandwidth).estimate

    def estimate(self, grid: np.ndarray, bandwidth: float | None = None) -> Estimate[np.ndarray]:
        """`density` with its errors, for the density of all eigenvalues with the same smoothing.

        The systematic error is that of the quadrature, as its difference to another rule estimates
        it. With less than the default `bandwidth` both rules may miss the same.
        """
        width = self.bandwidth if bandwidth is None else bandwidth
        points = np.asarray(grid)[None, :, None]

        def kernel(nodes: np.ndarray) -> np.ndarray:
            distances = (points - nodes[:, None, :]) / width
            return np.exp(-(distances**2) / 2) / (width * math.sqrt(2 * math.pi))

        rules = [(kernel(nodes), weights[:, None, :]) for nodes, weights in self._rules]
        gauss, other = ((values * weights).sum(2).mean(0) for values, weights in rules)
        return Estimate(gauss, *self._by_chance(rules), np.abs(gauss - other) / 2, self.matvecs)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The density, with a band of two standard errors and the systematic one."""
        from lossgeometry.plots import plot_spectral_density

        return plot_spectral_density(**self._smoothed(), ax=ax)

    def _derived(self) -> dict[str, Any]:
        quadrature = {name: getattr(self, name) for name in ("nodes", "weights", "bandwidth")}
        return quadrature | self._smoothed()

    def _smoothed(self) -> dict[str, Any]:
        grid = self.grid()
        found = self.estimate(grid)
        errors = {name: getattr(found, name) for name in ("standard_error", "systematic_error")}
        return {"grid": grid, "density": found.estimate, **errors}

    def count(self, lower: float, upper: float) -> Estimate[float]:
        """Number of eigenvalues in [lower, upper].

        The systematic error is half of what the quadrature leaves open at the two ends: the count
        is in the middle. Where an end is inside a group of eigenvalues that is not resolved, or is
        an eigenvalue, this may be all of the group.
        """
        ends = (self._shares_below(lower), self._shares_below(upper))
        (least_before, most_before), (least, most) = ends
        least, most = least - most_before, most - least_before
        rules = [
            (((nodes >= lower) & (nodes <= upper)) + 0 * nodes, weights)
            for nodes, weights in self._rules
        ]
        error, freedom = self._by_chance(rules)
        return Estimate(
            self.size * (least + most) / 2,
            self.size * float(error),
            float(freedom),
            self.size * (most - least) / 2,
            self.matvecs,
        )

    @cached_property
    def _rules(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Gauss's, and Laurie's (1996) of one node more whose errors are the opposite.

        The entry of its matrix that only a further step would tell is that of the last step, which
        matters beyond the degree of which the errors are opposite.
        """
        gauss = _quadrature(self.diagonals, self.off_diagonals[:, :-1])
        return gauss, self._extended(np.sqrt(2), self.diagonals[:, -1])

    def _extended(self, factor: float, diagonal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nodes and weights with one node more, which is coupled by `factor` times what it is."""
        return _quadrature(
            np.concatenate([self.diagonals, diagonal[:, None]], axis=1),
            np.concatenate([self.off_diagonals[:, :-1], factor * self.off_diagonals[:, -1:]], 1),
        )

    def _shares_below(self, end: float) -> tuple[float, float]:
        """Least and largest share of eigenvalues below `end` that the moments of probes allow.

        Those are known to degree 2 steps - 1. By the inequalities of Chebyshev, Markov and
        Stieltjes (Szegő 1939, section 3.41) the share is between the weights of the nodes below
        and up to `end`, of the rule that has a node there.
        """
        if math.isinf(end):
            share = float(end > 0) + 0.0 * float(self.nodes.sum())
            return share, share
        nodes, weights = self._radau(end - self._rounding)
        least = np.where(nodes < 0, weights, 0.0).sum(1)
        nodes, weights = self._radau(end + self._rounding)
        most = np.where(nodes > 0, 0.0, weights).sum(1)
        return float(least.mean()), float(most.mean())

    def _radau(self, end: float) -> tuple[np.ndarray, np.ndarray]:
        """Nodes, less `end`, and weights of rules with a node at `end` (Golub 1973, section 7)."""
        tiny = np.finfo(np.float64).tiny
        shift = np.zeros(len(self.diagonals))
        with np.errstate(over="ignore"):
            for alpha, beta in zip(self.diagonals.T, self.off_diagonals.T, strict=True):
                pivot = alpha - end - shift
                shift = beta**2 / np.where(pivot == 0, tiny, pivot)
        # Where `end` is a node already, the new one is to be far away, not to blot out all others.
        far = 1e6 * self._scale
        nodes, weights = self._extended(1.0, end + np.clip(shift, -far, far))
        nodes = nodes - end
        at_end = np.abs(nodes).argmin(1)
        nodes[np.arange(len(nodes)), at_end] *= 0.0
        return nodes, weights + 0.0 * nodes

    @property
    def _scale(self) -> float:
        """Of the operator, as far as it is known."""
        return float(max(np.abs(self.diagonals).max(), np.abs(self.off_diagonals).max())) or 1.0

    @property
    def _rounding(self) -> float:
        """Of nodes."""
        return 10 * self.eps * self._scale

    def _by_chance(
        self, rules: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Standard error of the mean of f over all eigenvalues, and its degrees of freedom.

        A rule is the values f(node) and the weights, (probes, ..., nodes). For a probe z on the
        unit sphere, with f(A) for B as in the notes on `trace`, the variance of z·f(A)z is the mean
        of (f - z·f(A)z)² with the weights of z, times 2 / P.
        """
        second, fourth = 0.0, 0.0
        for values, weights in rules:
            deviations = (values - (values * weights).sum(-1, keepdims=True)) ** 2
            second += (deviations * weights).sum(-1).mean(0) / len(rules)
            fourth += (deviations**2 * weights).sum(-1).mean(0) / len(rules)
        probes = len(self.nodes)
        with np.errstate(divide="ignore", invalid="ignore"):
            ranks = np.where(fourth > 0, second / fourth * second * self.size, np.inf)
        return np.sqrt(2 * second / (self.size * probes)), probes * np.maximum(ranks, 1)


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
        Lanczos steps for each probe, and nodes of its quadrature. No more than P are made: the
        result has as many nodes as there were.
    seed
        Of the probes.

    Returns
    -------
    SpectralDensity
        Nodes are NaN for a probe in which the operator returned NaN or infinity.

    Raises
    ------
    InputError
        If `probes` or `steps` is out of range, or `A` is not symmetric.

    See Also
    --------
    eigsh : the outermost eigenvalues, each with its error.
    trace : the sum of all, by fewer products.

    References
    ----------
    G. H. Golub and J. H. Welsch, Calculation of Gauss quadrature rules, Math. Comp. 23, 1969.
    B. Ghorbani, S. Krishnan and Y. Xiao, An investigation into neural net optimization via Hessian
    eigenvalue density, ICML 2019.
    A. Greenbaum, Behavior of slightly perturbed Lanczos and conjugate-gradient recurrences, Linear
    Algebra Appl. 113, 1989.
    G. H. Golub, Some modified matrix eigenvalue problems, SIAM Review 15, 1973.
    D. P. Laurie, Anti-Gaussian quadrature formulas, Math. Comp. 65, 1996.
    G. Szegő, Orthogonal Polynomials, 1939.

    Examples
    --------
    >>> import torch
    >>> from lossgeometry import spectral_density
    >>> D = spectral_density(torch.diag(torch.cat([torch.zeros(98), torch.tensor([5.0, 6.0])])))
    >>> D.nodes.shape, D.matvecs
    ((8, 64), 512)
    >>> low, high = D.count(4, 10).interval()
    >>> low < 2 < high
    True
    """
    if probes < 2:
        raise InputError(f"probes: {probes} found, expected at least 2")
    if steps < 1:
        raise InputError(f"steps: {steps} found, expected at least 1")
    size = A.shape[0]
    steps = min(steps, size)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, probes, generator=generator, dtype=torch.float64)
    work = torch.promote_types(A.dtype, torch.float32)
    current = (start / start.norm(dim=0)).to(A.device, work)
    previous = torch.zeros_like(current)
    beta = torch.zeros(probes, dtype=torch.float64, device=A.device)
    diagonals: list[Tensor] = []
    off_diagonals, defects, norms = [], [], []
    for _ in tqdm(range(steps), desc="spectral density", unit="step", leave=False, disable=None):
        product = (A @ current.to(A.dtype)).to(work)
        if not diagonals:
            require_symmetric(current, product, A.dtype)
        between = current.T @ product
        defects.append((between - between.T).abs().max())
        norms.append(torch.linalg.vector_norm(product, dim=0, dtype=torch.float64).max())
        product -= beta.to(work) * previous
        alpha = dot_columns(current, product)
        product -= alpha.to(work) * current
        beta = dot_columns(product, product).sqrt()
        scale = torch.maximum(alpha.abs(), beta)
        # An invariant space: what is left is rounding, and the rule ends here. Nodes beyond have
        # weight zero, and a place inside the spectrum.
        beta = torch.where(beta <= 10 * torch.finfo(A.dtype).eps * scale, 0.0, beta)
        ended = ~current.any(0)
        diagonals.append(torch.where(ended, diagonals[0], alpha) if diagonals else alpha)
        off_diagonals.append(beta)
        previous, current = current, product * torch.where(beta > 0, 1 / beta, beta).to(work)
    worst, norm = (float(torch.stack(numbers).max()) for numbers in (defects, norms))
    require_small_asymmetry(worst, norm, A.dtype)
    alphas, betas = (
        torch.stack(numbers, dim=1).cpu().numpy() for numbers in (diagonals, off_diagonals)
    )
    return SpectralDensity(alphas, betas, size, torch.finfo(A.dtype).eps)


def _quadrature(diagonals: np.ndarray, off_diagonals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights (probes, n) of tridiagonal matrices: rows (probes, n), (probes, n - 1)."""
    matrices = np.stack(
        [
            np.diag(a) + np.diag(b, 1) + np.diag(b, -1)
            for a, b in zip(diagonals, off_diagonals, strict=True)
        ]
    )
    finite = np.isfinite(matrices).all((1, 2))
    matrices[~finite] = 0.0
    nodes, vectors = np.linalg.eigh(matrices)
    nodes[~finite] = np.nan
    return nodes, vectors[:, 0, :] ** 2
