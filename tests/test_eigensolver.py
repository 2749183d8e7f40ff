"""eigsh against numpy on spectra that are hard for a Krylov method."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lossgeometry import eigsh
from lossgeometry.errors import InputError
from lossgeometry.running import saving
from tests.benchmarks import coverage

RANDOM = np.random.default_rng(0)
SPECTRA = {
    "random": RANDOM.standard_normal(120),
    "clustered": np.r_[5 + 1e-6 * RANDOM.standard_normal(4), -3, RANDOM.uniform(-1, 1, 100)],
    "repeated": np.r_[[5.0] * 3, [-5.0] * 3, [4.0] * 2, RANDOM.uniform(-1, 1, 100)],
    "two values": np.r_[[2.0] * 30, [-1.0] * 30],
    "identity": np.ones(50),
    "zero": np.zeros(40),
    "low rank": np.r_[3, 2, -1.0, np.zeros(80)],
    "outlier": np.r_[100.0, RANDOM.uniform(0, 1, 100)],
    "tiny": np.array([1.0, -2.0, 3.0]),
    "scalar": np.array([-4.0]),
}
WHICH = ("LM", "LA", "SA", "BE")


def symmetric(eigenvalues, dtype=torch.float64):
    A = coverage.symmetric(np.asarray(eigenvalues, dtype=float))
    return ((A + A.T) / 2).to(dtype)


def exact(A, which, k):
    """Wanted eigenvalues by numpy, in the order of `eigsh`."""
    values = np.linalg.eigvalsh(A.double().numpy())
    if which == "LM":
        return values[np.argsort(-np.abs(values), kind="stable")[:k]]
    if which == "LA":
        return values[::-1][:k]
    if which == "SA":
        return values[:k]
    return np.append(values[::-1][: (k + 1) // 2], values[: k // 2][::-1])


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SPECTRA)
def test_every_eigenvalue_of_every_spectrum(name, which):
    A = symmetric(SPECTRA[name])
    P, norm = len(A), max(np.abs(SPECTRA[name]).max(), 1e-300)
    for k in sorted({1, min(5, P), P}):
        E = eigsh(A, k, which=which, tol=1e-12)
        # What is zero but for rounding has no relative error.
        assert E.converged[E.eigenvalues.abs() > 0.01 * norm].all()
        truth = exact(A, which, k)
        found = E.eigenvalues.numpy()
        if which == "LM":  # 2 and -2 are equally wanted
            truth, found = np.abs(truth), np.abs(found)
        np.testing.assert_allclose(found, truth, rtol=0, atol=1e-10 * norm)
        X = E.eigenvectors
        torch.testing.assert_close(X.T @ X, torch.eye(k).double(), rtol=0, atol=1e-12)
        residuals = torch.linalg.vector_norm(A @ X - X * E.eigenvalues, dim=0)
        torch.testing.assert_close(residuals, E.residuals, rtol=1e-2, atol=1e-12 * norm)


@pytest.mark.parametrize("which", WHICH)
def test_single_precision_and_the_default_tolerance(which):
    for name in ("random", "outlier", "low rank", "two values", "zero"):
        A = symmetric(SPECTRA[name], torch.float32)
        E = eigsh(A, 4, which=which)
        norm = np.abs(SPECTRA[name]).max()
        assert E.converged[E.eigenvalues.abs() > 2e-3 * norm].all()
        assert E.eigenvectors.dtype == torch.float32
        np.testing.assert_allclose(
            E.eigenvalues, exact(A, which, 4), rtol=2e-3, atol=1e-5 * norm, err_msg=name
        )


CLUSTERS = np.repeat([4.0, 3.0, -3.5, 0.5], 15) * (1 + 1e-5 * RANDOM.standard_normal(60))
NASTY = {
    "clusters": (CLUSTERS, torch.float64),
    "near tie": (np.r_[2.0, 2.0 - 1e-6, 1.999, RANDOM.uniform(-1, 1, 60)], torch.float64),
    "opposite": (np.r_[SPECTRA["random"], -SPECTRA["random"]], torch.float32),
    "graded": (0.7 ** np.arange(60), torch.float64),
    "wide": (10 ** RANDOM.uniform(-8, 3, 60), torch.float32),
    "dominant": (np.r_[8e6, np.linspace(3, 0.1, 20)], torch.float32),
    "repeated": (np.repeat(RANDOM.standard_normal(20), 3), torch.float64),
    "random": (SPECTRA["random"], torch.float32),
}


@pytest.mark.parametrize("tol", [1e-3, 1e-7])
@pytest.mark.parametrize("name", NASTY)
def test_what_is_stated_is_true(name, tol):
    """Residuals are the true ones, and an eigenvalue is within the error; converged or not."""
    spectrum, dtype = NASTY[name]
    A = symmetric(spectrum, dtype)
    values = np.linalg.eigvalsh(A.double().numpy())
    rounding, numpy_rounds = (
        30 * torch.finfo(d).eps * abs(values).max() for d in (dtype, A.double().dtype)
    )
    for which, k in ((which, k) for which in WHICH for k in (1, 4, 7)):
        E = eigsh(A, k, which=which, tol=tol)
        X, found = E.eigenvectors.double(), E.eigenvalues
        true = torch.linalg.vector_norm(A.double() @ X - X * found, dim=0)
        assert (true <= 1.1 * E.residuals + rounding).all()
        assert (E.residuals <= 1.1 * true + 10 * rounding).all()
        nearest = np.abs(found.numpy()[:, None] - values).min(1)
        assert (nearest <= E.errors.numpy() + numpy_rounds).all()
        assert (E.errors[E.converged] <= tol * found[E.converged].abs()).all()
        if E.converged.all():
            truth, found = torch.from_numpy(exact(A, which, k).copy()), found
            if which == "LM":  # 2 and -2 are equally wanted
                truth, found = truth.abs(), found.abs()
            missing = (truth[:, None] - found).abs() > 1.01 * tol * truth.abs()[:, None]
            assert not missing.all(1).any()
            if tol < 1e-6:  # copies, too
                torch.testing.assert_close(found, truth, rtol=tol, atol=0)


@pytest.mark.parametrize("ncv", [9, 20])
def test_what_many_restarts_round_is_stated(ncv):
    """The upper end has converged long before, to all digits; the lower never does."""
    A = symmetric(-(0.78 ** np.arange(60)))
    E = eigsh(A, 4, which="BE", tol=1e-13, ncv=ncv, maxiter=1000)
    assert E.matvecs == 1000
    X = E.eigenvectors
    true = torch.linalg.vector_norm(A @ X - X * E.eigenvalues, dim=0)
    assert (true <= E.residuals * 1.001).all()
    assert (E.residuals[-1] <= 1e-12).all()


def test_restarts_drop_nothing_that_others_are_coupled_to():
    """Where copies are searched for in a basis that hardly holds what was locked."""
    for seed in (7, 8):
        A = symmetric(np.repeat(np.random.default_rng(seed).standard_normal(15), 4))
        E = eigsh(A, 8, which="SA", tol=1e-7, ncv=17, seed=seed)
        X = E.eigenvectors
        true = torch.linalg.vector_norm(A @ X - X * E.eigenvalues, dim=0)
        assert (true <= 1.1 * E.residuals + 1e-12).all()


def test_restarts_do_not_forget_what_converges_slowly():
    """A narrow end opposite to large eigenvalues, where ARPACK makes 311 products."""
    spectrum = np.r_[np.linspace(10, 60, 7), -0.5, -1.0, -2.0, RANDOM.uniform(0, 0.3, 230)]
    E = eigsh(symmetric(spectrum), 4, which="SA")
    assert E.converged.all()
    np.testing.assert_allclose(E.eigenvalues, np.sort(spectrum)[:4], rtol=1e-3)
    assert E.matvecs < 350


@pytest.mark.parametrize("which", WHICH)
def test_tight_clusters_come_to_an_end(which):
    """Of eigenvalues a tolerance apart, which are searched for copies."""
    for seed in range(3):
        noise = np.random.default_rng(seed).standard_normal(120)
        spectrum = np.repeat([9.0, 4.0, -1.0, -6.0], 30) * (1 + 1e-7 * noise)
        E = eigsh(symmetric(spectrum), 3, which=which, tol=1e-7, seed=seed)
        assert E.converged.all()
        assert E.matvecs < 400
        truth = exact(symmetric(spectrum), which, 3)
        np.testing.assert_allclose(E.eigenvalues, truth, rtol=1e-7, atol=0)


@pytest.mark.parametrize("width", [1e-6, 1e-7, 1e-8])
def test_clusters_at_both_ends_are_not_waited_for_in_turn(width):
    """More eigenvalues in each than the basis has vectors."""
    for seed in range(3):
        noise = np.random.default_rng(seed).standard_normal(200)
        A = symmetric(np.repeat([9.0, 2.0, 0.5, -1.5], 50) * (1 + width * noise))
        E = eigsh(A, 4, which="BE", tol=1e-7, seed=seed)
        assert E.converged.all()
        assert E.matvecs < 400
        np.testing.assert_allclose(E.eigenvalues, exact(A, "BE", 4), rtol=1.01e-7, atol=0)


def test_a_dominant_eigenvalue_hides_no_other():
    """In float32, four of about 3 beside one of 8e6 are found, but not vouched for."""
    A = symmetric(NASTY["dominant"][0], torch.float32)
    truth = np.linalg.eigvalsh(A.double().numpy())[::-1][:5]
    E = eigsh(A, 5)
    assert E.converged.tolist() == [True, False, False, False, False]
    np.testing.assert_allclose(E.eigenvalues, truth, rtol=0.1)
    assert (np.abs(E.eigenvalues.numpy() - truth) <= E.errors.numpy()).all()
    assert E.matvecs <= 21


def test_hardly_any_eigenvalue_is_overlooked():
    """Of dense spectra, whose eigenvalues at an end are found one after another."""
    missed = 0
    for seed in range(120):
        P = (40, 120)[seed % 2]
        a = np.random.default_rng(seed).standard_normal((P, P))
        A = torch.from_numpy(a + a.T)
        found, truth = eigsh(A, 4, which="SA", seed=seed).eigenvalues, exact(A, "SA", 4)
        missed += not np.allclose(found, truth, rtol=1e-3, atol=0)
    assert missed <= 1


def test_of_a_matrix_that_fits_into_the_basis_none_is_overlooked():
    """Not even where a random start has hardly a part in its eigenvector."""
    starts, random = [], np.random.default_rng(0)

    class Recorder:
        shape, dtype, device = (20, 20), torch.float64, torch.device("cpu")

        def __matmul__(self, vector):
            starts.append(vector.numpy().copy())
            return vector

    eigsh(Recorder(), 1)
    start, other = starts[0], random.standard_normal(20)
    overlooked = other - (start @ other) * start + 1e-5 * np.linalg.norm(other) * start
    Q, _ = np.linalg.qr(np.c_[overlooked, random.standard_normal((20, 19))])
    values = np.r_[-1.0, -0.9, np.linspace(-0.5, 1, 18)]
    A = torch.from_numpy((Q * values) @ Q.T)
    np.testing.assert_allclose(eigsh((A + A.T) / 2, 1, which="SA").eigenvalues, [-1], rtol=1e-3)


def test_what_is_orthogonal_to_the_start_is_found():
    """Eigenvectors of other eigenvalues as the start, exactly."""
    for seed in range(10):
        a = np.random.default_rng(seed).standard_normal((60, 60))
        A = torch.from_numpy(a + a.T)
        values, vectors = torch.linalg.eigh(A)
        lowest = eigsh(A, 3, which="LA", v0=vectors[:, :3], seed=seed)
        torch.testing.assert_close(lowest.eigenvalues, values.flip(0)[:3], rtol=1e-3, atol=0)
        order = values.abs().argsort(descending=True)
        others = eigsh(A, 5, v0=vectors[:, order[1:6]], seed=seed)
        torch.testing.assert_close(
            others.eigenvalues.abs(), values[order[:5]].abs(), rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("maxiter", range(3, 60))
def test_stops_anywhere_with_true_residuals(maxiter):
    """Also where what has converged would have been locked."""
    A = symmetric(np.repeat(np.r_[3.0, 2.0, -1.0, 0.5], 4))
    E = eigsh(A, 3, tol=1e-8, maxiter=maxiter)
    X = E.eigenvectors
    true = torch.linalg.vector_norm(A @ X - X * E.eigenvalues, dim=0)
    torch.testing.assert_close(E.residuals, true, rtol=0.1, atol=1e-12)


def test_a_dominant_eigenvalue_that_a_restart_dropped_is_no_asymmetry():
    for seed in range(20):
        spectrum = np.r_[8e6, np.random.default_rng(seed).uniform(0, 3, 30)]
        E = eigsh(symmetric(spectrum, torch.float32), 3, which="SA", ncv=8, tol=0.01, seed=seed)
        assert not E.converged.any()


class Same:
    """The identity, which returns its operand itself."""

    shape, dtype, device = (20, 20), torch.float64, torch.device("cpu")

    def __matmul__(self, v):
        return v


def test_products_are_left_as_they_are():
    E = eigsh(Same(), 2)
    torch.testing.assert_close(E.eigenvalues, torch.ones(2).double())
    torch.testing.assert_close(E.eigenvectors.T @ E.eigenvectors, torch.eye(2).double())


def test_opposite_values_in_single_precision_end():
    E = eigsh(symmetric(np.r_[3, -3, RANDOM.uniform(-1, 1, 60)], torch.float32), 2, tol=1e-7)
    np.testing.assert_allclose(E.eigenvalues.abs(), 3, rtol=1e-5)
    assert not E.converged.any()  # 1e-7 is less than one machine epsilon
    assert E.matvecs < 100


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=30),
    st.sampled_from(WHICH),
    st.integers(0, 29),
    st.integers(0, 5),
)
def test_agrees_with_numpy_on_any_spectrum(eigenvalues, which, k, seed):
    A = symmetric(eigenvalues)
    k = 1 + k % len(eigenvalues)
    E = eigsh(A, k, which=which, tol=1e-10, seed=seed)
    found, truth = E.eigenvalues.numpy(), exact(A, which, k)
    if which == "LM":
        found, truth = np.abs(found), np.abs(truth)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-9 * max(np.abs(eigenvalues)) + 1e-300)


def test_restarts_keep_memory_bounded():
    A = symmetric(np.linspace(0, 1, 400))
    E = eigsh(A, 3, which="LA", tol=1e-10, ncv=12, maxiter=2000)
    assert E.converged.all()
    assert E.matvecs > 12
    np.testing.assert_allclose(E.eigenvalues, exact(A, "LA", 3), atol=1e-9)


def test_says_what_has_not_converged():
    E = eigsh(symmetric(np.linspace(0, 1, 400)), 3, tol=1e-10, maxiter=10)
    assert E.matvecs == 10
    assert not E.converged.any()
    assert (E.residuals > 1e-10).all()


def test_warm_start():
    A = symmetric(np.r_[10.0, 8.0, 6.0, -9.0, RANDOM.uniform(-1, 1, 200)])
    cold = eigsh(A, 4, tol=1e-5)
    subspace = cold.eigenvectors + 1e-3 * torch.randn_like(cold.eigenvectors)
    warm = eigsh(A, 4, tol=1e-5, v0=subspace)
    assert warm.matvecs < cold.matvecs
    torch.testing.assert_close(warm.eigenvalues, cold.eigenvalues, rtol=1e-5, atol=0)
    # From an exact eigenvector the space is invariant at once, and the rest still found.
    exact_start = eigsh(A, 4, tol=1e-5, v0=torch.linalg.eigh(A).eigenvectors[:, 17])
    torch.testing.assert_close(exact_start.eigenvalues, cold.eigenvalues, rtol=1e-5, atol=0)


def test_start_vector_is_not_changed():
    v0 = torch.ones(120, dtype=torch.float64)
    eigsh(symmetric(SPECTRA["random"]), 2, v0=v0)
    assert torch.equal(v0, torch.ones_like(v0))


@pytest.mark.parametrize(("name", "tol"), [("random", 1e-3), ("repeated", 1e-9)])
def test_goes_on_after_every_product_as_if_nothing_had_happened(name, tol, monkeypatch):
    """Through restarts and through searches for further copies of an eigenvalue."""
    monkeypatch.setattr(saving, "SAVE_EVERY", 0.0)
    A, states = symmetric(SPECTRA[name]), []
    how = dict(k=5, which="BE", tol=tol, ncv=12, v0=torch.ones(len(A), dtype=A.dtype), seed=3)
    whole = eigsh(A, **how, save=lambda state: states.append(copy.deepcopy(state)))
    assert len(states) == whole.matvecs - 1 > 20
    for state in states:
        again = eigsh(A, **how, resume=state)
        assert again.matvecs == whole.matvecs
        assert torch.equal(again.eigenvalues, whole.eigenvalues)
        assert torch.equal(again.eigenvectors, whole.eigenvectors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_left_of_the_first_product(dtype):
    E = eigsh(3 * torch.eye(50, dtype=dtype), 2)
    np.testing.assert_allclose(E.eigenvalues, 3, rtol=1e-6)
    assert E.converged.all()


def test_same_seed_same_numbers():
    A = symmetric(SPECTRA["random"])
    first, again, other = (eigsh(A, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.eigenvalues, again.eigenvalues)
    assert not torch.equal(first.eigenvalues, other.eigenvalues)


class Operator:
    """Products of a matrix, spoiled by a function of the number of the product."""

    def __init__(self, A, spoil):
        self.A, self.spoil, self.count = A, spoil, 0
        self.shape, self.dtype, self.device = A.shape, A.dtype, A.device

    def __matmul__(self, v):
        self.count += 1
        return self.spoil(self.A @ v, self.count)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("first", [1, 7])
def test_not_a_number_is_reported_as_such(bad, first):
    A = Operator(symmetric(SPECTRA["random"]), lambda w, count: w if count < first else w * bad)
    E = eigsh(A, 3)
    assert E.eigenvalues.isnan().all()
    assert E.eigenvectors.isnan().all()
    assert E.residuals.isnan().all()
    assert not E.converged.any()
    assert E.matvecs == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refuses_what_is_not_symmetric(dtype):
    skew = torch.randn(120, 120, dtype=torch.float64)
    A = symmetric(SPECTRA["random"]) + 0.01 * (skew - skew.T)
    with pytest.raises(InputError, match="A: not symmetric"):
        eigsh(A.to(dtype), 3)
    noisy = Operator(
        symmetric(SPECTRA["random"], dtype), lambda w, _: w + 0.01 * torch.randn_like(w)
    )
    with pytest.raises(InputError, match="A: not symmetric"):
        eigsh(noisy, 3)


def test_bad_input_is_named():
    A = symmetric(SPECTRA["tiny"])
    for k in (0, 4):
        with pytest.raises(InputError, match=f"k: {k}, expected 1 to 3"):
            eigsh(A, k)
    with pytest.raises(InputError, match="which: 'SM', expected one of LM, LA, SA, BE"):
        eigsh(A, 1, which="SM")
    with pytest.raises(InputError, match=r"A: shape \(3, 2\), expected \(P, P\)"):
        eigsh(A[:, :2], 1)
    with pytest.raises(InputError, match="ncv: 2, expected 3 to 3 for k = 2 of 3 eigenvalues"):
        eigsh(A, 2, ncv=2)
    with pytest.raises(InputError, match=r"v0: shape \(4,\), expected \(3,\) or \(3, m\)"):
        eigsh(A, 1, v0=torch.ones(4))
    with pytest.raises(InputError, match="v0: it sums to zero"):
        eigsh(A, 1, v0=torch.zeros(3))
    with pytest.raises(InputError, match="maxiter: 1, expected at least k = 2 products"):
        eigsh(A, 2, maxiter=1)
    with pytest.raises(InputError, match="resume: no basis found, expected it"):
        eigsh(A, 1, resume={"coupling": np.zeros(2)})
