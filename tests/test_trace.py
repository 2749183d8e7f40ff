"""Traces, diagonals and norms against exact ones, and their standard errors against the truth."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.curvature.trace import Estimate, diagonal, frobenius_norm, trace
from models import InputError

METHODS = ("hutchinson", "hutch++", "xtrace")
SEEDS = 200


def symmetric(eigenvalues, seed=0):
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(len(eigenvalues), len(eigenvalues), generator=generator).double()
    basis = torch.linalg.qr(random).Q
    return (basis * eigenvalues) @ basis.T


A = symmetric(np.r_[np.linspace(-1, 1, 70), 5.0, 20.0, -7.0, 50.0])


def coverage(estimates, truth, freedom):
    """Share of 95 % intervals that hold the truth."""
    bound = stats.t.ppf(0.975, freedom)
    return np.mean([abs(e.estimate - truth) <= bound * e.standard_error for e in estimates])


@pytest.mark.parametrize(
    ("method", "freedom"), [("hutchinson", 29), ("hutch++", 9), ("xtrace", 14)]
)
def test_standard_error_of_the_trace_covers_the_truth_at_its_nominal_rate(method, freedom):
    estimates = [trace(A, matvecs=30, method=method, seed=seed) for seed in range(SEEDS)]
    truth = float(A.trace())
    # 200 intervals of 95 %: three standard errors are 4.6 %.
    assert coverage(estimates, truth, freedom) == pytest.approx(0.95, abs=0.046)
    mean = np.mean([e.estimate for e in estimates])
    spread = np.std([e.estimate for e in estimates])
    assert abs(mean - truth) < 3.5 * spread / SEEDS**0.5  # no bias


def test_better_methods_have_smaller_errors_where_few_eigenvalues_are_large():
    errors = [
        np.median([trace(A, matvecs=30, method=m, seed=s).standard_error for s in range(20)])
        for m in METHODS
    ]
    assert errors[0] > 3 * errors[1]
    assert errors[1] > errors[2]


@pytest.mark.parametrize("method", METHODS)
def test_as_many_products_as_rows_give_the_exact_trace(method):
    estimate = trace(A, matvecs=len(A), method=method)
    assert estimate.estimate == pytest.approx(float(A.trace()), rel=1e-12)
    assert estimate.standard_error == 0


@given(st.integers(0, 1000), st.floats(-100, 100))
def test_multiples_of_the_identity_have_no_spread(seed, scale):
    for method in ("hutchinson", "xtrace"):
        estimate = trace(scale * torch.eye(40), matvecs=12, method=method, seed=seed)
        assert estimate.estimate == pytest.approx(40 * scale, rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_is_exact_where_the_range_is_found(method, dtype):
    low_rank = symmetric(np.r_[np.zeros(57), 3.0, 2.0, -1.0]).to(dtype)
    rounding = 100 * torch.finfo(dtype).eps
    for seed in range(10):
        estimate = trace(low_rank, matvecs=30, method=method, seed=seed)
        assert estimate.estimate == pytest.approx(4.0, abs=rounding)
        assert estimate.standard_error < rounding


def test_every_method_uses_the_products_it_is_allowed():
    class Counting:
        shape, dtype, device = A.shape, A.dtype, A.device

        def __matmul__(self, v):
            counted.append(v.shape[1] if v.ndim == 2 else 1)
            return A @ v

    for method in METHODS:
        counted = []
        trace(Counting(), matvecs=30, method=method)
        assert sum(counted) == 30
    for method in ("hutchinson", "xdiag"):
        counted = []
        diagonal(Counting(), matvecs=30, method=method)
        assert sum(counted) == 30


def test_errors_of_xdiag_are_small_and_those_that_it_states():
    estimates = [diagonal(A, matvecs=50, method="xdiag", seed=seed) for seed in range(SEEDS)]
    errors = torch.stack([e.estimate for e in estimates]) - A.diagonal()
    stated = torch.stack([e.standard_error**2 for e in estimates]).mean(0).sqrt()
    rms = errors.square().mean(0).sqrt()
    hutchinson = ((A**2).sum(1) - A.diagonal() ** 2).div(50).sqrt()
    assert (rms < hutchinson).all()
    assert 4 * rms.mean() < hutchinson.mean()
    torch.testing.assert_close(rms, stated, rtol=0.2, atol=0)
    assert (errors.mean(0).abs() < 4 * rms / SEEDS**0.5).all()  # no bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_diagonal_is_exact_where_the_range_is_found_and_with_all_products(dtype):
    low_rank = symmetric(np.r_[np.zeros(57), 3.0, 2.0, -1.0]).to(dtype)
    rounding = 100 * torch.finfo(dtype).eps
    found = diagonal(low_rank, matvecs=30, method="xdiag")
    exact = low_rank.diagonal().double()
    torch.testing.assert_close(found.estimate, exact, rtol=0, atol=rounding)
    assert found.standard_error.max() < rounding
    for matvecs in (len(A), 3 * len(A)):
        found = diagonal(A.to(dtype), matvecs=matvecs, method="xdiag")
        assert torch.equal(found.estimate, A.to(dtype).diagonal().double())
        assert not found.standard_error.any()


def test_diagonal_and_its_standard_error():
    estimates = [diagonal(A, matvecs=50, seed=seed) for seed in range(SEEDS)]
    errors = torch.stack([e.estimate for e in estimates]) - A.diagonal()
    exact = ((A**2).sum(1) - A.diagonal() ** 2).div(50).sqrt()
    squared = torch.stack([e.standard_error**2 for e in estimates]).mean(0)
    torch.testing.assert_close(squared.sqrt(), exact, rtol=0.05, atol=0)
    torch.testing.assert_close(errors.std(0), exact, rtol=0.25, atol=0)


def test_standard_error_of_the_norm_covers_the_truth_at_its_nominal_rate():
    estimates = [frobenius_norm(A, matvecs=60, seed=seed) for seed in range(SEEDS)]
    assert coverage(estimates, float(A.norm()), 59) == pytest.approx(0.95, abs=0.046)


def test_not_a_number_stays_one():
    bad = A.clone()
    bad[0, 0] = torch.nan
    for method in METHODS:
        assert np.isnan(trace(bad, matvecs=12, method=method).estimate)
    assert np.isnan(frobenius_norm(bad).estimate)
    for method in ("hutchinson", "xdiag"):
        assert diagonal(bad, method=method, matvecs=12).estimate.isnan().any()


def test_bad_options_are_named():
    with pytest.raises(InputError, match="method: 'exact', expected one of hutchinson"):
        trace(A, method="exact")
    for method, least in (("hutchinson", 2), ("hutch++", 6), ("xtrace", 4)):
        with pytest.raises(InputError, match=f"matvecs: {least - 1}, expected at least {least}"):
            trace(A, matvecs=least - 1, method=method)
    with pytest.raises(InputError, match="method: 'xtrace', expected one of hutchinson, xdiag"):
        diagonal(A, method="xtrace")
    with pytest.raises(InputError, match="matvecs: 3, expected at least 4"):
        diagonal(A, matvecs=3, method="xdiag")
    with pytest.raises(InputError, match="matvecs: 1, expected"):
        frobenius_norm(A, matvecs=1)
    assert trace(A, matvecs=30, seed=3) == trace(A, matvecs=30, seed=3)
    assert trace(A, matvecs=30, seed=3) != trace(A, matvecs=30, seed=4)
    assert isinstance(trace(A), Estimate)
