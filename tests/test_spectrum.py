"""Max eigenvalue spectra against dense Hessians, and the protocol of PyHessian."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lossgeometry import Hessian, max_eigenvalue_spectrum
from lossgeometry.algorithms import spectrum
from lossgeometry.errors import InputError
from lossgeometry.running import saving


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)
    )


def batches(n=6, size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size + i % 2, 6, generator=generator).to(dtype),
            torch.randint(0, 3, (size + i % 2,), generator=generator),
        )
        for i in range(n)
    ]


def exact(model, batch, k, weight_decay):
    H = Hessian(model, F.cross_entropy, batch, weight_decay=weight_decay)
    values = torch.linalg.eigvalsh(H @ torch.eye(H.shape[0], dtype=H.dtype)).double()
    return values[values.abs().argsort(descending=True, stable=True)[:k]]


def test_eigenvalues_of_every_batch():
    model = network().double()
    data = batches(dtype=torch.float64)
    S = max_eigenvalue_spectrum(model, F.cross_entropy, data, k=4, weight_decay=0.02, tol=1e-10)
    truth = torch.stack([exact(model, batch, 4, 0.02) for batch in data])
    torch.testing.assert_close(S.eigenvalues, truth, rtol=1e-9, atol=0)
    assert S.converged.all()
    assert (S.residuals <= 1e-6 * S.eigenvalues.abs()).all()
    assert S.matvecs.shape == (6,)


def test_default_tolerance_holds():
    model, data = network(), batches(20)
    S = max_eigenvalue_spectrum(model, F.cross_entropy, data, k=3)
    truth = torch.stack([exact(model, batch, 3, 0.0) for batch in data])
    torch.testing.assert_close(S.eigenvalues, truth, rtol=1e-3, atol=0)


def test_statistics_and_their_standard_errors():
    model, data = network(), batches(40)
    S = max_eigenvalue_spectrum(model, F.cross_entropy, data)
    values = S.eigenvalues.numpy()
    assert S.nep == pytest.approx((values < 0).mean())
    assert S.ape == pytest.approx(values[values > 0].mean())
    shares = (values < 0).mean(1)
    assert S.nep_standard_error == pytest.approx(shares.std(ddof=1) / 40**0.5)
    # A jackknife over mini-batches agrees with the delta method to first order.
    left_out = []
    for i in range(40):
        rest = np.delete(values, i, axis=0)
        left_out.append(rest[rest > 0].mean())
    jackknife = np.sqrt(39 / 40 * np.sum((left_out - np.mean(left_out)) ** 2))
    assert S.ape_standard_error == pytest.approx(jackknife, rel=0.1)


def test_without_positive_eigenvalues_there_is_no_average():
    model = nn.Linear(6, 1).double()
    x, y = torch.randn(8, 6).double(), torch.zeros(8)
    S = max_eigenvalue_spectrum(model, lambda z, y: -z.square().mean(), (x, y), k=3)
    assert S.nep == 1
    assert np.isnan(S.ape)
    assert np.isnan(S.nep_standard_error)  # of a single mini-batch


def test_a_batch_that_is_not_finite_does_not_disappear():
    model, data = network(), batches(4)
    data[1] = (data[1][0] * torch.nan, data[1][1])
    S = max_eigenvalue_spectrum(model, F.cross_entropy, data, k=2)
    assert S.eigenvalues[1].isnan().all()
    assert not S.converged[1].any()
    assert S.eigenvalues[[0, 2, 3]].isfinite().all()
    assert np.isnan([S.nep, S.ape, S.nep_standard_error, S.ape_standard_error]).all()


def test_dropout_is_frozen_for_each_batch_and_seeded():
    model, data = network(dropout=0.5), batches(3)
    first, again, other = (
        max_eigenvalue_spectrum(model, F.cross_entropy, data, k=2, seed=seed) for seed in (0, 0, 1)
    )
    assert first.converged.all()
    assert torch.equal(first.eigenvalues, again.eigenvalues)
    assert not torch.allclose(first.eigenvalues, other.eigenvalues, rtol=0.01)


def test_one_batch_does_not_depend_on_the_others():
    model, data = network(), batches(3)
    all_of_them = max_eigenvalue_spectrum(model, F.cross_entropy, data, k=2, tol=1e-5)
    two = max_eigenvalue_spectrum(model, F.cross_entropy, data[:2], k=2, tol=1e-5)
    assert torch.equal(all_of_them.eigenvalues[:2], two.eigenvalues)


def test_protocol_of_pyhessian():
    model, data = network(dropout=0.5), batches(2)
    S = max_eigenvalue_spectrum(
        model, F.cross_entropy, data, k=2, weight_decay=0.05, tol=1e-7, solver="pyhessian"
    )
    evaluated = copy.deepcopy(model).eval()  # which PyHessian insists on
    truth = torch.stack([exact(evaluated, batch, 2, 0.05) for batch in data])
    torch.testing.assert_close(S.eigenvalues, truth, rtol=1e-2, atol=0)
    for row, batch in enumerate(data):
        H = Hessian(evaluated, F.cross_entropy, batch, weight_decay=0.05)
        values = torch.linalg.eigvalsh(H @ torch.eye(H.shape[0]))
        distances = (S.eigenvalues[row, :, None] - values).abs().min(1).values
        assert (distances <= S.residuals[row] + 1e-5).all()
    ours = max_eigenvalue_spectrum(evaluated, F.cross_entropy, data, k=2, weight_decay=0.05)
    assert (S.matvecs > 2 * ours.matvecs).all()


def test_pyhessian_on_a_subset_of_parameters():
    model, data = network(), batches(1)
    options = {"k": 1, "params": "5", "tol": 1e-6}
    theirs = max_eigenvalue_spectrum(model, F.cross_entropy, data, solver="pyhessian", **options)
    ours = max_eigenvalue_spectrum(model, F.cross_entropy, data, **options)
    torch.testing.assert_close(theirs.eigenvalues, ours.eigenvalues, rtol=1e-4, atol=0)


@pytest.mark.parametrize("solver", ["lanczos", "pyhessian"])
def test_leaves_the_model_and_the_random_state_alone(solver):
    model, data = network(dropout=0.5), batches(2)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[3].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()

    def failing(outputs, targets):
        if len(targets) == 9:  # the second batch
            raise ArithmeticError
        return F.cross_entropy(outputs, targets)

    max_eigenvalue_spectrum(model, F.cross_entropy, data, k=1, solver=solver)
    with pytest.raises(ArithmeticError):
        max_eigenvalue_spectrum(model, failing, data, k=1, solver=solver)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None
    assert not model[3].bias.requires_grad
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="solver: 'power', expected one of lanczos, pyhessian"):
        max_eigenvalue_spectrum(network(), F.cross_entropy, batches(1), solver="power")
    with pytest.raises(InputError, match="data: no batches"):
        max_eigenvalue_spectrum(network(), F.cross_entropy, [])
    with pytest.raises(InputError, match="k: 0, expected 1 to"):
        max_eigenvalue_spectrum(network(), F.cross_entropy, batches(1), k=0)
    with pytest.raises(InputError, match="k: -1, expected 1 to"):
        max_eigenvalue_spectrum(network(), F.cross_entropy, batches(1), k=-1)
    with pytest.raises(InputError, match="model: it has no parameters"):
        max_eigenvalue_spectrum(nn.ReLU(), F.cross_entropy, batches(1))
    with pytest.raises(InputError, match="model: a function"):
        max_eigenvalue_spectrum(lambda x: x, F.cross_entropy, batches(1))


def test_several_mini_batches_at_a_time_have_the_same_eigenvalues():
    model = network().double()
    data = batches(8, dtype=torch.float64)  # of two shapes, which cannot be stacked
    data = data[::2] + data[1:4]
    one = max_eigenvalue_spectrum(model, F.cross_entropy, data, k=3, tol=1e-9)
    three = max_eigenvalue_spectrum(model, F.cross_entropy, data, k=3, tol=1e-9, together=3)
    assert (one.batches_at_a_time, three.batches_at_a_time) == (1, 3)
    torch.testing.assert_close(three.eigenvalues, one.eigenvalues, rtol=1e-8, atol=0)
    with pytest.raises(InputError, match="together: 0, expected at least 1"):
        max_eigenvalue_spectrum(model, F.cross_entropy, data, together=0)


@pytest.mark.parametrize("together", [1, 2])
def test_interrupted_and_resumed_it_is_the_same_to_the_last_bit(monkeypatch, together):
    model, data = network(dropout=0.5), batches(6, size=9)[::2] * 2
    options = {"k": 3, "together": together}
    whole = max_eigenvalue_spectrum(model, F.cross_entropy, data, **options)
    saved, solved = [], []

    def counted(solve, most):
        def solve_counted(H, k, *arguments, **options):
            solved.extend(arguments[0] if arguments else [None])
            if len(solved) > most:
                raise KeyboardInterrupt
            return solve(H, k, *arguments, **options)

        return solve_counted

    solvers = {name: getattr(spectrum, name) for name in ("eigsh", "eigsh_lockstep")}
    for name, solve in solvers.items():
        monkeypatch.setattr(spectrum, name, counted(solve, most=4))
    with pytest.raises(KeyboardInterrupt):
        max_eigenvalue_spectrum(model, F.cross_entropy, data, save=saved.append, **options)
    (arrays,) = saved
    done = 1 + 3 // together * together  # the first, and whole groups
    assert arrays["done"].tolist() == [True] * done + [False] * (6 - done)
    solved.clear()
    for name, solve in solvers.items():
        monkeypatch.setattr(spectrum, name, counted(solve, most=6))
    resumed = max_eigenvalue_spectrum(model, F.cross_entropy, data, resume=arrays, **options)
    assert len(solved) == 1 + 6 - done  # the first is where the others start from
    for column in ("eigenvalues", "residuals", "errors", "converged", "matvecs"):
        assert torch.equal(getattr(resumed, column), getattr(whole, column))


def test_saved_now_and_then(monkeypatch):
    monkeypatch.setattr(saving, "SAVE_EVERY", 0.0)
    counts = []
    max_eigenvalue_spectrum(
        network(), F.cross_entropy, batches(4), k=2, save=lambda a: counts.append(a["done"].sum())
    )
    assert counts == [1, 2, 3, 4]


def test_batches_of_other_kinds():
    model = network().double()
    data = [{"x": x, "y": y.where(y > 0, -100)} for x, y in batches(3, dtype=torch.float64)]
    S = max_eigenvalue_spectrum(
        *(model, lambda z, batch: F.cross_entropy(z, batch["y"]), data),
        k=2,
        tol=1e-10,
        together=2,
        forward=lambda model, batch: model(batch["x"]),
        count=lambda batch: (batch["y"] >= 0).sum(),
    )
    truth = [exact(model, (b["x"][b["y"] > 0], b["y"][b["y"] > 0]), 2, 0.0) for b in data]
    torch.testing.assert_close(S.eigenvalues, torch.stack(truth), rtol=1e-9, atol=0)
    with pytest.raises(InputError, match="solver: pyhessian found, expected lanczos"):
        max_eigenvalue_spectrum(model, None, data, solver="pyhessian")
