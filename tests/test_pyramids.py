"""ResNet, ViT, PiT and Swin: their Hessians, what is random in them, and their trainings."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from analysis.cost import cost_of
from analysis.objective import build_objective
from analysis.plan import Training, blank_dataset
from lossgeometry import GGN, Hessian, InputError
from models import load_dataset
from models.checkpoint import load_checkpoint
from models.description import PYRAMIDS, token_range
from models.isotropic import random_branches
from models.networks import build_network, count_parameters
from models.stack import Stack
from models.train import Options, untrained
from models.training import train
from tests.dense import assert_same, dense, some_vectors

SMALL = dict(image_size=4, channels=1, classes=3, patch_size=1, dim=2, depth=4)
ATTENTION = dict(heads=1, mlp_ratio=1.0)
NETWORKS = {
    "resnet": {},
    "vit": ATTENTION,
    "vit, cls": {**ATTENTION, "pooling": "cls"},
    "pit": ATTENTION,
    "swin": {**ATTENTION, "image_size": 8},  # its first stage has windows
}


def small(name, **options):
    """With parameters and statistics that are not those of a fresh network."""
    network = name.partition(",")[0]
    model = build_network({"network": network, **SMALL, **NETWORKS[name], **options}).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    for key, buffer in model.named_buffers():
        if "running" in key:
            buffer.uniform_(0.5, 2)
    return model


def images(name, n=5):
    size = (SMALL | NETWORKS[name])["image_size"]
    return torch.randn(n, 1, size, size, dtype=torch.float64), torch.randint(0, 3, (n,))


@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_those_of_the_dense_matrix(name):
    model, (x, y) = small(name).eval(), images(name)
    for kind, operator in (("hessian", Hessian), ("ggn", GGN)):
        products = operator(model, F.cross_entropy, [(x, y)])
        V = some_vectors(products)
        assert_same(products @ V, dense(kind, copy.deepcopy(model), F.cross_entropy, x, y) @ V)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_hessian_is_that_of_one_loss_though_branches_are_skipped(name):
    """Products are symmetric and repeat, and are those of the dense matrix of what was drawn."""
    model, (x, y) = small(name, depth=2, stochastic_depth=0.5).train(), images(name)
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    H, other = (Hessian(model, F.cross_entropy, [(x, y)], seed=seed) for seed in (2, 3))
    vectors = torch.randn(H.shape[0], 3, dtype=H.dtype)
    found = H @ vectors
    assert torch.equal(found, H @ vectors)
    assert not torch.allclose(found, other @ vectors)
    assert_same(vectors.T @ found, found.T @ vectors)
    branches = random_branches(model)
    for branch in branches.values():
        branch.kept = branch.draw(len(x))
    assert 0 < torch.stack([branch.kept for branch in branches.values()]).mean() < 1
    given = Hessian(model, F.cross_entropy, [(x, y)])
    found = given @ vectors
    assert all(torch.equal(buffer, model.get_buffer(key)) for key, buffer in buffers.items())
    assert_same(found, dense("hessian", model, F.cross_entropy, x, y) @ vectors)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_else_is_random(name):
    model, (x, _) = small(name, stochastic_depth=0.5).train(), images(name)
    branches = random_branches(model)
    assert len(branches) == (3 if name == "resnet" else 6)  # of a transformer's block, two
    rates = [branch.p for branch in branches.values()]
    assert all(a <= b for a, b in pairwise(rates))
    assert rates[-1] == 0.5
    kept = {key: branch.draw(len(x)) for key, branch in branches.items()}
    one, other = (torch.func.functional_call(model, kept, (x,)) for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_stack_of_them_does_what_each_does_alone(name):
    models = [small(name, stochastic_depth=0.5).train() for _ in range(2)]
    alone = copy.deepcopy(models)
    x, y = (torch.stack(pair) for pair in zip(*(images(name) for _ in models), strict=True))
    stack = Stack(models, "cpu")
    kept = torch.stack([stack.draw(x.shape[1]) for _ in models])
    losses = stack.losses(F.cross_entropy, x, y, kept)
    (gradients,) = torch.autograd.grad(losses.sum(), stack.weights)
    for k, model in enumerate(alone):
        for branch, own in zip(random_branches(model).values(), kept[k].unbind(1), strict=True):
            branch.kept = own
        loss = F.cross_entropy(model(x[k]), y[k])
        found = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close(losses[k], loss, rtol=1e-10, atol=1e-12)
        expected = torch.cat([g.flatten() for g in found])
        torch.testing.assert_close(gradients[k], expected, rtol=1e-8, atol=1e-10)


def options(out, network, **more):
    return Options(out=out, network=network, dim=12, epochs=6, evaluate_every=9, **more)


@pytest.mark.parametrize("dataset", ["digits", "cifar100"])
@pytest.mark.parametrize("network", PYRAMIDS)
def test_they_are_as_large_as_the_csan_of_their_preset(network, dataset):
    with torch.device("meta"):
        models = [
            untrained(asked, blank_dataset(asked)).model
            for asked in (
                Options(out="a.pt", network=name, dataset=dataset, mlp_ratio=4.0)
                for name in ("csan", network)
            )
        ]
    one, other = map(count_parameters, models)
    assert other == pytest.approx(one, rel=0.06)


@pytest.mark.parametrize(
    ("dataset", "depth", "patch_size"),
    [
        *(("digits", 2, 1), ("digits", 4, 1), ("cifar100", 2, 4), ("cifar100", 4, 4)),
        *(("cifar100", 6, 2), ("cifar100", 8, 1)),
    ],
)
def test_the_last_but_one_stage_has_the_tokens_of_the_vit(dataset, depth, patch_size):
    asked = Options("a.pt", "swin", dataset=dataset, depth=depth, dim=12)
    with torch.device("meta"):
        start = untrained(asked, blank_dataset(asked))
    assert start.architecture["patch_size"] == patch_size


@pytest.mark.parametrize("network", PYRAMIDS)
def test_what_they_cost_is_counted(network):
    training = Training((), Options("a.pt", network, dataset="digits", dim=12), (), 0)
    cost = cost_of(training)
    assert cost.parameters == count_parameters(training.start.model)
    # A multiplication and an addition with each weight and image at the least, three times over.
    assert cost.flops > 6 * cost.parameters * cost.image_steps


@pytest.mark.parametrize("network", PYRAMIDS)
def test_they_are_trained_stored_and_measured_as_the_others(tmp_path, network):
    data = [load_dataset("digits", split).first(64) for split in ("train", "test")]
    out = tmp_path / f"{network}.pt"
    start = untrained(options(out, network), data[0])
    assert token_range(start.architecture) is None
    found = train(replace(start), out, *data)
    loaded = load_checkpoint(out)
    assert loaded.architecture == start.architecture
    torch.testing.assert_close(
        dict(loaded.model.state_dict()), dict(found.model.state_dict()), rtol=0, atol=0
    )
    assert loaded.history["train_nll"][-1] < loaded.history["train_nll"][0]
    objective = build_objective(loaded, data[0], batches=1)
    products = Hessian(objective.model, objective.loss, objective.batches, weight_decay=0.05)
    assert products.check().verdict == "right"


@pytest.mark.parametrize(
    ("network", "options", "complaint"),
    [
        ("resnet", dict(dim=3), "dim: 3 is not usable, expected an even number"),
        ("resnet", dict(depth=10, image_size=64), "depth: 10 .*at most 8 blocks"),
        ("swin", dict(depth=3), "depth: 3 .*stages of 2 blocks, of which each halves the 4 tokens"),
        ("pit", dict(depth=8), "depth: 8 .*stages of 2 blocks"),
        ("vit", dict(heads=3), "heads: 3 .*a divisor of 2"),
        ("vit", dict(pooling="max"), "pooling: 'max'"),
        ("vit", dict(patch_size=3), "patch_size: 3 .*a divisor of 4"),
        ("vit", dict(dim=2**15), "dim: 32768 .*weights"),
        ("pit", dict(image_size=2**19), "image_size: 524288 .*tokens"),
        ("vit", dict(stochastic_depth=1), "stochastic_depth: 1"),
    ],
)
def test_options_out_of_range_are_named(network, options, complaint):
    with pytest.raises(InputError, match=f"^{complaint}"):
        build_network({"network": network, **SMALL, **options})
