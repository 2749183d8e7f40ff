"""Spectral densities against exact ones, and their standard errors against the truth."""

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import norm

from analysis.curvature.density import spectral_density
from models import InputError
from tests.test_trace import symmetric

EIGENVALUES = np.r_[np.linspace(-1, 1, 150), 4.0, 6.0, 6.5, -3.0]
A = symmetric(EIGENVALUES)


def exact(grid, bandwidth):
    return norm.pdf(grid[:, None], EIGENVALUES, bandwidth).mean(1)


def test_quadrature_has_the_moments_of_its_probe():
    """A Gauss rule of m nodes is exact for polynomials of degree 2m - 1."""
    density = spectral_density(A, probes=3, steps=5, seed=1)
    start = torch.randn(154, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start /= start.norm(dim=0)
    power = start
    for degree in range(10):
        moments = (start * power).sum(0)
        ours = (density.weights * density.nodes**degree).sum(1)
        np.testing.assert_allclose(ours, moments, rtol=1e-9, atol=1e-9)
        power = A @ power


def test_density_approaches_the_exact_one():
    density = spectral_density(A, probes=400, steps=60)
    grid = np.linspace(-4, 8, 200)
    errors = np.abs(density.density(grid, 0.2) - exact(grid, 0.2))
    assert (errors < 5 * density.estimate(grid, 0.2).standard_error + 1e-6).all()
    assert errors.max() < 0.02 * exact(grid, 0.2).max()


def test_standard_error_covers_the_truth_at_its_nominal_rate():
    grid = np.array([-3.0, -0.5, 0.5, 4.0, 6.2])
    truth = exact(grid, 0.3)
    inside = []
    for seed in range(200):
        density = spectral_density(A, probes=20, steps=40, seed=seed)
        error = np.abs(density.density(grid, 0.3) - truth)
        inside.append(error <= 2.093 * density.estimate(grid, 0.3).standard_error)  # Student, 19
    # 3 standard errors of 200 intervals; outliers of weight z² are skewed, so less at those.
    np.testing.assert_allclose(np.mean(inside, 0)[[1, 2]], 0.95, atol=0.046)
    assert (np.mean(inside, 0) > 0.86).all()


def test_density_integrates_to_one_with_the_stated_bandwidth():
    density = spectral_density(A)
    grid = density.grid(4000)
    assert trapezoid(density.density(grid), grid) == pytest.approx(1, abs=1e-3)
    np.testing.assert_array_equal(density.density(grid), density.density(grid, density.bandwidth))


def test_counts_eigenvalues_in_an_interval():
    density = spectral_density(A, probes=300, steps=80)
    for lower, upper, truth in ((2, 10, 3), (-10, -2, 1), (-10, 10, 154)):
        count = density.count(lower, upper)
        assert abs(count.estimate - truth) <= 4 * count.standard_error + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_and_constant_spectra_end_early(dtype):
    for matrix, nodes in (
        (3 * torch.eye(50), {3.0}),
        (symmetric(np.r_[np.zeros(48), 2.0, -1.0]), {-1.0, 0.0, 2.0}),
        (torch.zeros(50, 50), {0.0}),
    ):
        density = spectral_density(matrix.to(dtype), steps=30)
        heavy = density.nodes[density.weights > 1e-5]
        assert set(heavy.round(4)) | {0.0} == nodes | {0.0}
        np.testing.assert_allclose(density.weights.sum(1), 1, rtol=1e-6)


def test_more_steps_than_rows_are_not_made():
    assert spectral_density(torch.eye(4).double(), steps=64).nodes.shape == (8, 4)


def test_seeded_and_in_lock_step():
    few = spectral_density(A, probes=2, seed=5)
    again = spectral_density(A, probes=2, seed=5)
    np.testing.assert_array_equal(few.nodes, again.nodes)


def test_not_a_number_stays_one():
    bad = A.clone()
    bad[0, 0] = torch.nan
    density = spectral_density(bad, steps=5)
    assert np.isnan(density.nodes).all()
    assert np.isnan(density.density(np.zeros(3))).all()
    assert np.isnan(density.grid()).all()
    assert np.isnan(density.count(-1, 1).estimate)


def test_bad_options_are_named():
    with pytest.raises(InputError, match="probes: 1 found, expected at least 2"):
        spectral_density(A, probes=1)
    with pytest.raises(InputError, match="steps: 0 found, expected at least 1"):
        spectral_density(A, steps=0)
