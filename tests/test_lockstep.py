"""Hessians of several mini-batches at once, against one at a time and against dense matrices."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lossgeometry import Hessian, eigsh, max_eigenvalue_spectrum
from lossgeometry.algorithms.lockstep import HessianStack, eigsh_lockstep, stackable, vmappable
from lossgeometry.errors import InputError
from tests.dense import CLASSES, MODELS, ResidualNetwork, csan


def mini_batches(n=3, size=4):
    x = torch.randn(n, size, 1, 4, 4, dtype=torch.float64)
    return list(zip(x, torch.randint(0, CLASSES, (n, size)), strict=True))


@pytest.mark.parametrize("name", ["csan-clamp-1", "csan-mask-3", "csan-zero-3", "resnet", "vit"])
@pytest.mark.parametrize("params", [None, r"head|conv"])
def test_every_row_is_the_product_with_its_own_hessian(name, params):
    model = MODELS[name]().double()
    batches = mini_batches()
    stack = HessianStack(model, F.cross_entropy, batches, params=params, weight_decay=0.3)
    V = torch.randn(len(batches), stack.shape[0], dtype=torch.float64)
    found = stack.products(V)
    for v, row, batch in zip(V, found, batches, strict=True):
        H = Hessian(model, F.cross_entropy, batch, params=params, weight_decay=0.3)
        torch.testing.assert_close(row, H @ v, rtol=1e-10, atol=1e-12)


def test_eigenpairs_are_those_of_one_mini_batch_at_a_time():
    """Solves of different lengths, from different starts."""
    model = MODELS["csan-clamp-1"]().double()
    batches = mini_batches(4)
    stack = HessianStack(model, F.cross_entropy, batches)
    starts = [None, torch.ones(stack.shape[0]), None, torch.randn(stack.shape[0], 2)]
    found = eigsh_lockstep(stack, 3, starts, range(4), tol=1e-8)
    for i, (E, batch) in enumerate(zip(found, batches, strict=True)):
        H = Hessian(model, F.cross_entropy, batch)
        alone = eigsh(H, 3, v0=starts[i], seed=i, tol=1e-8)
        assert E.converged.all()
        torch.testing.assert_close(E.eigenvalues, alone.eigenvalues, rtol=1e-9, atol=0)
        X = E.eigenvectors
        assert (H @ X - X * E.eigenvalues).norm() <= 1e-4 * E.eigenvalues.abs().max()


def dropout():
    tanh = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Dropout(0.5))
    return tanh.append(nn.Linear(8, CLASSES))


@pytest.mark.parametrize("make", [dropout, lambda: csan(stochastic_depth=0.5, blocks=2)])
def test_what_is_random_is_frozen_and_different_for_each_mini_batch(make):
    model = make().double()
    (batch,) = mini_batches(1)
    before = torch.get_rng_state()
    stack, again, other = (
        HessianStack(model, F.cross_entropy, [batch, batch], seed=seed) for seed in (0, 0, 1)
    )
    v = torch.randn(stack.shape[0], dtype=torch.float64).expand(2, -1)
    torch.set_rng_state(before)
    one, two = stack.products(v)
    assert torch.equal(stack.products(v), torch.stack([one, two]))
    assert torch.equal(again.products(v), torch.stack([one, two]))
    assert (one - two).norm() > 0.1 * one.norm()
    assert (other.products(v)[0] - one).norm() > 0.1 * one.norm()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_cannot_be_stacked_is_solved_one_by_one():
    class InPlace(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * torch.empty(1, dtype=x.dtype).bernoulli_(0.5)

    data = mini_batches()
    model = InPlace(nn.Flatten(), nn.Linear(16, CLASSES)).double()
    assert vmappable(model[1], F.cross_entropy, (torch.ones(2, 16).double(), data[0][1][:2]))
    assert not vmappable(model, F.cross_entropy, data[0])
    one, three = (
        max_eigenvalue_spectrum(model, F.cross_entropy, data, k=2, together=n) for n in (1, 3)
    )
    assert three.batches_at_a_time == 1
    assert torch.equal(one.eigenvalues, three.eigenvalues)


def test_no_more_at_once_than_memory_holds():
    model, data = MODELS["csan-clamp-1"]().double(), mini_batches(5)
    H = Hessian(model, F.cross_entropy, data[0])
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    vectors = 20 + 1 + 1  # of the basis, and the parameters
    one = 2 * H.kept_bytes() + vectors * 8 * H.shape[0]
    for memory, expected in ((100, 4), (2.5, 2), (0.5, 1)):
        found = max_eigenvalue_spectrum(
            model, F.cross_entropy, data, 2, together=4, memory=int(memory * one)
        )
        assert found.batches_at_a_time == expected


def test_the_model_stays_as_it_was():
    model = MODELS["resnet"]().double()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    stack = HessianStack(model, F.cross_entropy, mini_batches())
    stack.products(torch.randn(3, stack.shape[0], dtype=torch.float64))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_what_can_be_stacked():
    same, other = mini_batches(2), mini_batches(1, size=3)
    assert stackable(ResidualNetwork().eval(), same)
    assert not stackable(ResidualNetwork().eval(), same + other)
    assert not stackable(ResidualNetwork().train(), same)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (lambda product, v: product + v.roll(1, dims=1), "asymmetric by"),
        (lambda product, v: product + v, "off those of one"),
    ],
)
def test_wrong_products_of_several_mini_batches_are_refused(mistake, said, monkeypatch):
    model = MODELS["conv"]().double()
    batches = mini_batches()
    right = HessianStack.products

    def wrong(self, vectors):
        return mistake(right(self, vectors), vectors)

    assert vmappable(model, F.cross_entropy, batches[0])
    monkeypatch.setattr(HessianStack, "products", wrong)
    with pytest.raises(InputError, match=f"together: .* at once are .*{said}"):
        max_eigenvalue_spectrum(model, F.cross_entropy, batches, 2, together=3)
