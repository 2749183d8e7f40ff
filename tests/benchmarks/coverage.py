"""Whether stated intervals hold the truth: ``python -m tests.benchmarks.coverage``.

95 % intervals of traces, norms, densities and counts, over seeds, against the eigenvalues. Of 300
intervals that hold the truth 95 times in 100, 93 to 97 % do in eight or nine cases of ten. Beside
it, the root mean square of the errors over that of the stated ones, and the mean width over that of
the interval of 1.96 times the root mean square error, which nobody can know. A count says what the
quadrature leaves open, at most: where it ends among eigenvalues that are not resolved, its interval
is wide and holds more. Printed and written to ``coverage.md``, row by row.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from lossgeometry import Estimate, frobenius_norm, spectral_density, trace
from lossgeometry.algorithms.trace import Method

P = 200
SEEDS = 300
OUTPUT = Path(__file__).with_suffix(".md")

SPECTRA = {
    "evenly spread": np.linspace(-1, 1, P),
    "bulk and outliers": np.r_[np.linspace(-1, 1, P - 4), 5.0, 20.0, -7.0, 50.0],
    "power law": 1 / np.arange(1.0, P + 1),
    "exponential": 0.9 ** np.arange(P),
    "one large": np.r_[np.linspace(0, 1e-3, P - 1), 1.0],
}
BUDGETS = {10: (2, 5), 30: (3, 10), 96: (8, 12)}  # products: probes and steps of a density
METHODS = (*get_args(Method), "Frobenius norm", "density", "count", "count of the largest")


def symmetric(eigenvalues: np.ndarray, seed: int = 0) -> Tensor:
    """A matrix with these eigenvalues, in a random basis."""
    random = torch.randn(
        len(eigenvalues), len(eigenvalues), generator=torch.Generator().manual_seed(seed)
    )
    basis = torch.linalg.qr(random.double()).Q
    return (basis * torch.from_numpy(eigenvalues)) @ basis.T


def estimate(
    method: str, matrix: Tensor, eigenvalues: np.ndarray, budget: int, seed: int
) -> tuple[Estimate, np.ndarray]:
    """An estimate and the truth, of a density and of counts several at once, (n,)."""
    if method in get_args(Method):
        return trace(matrix, matvecs=budget, method=method, seed=seed), eigenvalues.sum()
    if method == "Frobenius norm":
        return frobenius_norm(matrix, matvecs=budget, seed=seed), np.linalg.norm(eigenvalues)
    probes, steps = BUDGETS[budget]
    density = spectral_density(matrix, probes=probes, steps=steps, seed=seed)
    ascending = np.sort(eigenvalues)
    if method == "density":
        places = np.quantile(ascending, [0.05, 0.25, 0.5, 0.75, 0.95, 1])
        truth = norm.pdf(places[:, None], ascending, density.bandwidth).mean(1)
        return density.estimate(places), truth
    numbers = np.array([1] if method != "count" else [1, 4, P // 10, P // 2, 9 * P // 10])
    counts = [
        density.count((ascending[-n] + ascending[-n - 1]) / 2, np.inf) for n in numbers.tolist()
    ]
    fields = ("estimate", "standard_error", "degrees_of_freedom", "systematic_error")
    columns = [np.array([getattr(count, field) for count in counts]) for field in fields]
    return Estimate(*columns, density.matvecs), numbers


def coverage(
    method: str, eigenvalues: np.ndarray, budget: int, seeds: int = SEEDS
) -> tuple[float, float, float]:
    """Share of intervals that hold the truth, rms error over stated error, and relative width.

    Of densities and counts: the mean over the places.
    """
    matrix = symmetric(eigenvalues)
    errors, inside, stated, widths = [], [], [], []
    for seed in range(seeds):
        found, truth = estimate(method, matrix, eigenvalues, budget, seed)
        low, high = found.interval()
        errors.append(np.atleast_1d(found.estimate - truth))
        inside.append(np.atleast_1d((low <= truth) & (truth <= high)))
        stated.append(np.atleast_1d(found.standard_error + found.systematic_error))
        widths.append(np.atleast_1d(high - low))
    rms = np.sqrt(np.square(errors).mean(0))
    return (
        float(np.mean(inside)),
        float((rms / np.sqrt(np.square(stated).mean(0))).mean()),
        float((np.mean(widths, 0) / (2 * norm.ppf(0.975) * rms)).mean()),
    )


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    seeds = parser.parse_args().seeds
    lines = [
        f"{P} eigenvalues, {seeds} seeds",
        "",
        "| method | eigenvalues | products | coverage (%) | rms error / stated | width |",
        "|---|---|---:|---:|---:|---:|",
    ]
    print("\n".join(lines), flush=True)
    for method, (name, eigenvalues), budget in product(METHODS, SPECTRA.items(), BUDGETS):
        share, ratio, width = coverage(method, eigenvalues, budget, seeds)
        lines.append(
            f"| {method} | {name} | {budget} | {100 * share:.1f} | {ratio:.2f} | {width:.2f} |"
        )
        print(lines[-1], flush=True)
        OUTPUT.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
