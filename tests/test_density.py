"""Spectral densities against exact ones, and their intervals against the truth."""

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import norm
from torch.nn import functional as F

from lossgeometry import Hessian, InputError
from lossgeometry.algorithms.density import spectral_density
from tests.benchmarks.coverage import BUDGETS, SPECTRA, coverage, symmetric
from tests.test_trace import weight_normalised

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


@pytest.mark.parametrize("budget", BUDGETS)
def test_intervals_hold_the_truth_at_their_nominal_rate(budget):
    found = [coverage("density", SPECTRA[name], budget, seeds=50) for name in SPECTRA]
    share, ratio, width = np.mean(found, axis=0)
    assert 0.92 < share < 0.99
    assert ratio == pytest.approx(0.95, abs=0.1)
    assert width < 1.4
    found = [coverage("count", SPECTRA[name], budget, seeds=20) for name in SPECTRA]
    share, _, width = np.mean(found, axis=0)
    assert share > 0.95  # where a count ends among others, as much as is possible is stated
    assert width < 3


def test_what_the_quadrature_does_not_resolve_is_in_the_interval():
    """Of half of the eigenvalues all that is known is that they are small."""
    eigenvalues = 0.5 ** np.arange(200)
    density = spectral_density(symmetric(eigenvalues), probes=4, steps=10)
    low, high = density.count(np.median(eigenvalues), 2).interval()
    assert low <= 100 <= high
    assert high - low > 100


def test_a_count_that_ends_at_an_eigenvalue_is_undecided():
    eigenvalues = np.r_[np.zeros(60), np.ones(40)]
    density = spectral_density(symmetric(eigenvalues).float(), probes=4, steps=20)
    count = density.count(0.0, 2.0)
    assert count.estimate - count.systematic_error == pytest.approx(40, abs=20)
    assert count.estimate + count.systematic_error == pytest.approx(100, abs=1e-6)
    exact = density.count(-1.0, 0.5)
    assert exact.systematic_error < 1e-6
    assert density.count(-np.inf, np.inf).estimate == pytest.approx(100)


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
    density = spectral_density(torch.eye(4).double(), steps=64)
    assert density.nodes.shape == (8, 4)
    assert density.matvecs == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_rule_ends_early_nothing_widens_the_smoothing(dtype):
    two = symmetric(np.r_[np.full(50, 100.0), np.full(50, 101.0)]).to(dtype)
    density = spectral_density(two, steps=32)
    assert density.bandwidth == pytest.approx(1 / 64, rel=1e-3)
    grid = density.grid()
    assert (grid[0], grid[-1]) == pytest.approx((100 - 1 / 16, 101 + 1 / 16), abs=1e-3)
    count = density.count(99, 100.5)
    assert abs(count.estimate - 50) <= 4 * count.standard_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 3.0, -1e-9])
def test_one_eigenvalue_has_a_density(value, dtype):
    density = spectral_density(value * torch.eye(20, dtype=dtype), steps=5)
    grid = density.grid()
    values = density.density(grid)
    assert trapezoid(values, grid) == pytest.approx(1, rel=0.01)
    scale = abs(value) or 1.0
    assert grid[values.argmax()] == pytest.approx(value, abs=30 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    density = spectral_density(A.to(dtype), probes=20, steps=30)
    grid = np.linspace(-4, 8, 50)
    low, high = density.estimate(grid, 0.3).interval(0.999)
    assert ((low - 0.01 <= exact(grid, 0.3)) & (exact(grid, 0.3) <= high + 0.01)).all()


def test_a_matrix_that_is_not_symmetric_is_refused():
    with pytest.raises(InputError, match="A: not symmetric"):
        spectral_density(A + 1e-3 * torch.triu(A, 1), probes=2, steps=5)
    model, data = weight_normalised()
    H = Hessian(model, F.cross_entropy, data)
    if not H.check().ok:
        with pytest.raises(InputError, match=r"not symmetric.*other operations"):
            spectral_density(H, probes=2, steps=5)


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
