"""How losses come out of examples: means, sums and others, with any batches and memory."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lossgeometry import GGN, Fisher, Hessian, eigsh, line, random_directions, surface
from tests.dense import (
    CLASSES,
    ResidualNetwork,
    assert_right,
    assert_same,
    dense_hessian,
    identity,
    make,
)


class Judging(nn.Linear):
    def __init__(self):
        super().__init__(3, CLASSES)

    def forward(self, x, labels):
        scores = super().forward(x)
        return {"scores": scores, "loss": F.cross_entropy(scores, labels, ignore_index=1)}


def contrast(outputs, _):
    z = F.normalize(outputs, dim=1)
    return F.cross_entropy(z @ z.T / 0.2, torch.arange(len(z)).roll(1))


WEIGHTS = torch.tensor([1.0, 50.0, 2.0], dtype=torch.float64)


MEANS = {
    "mean": F.cross_entropy,
    "weighted": nn.CrossEntropyLoss(WEIGHTS),
    "ignoring": nn.CrossEntropyLoss(ignore_index=1),
    "contrast": contrast,
}


SUMS = {
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted sum": nn.CrossEntropyLoss(WEIGHTS, reduction="sum"),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", [[70], [40, 30], [1, 9, 60], [1, 1]])
@pytest.mark.parametrize("name", [*MEANS, *SUMS])
def test_means_sums_and_other_losses(name, sizes, training):
    """Of the others, and of means, each batch counts by its examples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, CLASSES)).double()
    n, loss = sum(sizes), (MEANS | SUMS)[name]
    x, y = torch.randn(n, 4).double(), torch.arange(n) % CLASSES
    if name == "ignoring" and min(sizes) == 1:
        y = y * 2 % CLASSES  # none of those that are alone is ignored
        y[[0, -1]] = 2
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    share = [1.0 if name in SUMS else size / n for size in sizes]

    def value():
        return sum(a * loss(model(b), t) for a, (b, t) in zip(share, batches, strict=True))

    assert_right(model.train(training), loss, batches, value)


def test_a_sum_is_said_to_be_one_and_another_metric_is_a_mean_all_the_same():
    model, x = nn.Linear(4, 3), torch.randn(50, 4)
    y = torch.arange(50) % 3
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    metrics = {"mean": F.cross_entropy, "sum": nn.CrossEntropyLoss(reduction="sum")}
    found = line(model, metrics, batches, random_directions(model, 1, seed=0)[0], [0.0, 1.0])
    np.testing.assert_allclose(found["sum"], 50 * found["mean"], rtol=1e-5)
    assert found.settings["sums"] == "sum"
    assert "sums" not in line(model, {"mean": F.cross_entropy}, batches, {}, [0.0]).settings


def test_batch_normalisation_in_training_mode_of_a_sum():
    torch.manual_seed(0)
    model, loss = ResidualNetwork().double().train(), nn.CrossEntropyLoss(reduction="sum")
    x, y = torch.randn(10, 1, 4, 4).double(), torch.arange(10) % CLASSES
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]
    twin = copy.deepcopy(model)
    value = sum(loss(twin(a), b) for a, b in batches)
    H = Hessian(model, loss, batches)
    assert_same(H @ identity(H), dense_hessian(value, twin), 1e-9)
    found = line(model, {"loss": loss}, batches, {}, [0.0])["loss"][0]
    assert found == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize("sizes", [[6, 4], [10]])
def test_a_sum_where_the_model_draws_random_numbers(sizes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, CLASSES)).double()
    x, y = torch.randn(10, 4).double(), torch.arange(10) % CLASSES
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    total = nn.CrossEntropyLoss(reduction="sum")
    H = [Hessian(model, total, batches), Hessian(model, F.cross_entropy, batches)]
    assert_same(H[0] @ identity(H[0]), 10 * (H[1] @ identity(H[0])))
    model.eval()
    A = [operator(model, total, batches) for operator in (Fisher, GGN)]
    B = [operator(model, F.cross_entropy, batches) for operator in (Fisher, GGN)]
    for one, other in zip(A, B, strict=True):
        assert_same(one @ identity(one), 10 * (other @ identity(one)))


@pytest.mark.parametrize("n", [12, 70])
@pytest.mark.parametrize("loss", [F.cross_entropy, SUMS["sum"]])
def test_sums_and_means_where_memory_is_short(loss, n):
    class Starving(nn.Linear):
        def forward(self, x):
            if len(x) > self.most:
                raise MemoryError
            return super().forward(x)

    torch.manual_seed(0)
    model, x = Starving(4, CLASSES).double().eval(), torch.randn(n, 4).double()
    y, model.most = torch.arange(n) % CLASSES, n
    exact = dense_hessian(loss(model(x), y), model)
    value = loss(model(x), y).item()
    model.most = 5
    for operator in (Hessian, GGN):
        A = operator(model, loss, (x, y))
        assert_same(A @ identity(A), exact)
    assert line(model, {"loss": loss}, (x, y), {}, [0.0])["loss"][0] == pytest.approx(value)


@pytest.mark.parametrize("case", ["ignored", "fitted"])
def test_a_sum_is_known_where_its_first_losses_are_zero(case):
    model, x = nn.Linear(3, 4).double(), torch.randn(4, 3).double()
    if case == "ignored":
        y = torch.arange(4)
        loss = nn.CrossEntropyLoss(ignore_index=0, reduction="sum")
    else:
        y = model(x).detach()
        loss = nn.MSELoss(reduction="sum")
    pieces = [(x[i : i + 1], y[i : i + 1]) for i in range(4)]
    v = torch.randn(16).double()
    whole = Hessian(model, loss, (x, y)) @ v
    torch.testing.assert_close(Hessian(model, loss, pieces) @ v, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_known_where_its_losses_are_small(dtype):
    model, x = nn.Linear(3, 4, dtype=dtype), torch.randn(4, 3).to(dtype)
    y = (model(x) + torch.finfo(dtype).eps ** 0.5 / 10).detach()
    pieces = [(x[i : i + 1], y[i : i + 1]) for i in range(4)]
    metrics = {"sum": nn.MSELoss(reduction="sum")}
    found = line(model, metrics, pieces, {}, [0.0])
    assert found.settings["sums"] == "sum"


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_weights_that_some_of_the_data_do_not_show(own, zeros):
    """Halves of what is delivered weigh alike, the parts that are delivered do not."""
    torch.manual_seed(0)
    model = Judging() if own else nn.Linear(3, CLASSES)
    model = model.double().eval()
    if zeros:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    y = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0] * 10)
    loss = nn.CrossEntropyLoss(ignore_index=1)
    x = torch.randn(80, 3).double()
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    named = [{"x": x, "labels": y} for x, y in batches]

    def value():
        return sum(len(b) / 80 * loss(F.linear(a, model.weight, model.bias), b) for a, b in batches)

    assert_right(model, None if own else loss, named if own else batches, value)


@pytest.mark.parametrize("loss", [SUMS["sum"], contrast, MEANS["weighted"]])
def test_second_difference_of_a_line_along_an_eigenvector_is_the_eigenvalue(loss):
    model, _, x, y = make("conv", n=40)
    batches = [(x[:25], y[:25]), (x[25:], y[25:])]
    H = Hessian(model, loss, batches)
    top = eigsh(H, 1, tol=1e-8)
    pieces = top.eigenvectors[:, 0].split([p.numel() for p in model.parameters()])
    direction = {
        name: piece.view(p.shape)
        for piece, (name, p) in zip(pieces, model.named_parameters(), strict=True)
    }
    h = 1e-3
    left, middle, right = surface(
        model, {"loss": loss}, batches, [direction, {}], [-h, 0, h], [0.0]
    )["loss"][0]
    assert (left - 2 * middle + right) / h**2 == pytest.approx(top.eigenvalues.item(), rel=1e-4)


class Summing(nn.Module):
    """Its loss is its own, a sum over examples, and it draws random numbers."""

    def __init__(self, always):
        super().__init__()
        self.layer, self.always = nn.Linear(4, CLASSES), always

    def forward(self, x, labels):
        x = x + 0.1 * torch.randn_like(x) if self.always else F.dropout(x, 0.3, self.training)
        scores = self.layer(x)
        return {"scores": scores, "loss": F.cross_entropy(scores, labels, reduction="sum")}


@pytest.mark.parametrize("always", [False, True])
def test_a_sum_that_is_the_models_own_where_it_draws_random_numbers(always):
    torch.manual_seed(0)
    model, x, y = Summing(always), torch.randn(12, 4), torch.arange(12) % CLASSES
    batches = [{"x": x[:7], "labels": y[:7]}, {"x": x[7:], "labels": y[7:]}]
    found = line(model, {"loss": None}, batches, {}, [0.0])
    assert found.settings["sums"] == "loss"
    whole, _ = Hessian(model, None, batches).value_and_gradient()
    assert found["loss"][0] == pytest.approx(whole)
    first, _ = Hessian(model, None, batches[:1]).value_and_gradient()
    assert first < whole  # of which it is a part, of the same random numbers
    assert model.training


class Ignoring(nn.Module):
    """Its loss is its own, a mean over those that are not of class 1."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, labels):
        return {"loss": F.cross_entropy(self.layer(x), labels, ignore_index=1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [False, True])
def test_weights_count_where_all_examples_have_nearly_the_same_loss(own, dtype):
    """As in a network that has not learned anything: values do not tell then."""
    torch.manual_seed(0)
    layer = nn.Linear(4, CLASSES, bias=False).to(dtype)
    nn.init.normal_(layer.weight, std=1e-4)
    x, y = torch.randn(40, 4).to(dtype), torch.arange(40) % CLASSES
    y[20:32] = 1
    loss = nn.CrossEntropyLoss(ignore_index=1)
    H = (
        Hessian(Ignoring(layer), None, {"x": x, "labels": y})
        if own
        else Hessian(layer, loss, (x, y))
    )
    twin = copy.deepcopy(layer).double()
    exact = dense_hessian(loss(twin(x.double()), y), twin)
    assert_same((H @ identity(H)).double(), exact, 1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_that_draw_are_means_or_sums_whatever_they_draw(reduction):
    def noisy(outputs, targets):
        noise = torch.randn_like(outputs)
        return F.cross_entropy(outputs + noise, targets, reduction=reduction)

    for seed in range(30):
        torch.manual_seed(seed)
        model, x = nn.Linear(4, CLASSES).bfloat16(), torch.randn(9, 4).bfloat16()
        batches = list(zip(x.split(3), (torch.arange(9) % CLASSES).split(3), strict=True))
        found = line(model, {"loss": noisy}, batches, {}, [0.0])
        assert ("sums" in found.settings) == (reduction == "sum"), seed
