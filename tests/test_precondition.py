"""Curvature as optimizers see it, against their own steps."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop

from lossgeometry import Hessian, InputError, Preconditioned, eigsh, stability_threshold
from tests.dense import assert_same, dense, flat, identity

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "adam": lambda p: Adam(p, lr=1e-2, betas=(0.8, 0.95), eps=1e-3),
    "amsgrad": lambda p: Adam(p, lr=1e-2, betas=(0.8, 0.5), amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=1e-2, alpha=0.9, eps=1e-4),
    "centered": lambda p: RMSprop(p, lr=1e-2, alpha=0.9, centered=True),
}


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data():
    return torch.randn(9, 3, dtype=torch.float64), torch.randint(2, (9,))


def train(model, optimizer, batch, steps=4):
    """Returns what the last step added to the weights, weight decay aside."""
    x, y = batch
    for i in range(steps):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) / (i + 1)).backward()  # gradients that shrink, for amsgrad
        before = flat(p.detach().clone() for p in model.parameters())
        optimizer.step()
    decay = optimizer.defaults["lr"] * optimizer.defaults.get("weight_decay", 0) * before
    return flat(p.detach() for p in model.parameters()) - before + decay


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_what_the_step_divides_by(name):
    model, batch = network(), data()
    optimizer = OPTIMIZERS[name](model.parameters())
    change = train(model, optimizer, batch)
    states = [optimizer.state[p] for p in model.parameters()]
    driving = flat(
        s.get("exp_avg", p.grad) for s, p in zip(states, model.parameters(), strict=True)
    )
    P = -optimizer.defaults["lr"] * driving / change
    H = dense("hessian", model, F.cross_entropy, *batch)
    A = Preconditioned(Hessian(model, F.cross_entropy, batch), optimizer)
    expected = H / (P[:, None] * P).sqrt()
    assert_same(A @ identity(A), expected, 1e-7)  # the change of the weights is rounded
    v = torch.randn(A.shape[0], dtype=torch.float64)
    assert_same(A @ v, expected @ v, 1e-7)
    found = eigsh(A, k=2, which="LA", tol=1e-8).eigenvalues
    assert_same(found, torch.linalg.eigvalsh(expected).flip(0)[:2], 1e-6)


def test_what_is_not_moved_has_zeros():
    model, batch = network(), data()
    optimizer = Adam(model[2].parameters())
    train(model, optimizer, batch, 1)
    H = Hessian(model, F.cross_entropy, batch)
    others = sum(p.numel() for p in model[0].parameters())
    matrix = Preconditioned(H, optimizer) @ identity(H)
    assert not matrix[:others].any()
    assert not matrix[:, :others].any()
    assert matrix[others:, others:].diagonal().all()


@pytest.mark.parametrize(
    ("make", "threshold"),
    [
        (lambda p: SGD(p, lr=0.1), 20.0),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), 38.0),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5), 76.0),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), 20 * 1.9 / 2.8),
        (lambda p: Adam(p, lr=0.1, betas=(0.9, 1 - 1e-15)), 380.0),
        (lambda p: AdamW(p, lr=0.1, betas=(0.5, 1 - 1e-15), weight_decay=0.0), 60.0),
        (lambda p: RMSprop(p, lr=0.1, alpha=1 - 1e-15), 20.0),
        (lambda p: RMSprop(p, lr=0.1, alpha=1 - 1e-15, momentum=0.9), 38.0),
    ],
)
def test_steps_diverge_beyond_the_threshold(make, threshold):
    """On a parabola, with a preconditioner that does not change any more."""
    for factor, stable in ((0.99, True), (1.01, False)):
        x = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = make([x])
        assert stability_threshold(optimizer) == pytest.approx(threshold)
        x.grad = torch.ones_like(x)
        optimizer.step()
        for name, value in {"step": 1e17, "exp_avg_sq": 9.0, "square_avg": 9.0}.items():
            if name in optimizer.state[x]:
                optimizer.state[x][name].fill_(value)
        P = 1.0 if isinstance(optimizer, SGD) else 3.0
        reached = []
        for _ in range(3000):
            x.grad = factor * threshold * P * x.detach()
            optimizer.step()
            reached.append(abs(x.item()))
        assert reached[-1] < 0.1 if stable else max(reached) > 100


@pytest.mark.parametrize("shape", [(3,), (31, 1, 1), ()])
def test_vectors_have_as_many_entries_as_there_are_parameters(shape):
    model = nn.Linear(4, 2)
    H = Hessian(model, F.mse_loss, (torch.randn(3, 4), torch.randn(3, 2)))
    for A in (H, Preconditioned(H, SGD(model.parameters(), lr=0.1))):
        with pytest.raises(InputError, match=rf"{type(A).__name__} @ v: v of shape .*\(10,\)"):
            A @ torch.ones(shape)


def test_groups_that_differ_have_no_one_threshold():
    first, second = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    groups = [{"params": [first]}, {"params": [second], "lr": 0.2}]
    assert math.isnan(stability_threshold(SGD(groups, lr=0.1)))
    assert stability_threshold(SGD([first], lr=0.0)) == math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (NAdam, "a NAdam, expected SGD, Adam, AdamW or RMSprop"),
        (lambda p: SGD(p, lr=0.1, maximize=True), "it maximises"),
        (Adam, "after its first step"),
    ],
)
def test_says_what_it_cannot_use(make, message):
    model = network()
    with pytest.raises(InputError, match=message):
        Preconditioned(Hessian(model, F.cross_entropy, data()), make(model.parameters()))
