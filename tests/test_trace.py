"""Traces, diagonals and norms against exact ones, and their intervals against the truth."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import _weight_norm, nn
from torch.nn import functional as F

from lossgeometry import GGN, Hessian, InputError
from lossgeometry.algorithms.estimate import Estimate
from lossgeometry.algorithms.trace import diagonal, frobenius_norm, trace
from tests.benchmarks.coverage import SPECTRA, coverage, symmetric

METHODS = ("hutchinson", "hutch++", "xtrace")
SEEDS = 200


A = symmetric(np.r_[np.linspace(-1, 1, 70), 5.0, 20.0, -7.0, 50.0])


def covered(estimates, truth):
    """Share of 95 % intervals that hold the truth."""
    return np.mean([low <= truth <= high for low, high in (e.interval() for e in estimates)])


@pytest.mark.parametrize("matvecs", [10, 30])
@pytest.mark.parametrize("method", [*METHODS, "Frobenius norm"])
def test_intervals_hold_the_truth_at_their_nominal_rate(method, matvecs):
    found = [coverage(method, SPECTRA[name], matvecs, seeds=60) for name in SPECTRA]
    shares, ratios, widths = np.mean(found, axis=0)
    # Of 300 intervals of 95 %, three standard errors are 3.8 %.
    assert shares == pytest.approx(0.95, abs=0.038)
    assert ratios == pytest.approx(1, abs=0.15)
    assert widths < 1.2  # no wider than has to be


@pytest.mark.parametrize("method", METHODS)
def test_the_trace_has_no_bias(method):
    estimates = [trace(A, matvecs=30, method=method, seed=s).estimate for s in range(SEEDS)]
    assert abs(np.mean(estimates) - float(A.trace())) < 3.5 * np.std(estimates) / SEEDS**0.5


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


def test_an_error_below_rounding_is_said_to_be_rounding():
    eigenvalues = 0.3 ** np.arange(100)
    for method in ("hutch++", "xtrace"):
        found = trace(symmetric(eigenvalues), matvecs=90, method=method)
        low, high = found.interval()
        assert low <= eigenvalues.sum() <= high
        assert found.standard_error < 1e-15 < found.systematic_error < 1e-13


@pytest.mark.parametrize("matvecs", [30, 32, 1000])
def test_every_method_says_how_many_products_it_made(matvecs):
    class Counting:
        shape, dtype, device = A.shape, A.dtype, A.device

        def __matmul__(self, v):
            counted.append(v.shape[1])
            return A @ v

    for of, method in (*product([trace], METHODS), (diagonal, "hutchinson"), (diagonal, "xdiag")):
        counted = []
        found = of(Counting(), matvecs=matvecs, method=method)
        exact = matvecs > len(A) and (of, method) != (diagonal, "hutchinson")
        assert sum(counted) == found.matvecs == (len(A) if exact else matvecs)


@pytest.mark.parametrize("name", SPECTRA)
def test_errors_of_xdiag_are_those_that_it_states(name):
    matrix = symmetric(SPECTRA[name])
    found = [diagonal(matrix, matvecs=30, method="xdiag", seed=seed) for seed in range(80)]
    errors = torch.stack([e.estimate for e in found]) - matrix.diagonal()
    stated = torch.stack([e.standard_error**2 for e in found]).mean(0).sqrt()
    rms = errors.square().mean(0).sqrt()
    assert (rms / stated).mean() == pytest.approx(1.0, abs=0.1)
    assert (errors.mean(0).abs() < 4.5 * rms / 80**0.5).all()  # no bias
    inside = [(e.estimate - matrix.diagonal()).abs() <= e.interval()[1] - e.estimate for e in found]
    assert torch.stack(inside).double().mean() == pytest.approx(0.95, abs=0.03)


def test_xdiag_is_better_where_few_eigenvalues_are_large():
    found = [diagonal(A, matvecs=50, method="xdiag", seed=seed) for seed in range(50)]
    rms = (torch.stack([e.estimate for e in found]) - A.diagonal()).square().mean(0).sqrt()
    hutchinson = ((A**2).sum(1) - A.diagonal() ** 2).div(50).sqrt()
    assert (rms < hutchinson).all()
    assert 4 * rms.mean() < hutchinson.mean()


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


@pytest.mark.parametrize("matvecs", [2, 4, 90])
def test_intervals_of_the_norm_hold_the_truth_with_any_number_of_products(matvecs):
    for eigenvalues in (np.r_[np.zeros(99), 2.0], np.linspace(0, 1, 100), 0.5 ** np.arange(100)):
        matrix, truth = symmetric(eigenvalues), np.linalg.norm(eigenvalues)
        estimates = [frobenius_norm(matrix, matvecs=matvecs, seed=seed) for seed in range(SEEDS)]
        assert covered(estimates, truth) > 0.95 - 0.046
        assert all(low > 0 for low, _ in (e.interval() for e in estimates))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e25])
def test_the_norm_of_a_multiple_of_the_identity_is_exact(scale):
    found = frobenius_norm(scale * torch.eye(100), matvecs=10)
    low, high = found.interval()
    assert low <= 10 * torch.tensor(scale) <= high
    assert high - low <= 1e-4 * scale


EVERY_ESTIMATE = [
    *(lambda A, m=m, n=n: trace(A, matvecs=n, method=m) for m in METHODS for n in (30, 1000)),
    *(lambda A, m=m: diagonal(A, matvecs=30, method=m) for m in ("hutchinson", "xdiag")),
    lambda A: frobenius_norm(A, matvecs=30),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    matrix = A.to(dtype)
    exact = matrix.double()
    exact = (exact + exact.T) / 2
    truths = [float(exact.trace())] * 6 + [exact.diagonal()] * 2 + [float(exact.norm())]
    for of, truth in zip(EVERY_ESTIMATE, truths, strict=True):
        found = of(matrix)
        rounding = 0.02 * float(exact.norm())
        error = torch.as_tensor(found.estimate - truth).abs()
        assert (error <= 5 * torch.as_tensor(found.standard_error) + rounding).all()


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_the_scale_of_the_matrix_is_of_no_importance(scale):
    for method in METHODS:
        small, large = (
            trace(matrix.float(), matvecs=30, method=method) for matrix in (A, A * scale)
        )
        for field in ("estimate", "standard_error"):
            assert getattr(large, field) == pytest.approx(scale * getattr(small, field), rel=1e-3)
        assert large.degrees_of_freedom == pytest.approx(small.degrees_of_freedom, rel=1e-2)
    assert diagonal((A * scale).float(), matvecs=30, method="xdiag").standard_error.isfinite().all()


class Normalised(nn.Linear):
    """A layer whose second derivative, by double backward, is wrong in PyTorch.

    `torch.nn.utils.parametrizations.weight_norm` is computed in another way where curvature is.
    """

    def forward(self, x):
        lengths = torch.ones_like(self.weight[:, :1])
        return F.linear(x, _weight_norm(self.weight, lengths, 0), self.bias)


def weight_normalised():
    torch.manual_seed(0)
    model = nn.Sequential(Normalised(10, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, (torch.randn(12, 10), torch.arange(12) % 3)


@pytest.mark.parametrize("of", EVERY_ESTIMATE)
def test_a_matrix_that_is_not_symmetric_is_refused(of):
    skew = torch.triu(A, 1)
    with pytest.raises(InputError, match=r"A: not symmetric: .* differ by .* of the norm of A"):
        of(A + 1e-3 * (skew - skew.T))
    model, data = weight_normalised()
    H = Hessian(model, F.cross_entropy, data)
    if not H.check().ok:  # in a PyTorch that has it right there is nothing to refuse
        with pytest.raises(InputError, match=r"not symmetric.*other operations.*GGN"):
            of(H)
    of(GGN(model, F.cross_entropy, data))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_symmetric_matrices_are_not_refused(dtype):
    for eigenvalues in (*SPECTRA.values(), np.r_[1e6, np.ones(20)], 0.1 ** np.arange(30)):
        for of in EVERY_ESTIMATE:
            of(symmetric(eigenvalues).to(dtype))


def test_intervals_are_students():
    low, high = Estimate(3.0, 0.5, 9.0, 0.1, 10).interval()
    assert (low, high) == pytest.approx((3 - 2.2622 * 0.5 - 0.1, 3 + 2.2622 * 0.5 + 0.1), abs=1e-4)
    low, high = Estimate(3.0, 0.5, np.inf, 0.0, 10).interval(0.6827)
    assert (low, high) == pytest.approx((2.5, 3.5), abs=1e-4)
    for estimate in (trace(A, matvecs=12), frobenius_norm(A, matvecs=12)):
        with pytest.raises(InputError, match="confidence: 95, expected a number between 0 and 1"):
            estimate.interval(95)


def test_zero_and_huge_matrices():
    zero = diagonal(torch.zeros(60, 60), method="xdiag", matvecs=20)
    assert not zero.estimate.any()
    assert not zero.standard_error.any()
    for method in METHODS:
        huge, usual = (trace(a * A.float(), matvecs=12, method=method) for a in (1e25, 1.0))
        assert np.divide(huge.interval(), 1e25) == pytest.approx(usual.interval(), rel=1e-3)


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
