"""Operators against dense matrices by double backward, which finite differences confirm."""

import copy
import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lossgeometry import GGN, Fisher, Hessian, per_layer
from lossgeometry.errors import InputError
from tests.dense import (
    CLASSES,
    LOSSES,
    MODELS,
    OPERATORS,
    ResidualNetwork,
    assert_same,
    dense,
    flat,
    identity,
    make,
    rows,
    some_vectors,
)


@pytest.mark.parametrize("name", MODELS)
def test_truth_agrees_with_finite_differences_of_the_gradient(name):
    model, loss_fn, x, y = make(name)
    truth = dense("hessian", model, loss_fn, x, y)
    parameters = list(model.parameters())
    start = flat(parameters).detach().clone()
    direction = torch.randn_like(start)
    gradients = []
    for step in (1e-6, -1e-6):
        nn.utils.vector_to_parameters(start + step * direction, parameters)
        gradients.append(flat(torch.autograd.grad(loss_fn(model(x), y), parameters)))
    difference = (gradients[0] - gradients[1]) / 2e-6
    assert_same(truth @ direction, difference, 1e-6)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_matrix_of_every_architecture(name, operator):
    model, loss_fn, x, y = make(name)
    A = OPERATORS[operator](model, loss_fn, (x, y), micro_batch=2)
    V = some_vectors(A)
    assert_same(A @ V, dense(operator, model, loss_fn, x, y) @ V)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_dense_matrix_for_every_loss(loss, operator):
    model, loss_fn, x, y = make("conv", loss, n=7)
    A = OPERATORS[operator](model, loss_fn, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert_same(A @ identity(A), dense(operator, model, loss_fn, x, y))


@pytest.mark.parametrize("operator", OPERATORS)
def test_subset_of_parameters_and_weight_decay(operator):
    model, loss_fn, x, y = make("csan-clamp-1")
    pattern = r"attention\.|^head\.weight"
    selected = [p for n, p in model.named_parameters() if re.search(pattern, n)]
    A = OPERATORS[operator](model, loss_fn, (x, y), params=pattern, weight_decay=0.3)
    expected = dense(operator, model, loss_fn, x, y, selected)
    assert A.shape == expected.shape
    assert_same(A @ identity(A), expected + 0.3 * identity(A))


@pytest.mark.parametrize("operator", OPERATORS)
def test_products_with_a_block_in_one_pass(operator):
    """The way of a GPU, on any device."""
    model, loss_fn, x, y = make("csan-zero-3")
    A = OPERATORS[operator](model, loss_fn, (x, y))
    V = torch.randn(A.shape[0], 3, dtype=torch.float64)
    (chunk,) = A._objective.chunks
    sizes = [p.numel() for p in model.parameters()]
    pieces = V.T.split(sizes, 1)
    block = [v.reshape(3, *p.shape) for v, p in zip(pieces, model.parameters(), strict=True)]
    product = A._linear_map(chunk).apply(block, True)
    assert_same(torch.cat([p.flatten(1) for p in product], 1).T, A @ V, 1e-13)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 7), st.randoms())
def test_neither_batches_nor_chunks_nor_order_change_the_result(sizes, micro_batch, random):
    n = sum(sizes)
    model, loss_fn, x, y = make("conv", n=n)
    whole = Hessian(model, loss_fn, (x, y))
    order = random.sample(range(n), n)
    batches = zip(x[order].split(sizes), y[order].split(sizes), strict=True)
    cut = Hessian(model, loss_fn, batches, micro_batch=micro_batch, memory=random.choice([0, 1e9]))
    v = torch.randn(whole.shape[0], dtype=torch.float64)
    assert_same(cut @ v, whole @ v, 1e-12)
    assert_same(cut @ v, whole @ v, 1e-12)  # now from what was kept


@given(st.sampled_from(sorted(OPERATORS)), st.floats(-5, 5), st.integers(0, 99))
def test_linear_and_symmetric(operator, factor, seed):
    model, loss_fn, x, y = make("conv", "soft")
    A = OPERATORS[operator](model, loss_fn, (x, y), weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(2, A.shape[0], generator=generator).double()
    Au, Av = A @ u, A @ v
    torch.testing.assert_close(A @ (factor * u + v), factor * Au + Av, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(u @ Av, v @ Au, rtol=1e-10, atol=1e-11)
    if operator != "hessian":
        assert u @ Au >= 0


def test_memory_is_bounded_by_the_budget():
    model, loss_fn, x, y = make("conv", n=12)
    H = Hessian(model, loss_fn, (x, y), micro_batch=2, memory=10**9)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    H @ v
    assert len(H._kept) == 6
    one = H._kept[0].size()
    half = Hessian(model, loss_fn, (x, y), micro_batch=2, memory=3 * one)
    assert_same(half @ v, H @ v, 1e-14)
    assert len(half._kept) == 3
    assert sum(linear_map.size() for linear_map in half._kept.values()) <= 3 * one


@pytest.mark.parametrize("operator", OPERATORS.values())
def test_kept_is_what_would_be_free_otherwise(operator):
    """Not the parameters, nor the data that mini-batches are views of."""
    model, loss_fn, x, y = make("conv", n=12)
    views = operator(model, loss_fn, (x[:3], y[:3]))
    copies = operator(model, loss_fn, (x[:3].clone(), y[:3].clone()))
    for A in (views, copies):
        A @ torch.ones(A.shape[0], dtype=torch.float64)
    assert views.kept_bytes() == copies.kept_bytes() > 0


def test_gradient_includes_the_penalty():
    model, loss_fn, x, y = make("conv")
    H = Hessian(model, loss_fn, (x, y), weight_decay=0.2, micro_batch=2)
    loss = loss_fn(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters())
    assert_same(H.gradient(), flat(torch.autograd.grad(loss, list(model.parameters()))), 1e-12)


def test_monte_carlo_fisher_converges_to_the_ggn_of_a_softmax():
    model, loss_fn, x, y = make("conv", n=3)
    exact = dense("ggn", model, loss_fn, x, y)
    A = Fisher(model, loss_fn, (x, y), mc_samples=400)
    assert_same(A @ identity(A), exact, 0.1)
    soft = F.one_hot(y, CLASSES).double()
    B = Fisher(model, loss_fn, (x, soft), mc_samples=400, micro_batch=2)
    V = some_vectors(A)
    assert_same(B @ V, A @ V, 1e-12)  # the same draws, however they are cut


def test_fisher_of_targets_that_are_ignored_whatever_stands_for_them():
    torch.manual_seed(0)
    model = nn.Conv2d(1, CLASSES, 1).double()
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    y = torch.randint(CLASSES, (3, 4, 4))
    y[0, :2] = 255
    kept = y != 255
    logits = model(x).movedim(1, -1)[kept]
    losses = F.cross_entropy(logits, y[kept], reduction="none")
    gradients = rows(losses, list(model.parameters()))

    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs, targets, ignore_index=255)

    A = Fisher(model, loss_fn, (x, y))
    assert_same(A @ identity(A), gradients.T @ gradients / len(losses))
    drawn = Fisher(model, loss_fn, (x, y), mc_samples=1000)
    assert_same(drawn @ identity(A), GGN(model, loss_fn, (x, y)) @ identity(A), 0.1)


def test_dropout_is_frozen():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Dropout(0.5))
    model.append(nn.Linear(8, CLASSES)).double()
    x, y = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.randint(0, CLASSES, (6,))
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    H = Hessian(model, F.cross_entropy, batches, memory=0)
    matrix = H @ identity(H)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-14)
    assert_same(Hessian(model, F.cross_entropy, batches) @ identity(H), matrix, 1e-14)
    other = Hessian(model, F.cross_entropy, batches, seed=1) @ identity(H)
    assert (other - matrix).norm() > 0.1 * matrix.norm()
    assert H.check().ok


def test_refuses_chunks_that_would_change_the_result():
    x, y = torch.randn(8, 1, 4, 4), torch.randint(0, CLASSES, (8,))
    training = ResidualNetwork().train()
    with pytest.raises(InputError, match=r"micro_batch: 4 .*norm1 normalises over the batch"):
        Hessian(training, F.cross_entropy, (x, y), micro_batch=4)
    dropout = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, CLASSES))
    with pytest.raises(InputError, match="draws random numbers"):
        Hessian(dropout, F.cross_entropy, (x, y), micro_batch=4)
    weighted = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 5.0]))
    with pytest.raises(InputError, match="not the mean of the losses"):
        Hessian(dropout.eval(), weighted, (x, y), micro_batch=4)
    alike = torch.cat([torch.zeros(4).long(), torch.tensor([1, 2, 2, 2])])  # the first tell nothing
    for some in (weighted, nn.CrossEntropyLoss(ignore_index=2)):
        with pytest.raises(InputError, match="not the mean of the losses"):
            Hessian(dropout, some, (x, alike), micro_batch=2)
        with pytest.raises(InputError, match="not the mean of the losses"):
            Hessian(dropout, some, [(x, alike * 0), (x, alike)], micro_batch=4)
    for model, loss_fn in ((training, F.cross_entropy), (dropout.eval(), weighted)):
        many = (x.repeat(20, 1, 1, 1), torch.randint(0, CLASSES, (160,)))
        assert len(Hessian(model, loss_fn, many)._objective.chunks) == 1


def test_batch_normalisation_in_training_mode_is_exact_for_batches_as_delivered():
    model, loss_fn, x, y = make("resnet", n=6)
    model.train()
    truth = dense("hessian", copy.deepcopy(model), loss_fn, x, y)
    H = Hessian(model, loss_fn, (x, y))
    assert_same(H @ identity(H), truth)
    H = Hessian(model, loss_fn, [(x, y), (x, y)])
    assert_same(H @ identity(H), truth)


def test_models_of_torchvision_and_timm_work_unchanged():
    for model in (
        torchvision.models.resnet18(num_classes=CLASSES).eval(),
        timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=CLASSES),
    ):
        x, y = torch.randn(2, 3, 32, 32), torch.randint(0, CLASSES, (2,))
        H = Hessian(model, F.cross_entropy, (x, y))
        v = torch.randn(H.shape[0])
        parameters = list(model.parameters())
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = F.cross_entropy(model(x), y)
        gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True))
        assert_same(H @ v, flat(torch.autograd.grad(gradient @ v, parameters)), 1e-5)


def state(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: tensor.detach().clone() for name, tensor in tensors.items()},
        {name: (t.grad, t.requires_grad) for name, t in model.named_parameters()},
        [module.training for module in model.modules()],
        torch.get_rng_state(),
    )


def assert_unchanged(before, after):
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    for name, (grad, requires_grad) in before[1].items():
        assert after[1][name] == (grad, requires_grad) or after[1][name][0] is grad
        assert after[1][name][1] == requires_grad
    assert before[2] == after[2]
    assert torch.equal(before[3], after[3])


@pytest.mark.parametrize("operator", OPERATORS)
def test_leaves_the_model_and_the_random_state_alone(operator):
    class Failure(Exception):
        pass

    failing = False

    def loss_fn(outputs, targets):
        torch.rand(1)
        if failing:
            raise Failure
        return F.cross_entropy(outputs, targets)

    model = ResidualNetwork().train()
    model.conv.eval()
    model.stem.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    x, y = torch.randn(6, 1, 4, 4), torch.randint(0, CLASSES, (6,))
    before = state(model)
    A = OPERATORS[operator](model, F.cross_entropy, [(x, y), (x[:3], y[:3])], memory=0)
    A @ torch.ones(A.shape[0])
    A.check()
    assert_unchanged(before, state(model))
    B = OPERATORS[operator](model, loss_fn, [(x, y), (x, y)])
    failing = True
    with pytest.raises(Failure):
        B @ torch.ones(B.shape[0])
    assert_unchanged(before, state(model))


def test_scipy_sees_the_same_operator():
    model, loss_fn, x, y = make("conv")
    H = Hessian(model, loss_fn, (x, y))
    operator = H.to_scipy()
    V = np.random.default_rng(0).standard_normal((H.shape[0], 2))
    expected = (H @ torch.from_numpy(V)).numpy()
    np.testing.assert_allclose(operator.matmat(V), expected, rtol=1e-12)
    np.testing.assert_allclose(operator.matvec(V[:, 0]), expected[:, 0], rtol=1e-12)
    np.testing.assert_allclose(operator.T @ V, expected, rtol=1e-12)


def test_operators_of_parts_are_diagonal_blocks():
    model, loss_fn, x, y = make("csan-clamp-1")
    whole = dense("hessian", model, loss_fn, x, y)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    for by, expected in (
        ("layer", {"blocks.0.attention.qkv", "blocks.0.mlp.0", "position_embedding", "head"}),
        ("module", {"blocks.0.attention", "blocks.0.mlp", "norm"}),
        ("block", {"blocks.0", "patch_embedding"}),
    ):
        covered = 0
        names = set()
        for name, H in per_layer(Hessian, model, loss_fn, iter([(x, y)]), by=by):
            start = min(starts[n] for n in sizes if n == name or n.startswith(name + "."))
            block = slice(start, start + H.shape[0])
            assert_same(H @ identity(H), whole[block, block])
            covered += H.shape[0]
            names.add(name)
        assert covered == len(whole)
        assert expected <= names
    with pytest.raises(InputError, match="by: 'blocks', expected one of layer, module, block"):
        next(per_layer(Hessian, model, loss_fn, (x, y), by="blocks"))
    with pytest.raises(InputError, match="params: expected none"):
        next(per_layer(Hessian, model, loss_fn, (x, y), params="head"))


def test_tied_and_unused_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first
            self.unused = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.second(self.first(x).tanh())

    model = Tied().double()
    x, y = torch.randn(5, 4).double(), torch.randint(0, 4, (5,))
    used = list(model.first.parameters())
    for name, operator in OPERATORS.items():
        A = operator(model, F.cross_entropy, (x, y))
        expected = torch.zeros(A.shape, dtype=torch.float64)
        # `unused` belongs to the model itself and so comes first
        expected[2:, 2:] = dense(name, model, F.cross_entropy, x, y, used)
        assert_same(A @ identity(A), expected)


def test_loss_linear_in_the_outputs_has_no_ggn():
    model, _, x, y = make("conv")
    A = GGN(model, lambda z, _: z.mean(), (x, y))
    assert not (A @ torch.ones(A.shape[0], dtype=torch.float64)).any()


def test_bad_input_is_named():
    model, loss_fn, x, y = make("conv")
    with pytest.raises(InputError, match="data: no batches"):
        Hessian(model, loss_fn, [])
    with pytest.raises(InputError, match="5 inputs and 4 targets"):
        Hessian(model, loss_fn, (x, y[:4]))
    with pytest.raises(InputError, match="params: no parameter name contains 'attn'"):
        Hessian(model, loss_fn, (x, y), params="attn")
    with pytest.raises(InputError, match="micro_batch: 0"):
        Hessian(model, loss_fn, (x, y), micro_batch=0)
    with pytest.raises(InputError, match="mc_samples: 0"):
        Fisher(model, loss_fn, (x, y), mc_samples=0)
    H = Hessian(model, loss_fn, (x, y))
    with pytest.raises(InputError, match=rf"shape \(3,\), expected \({H.shape[0]},\)"):
        H @ torch.ones(3)
    with pytest.raises(InputError, match=r"dtype torch.float32, expected torch.float64"):
        H @ torch.ones(H.shape[0])
    elementwise = Hessian(model, lambda z, y: F.cross_entropy(z, y, reduction="none"), (x, y))
    with pytest.raises(InputError, match=r"loss_fn: a result of shape \(5,\)"):
        elementwise @ torch.ones(H.shape[0], dtype=torch.float64)
