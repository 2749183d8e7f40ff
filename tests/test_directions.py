import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lossgeometry import (
    Hessian,
    eigenvector_directions,
    gradient_direction,
    line,
    pca_directions,
    plane,
    random_directions,
    towards,
)
from lossgeometry.errors import InputError
from lossgeometry.landscape.directions import Normalization, as_vector


class Net(nn.Module):
    """A little of everything a direction has to tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 1, groups=8)  # filters of a single entry
        self.class_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 8))
        self.post_norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)
        self.temperature = nn.Parameter(torch.tensor(2.0))


WEIGHTS = {"patches.weight", "depthwise.weight", "head.weight"}


def rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().reshape(len(tensor), -1)


def flat(direction: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.double().flatten() for t in direction.values()])


def test_filters_have_the_length_of_the_model_and_are_orthogonal() -> None:
    model = Net()
    first, second, third = random_directions(model, 3, seed=0)
    assert set(first) == WEIGHTS
    for name in WEIGHTS:
        weight = rows(model.get_parameter(name).detach())
        for direction in (first, second, third):
            torch.testing.assert_close(rows(direction[name]).norm(dim=1), weight.norm(dim=1))
    for name in ("patches.weight", "head.weight"):
        for a, b in ((first, second), (first, third), (second, third)):
            cosine = (rows(a[name]) * rows(b[name])).sum(1) / rows(a[name]).norm(dim=1) ** 2
            assert cosine.abs().max() < 1e-6


def test_layer_normalization_scales_whole_parameters() -> None:
    model = Net()
    first, second = random_directions(model, seed=0, normalization="layer", include="all")
    assert set(first) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(first[name].norm(), parameter.detach().norm())
        if parameter.numel() > 1:
            overlap = first[name].flatten() @ second[name].flatten()
            assert abs(overlap) <= 1e-6 * parameter.detach().norm() ** 2


def test_without_normalization_entries_are_standard_normal_and_directions_orthogonal() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    first, second = (flat(d) for d in random_directions(model, seed=0, normalization="none"))
    assert first.std().item() == pytest.approx(1, abs=0.03)
    assert second.std().item() == pytest.approx(1, abs=0.03)
    assert abs(first @ second) < 1e-6 * first.norm() * second.norm()


def test_seed_and_not_the_number_of_directions_decides() -> None:
    model = Net()
    one = random_directions(model, 1, seed=3)
    torch.rand(7)
    two = random_directions(model, 2, seed=3)
    double = random_directions(model.double(), 2, seed=3)
    other = random_directions(model, 1, seed=4)
    assert all(torch.equal(one[0][name], two[0][name]) for name in WEIGHTS)
    assert all(torch.equal(double[1][name].float(), two[1][name]) for name in WEIGHTS)
    assert not torch.equal(one[0]["head.weight"], other[0]["head.weight"])


def test_position_embeddings_in_many_spellings_stay() -> None:
    model = nn.ParameterDict()
    for name in (
        "pos_embed", "position_embedding", "posemb", "relative_position_bias_table", "mask_token",
        "post_mlp", "proposal", "token_mixer", "kernel",
    ):  # fmt: skip
        model[name] = nn.Parameter(torch.ones(2, 3))
    expected = {"post_mlp", "proposal", "token_mixer", "kernel"}
    assert set(random_directions(model, 1, seed=0)[0]) == expected


@pytest.mark.parametrize("normalization", ["filter", "layer", "none"])
def test_padding_stays_where_it_is_for_the_gradient_too(normalization: Normalization) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=3), nn.Flatten(), nn.Linear(8, 3)).double()
    nn.init.normal_(model[0].weight)  # of zeros, it would not move anyway
    data = torch.tensor([[3, 1], [2, 3], [0, 4], [1, 2]]), torch.tensor([0, 1, 2, 0])
    pair = random_directions(model, seed=0, normalization=normalization)
    for direction in pair:
        assert not direction["0.weight"][3].any()
        assert direction["0.weight"][[0, 1, 2, 4]].all()
        vector = as_vector(direction, model)
        H = Hessian(model, F.cross_entropy, data)
        losses = line(model, {"nll": F.cross_entropy}, data, direction, [-1e-4, 0, 1e-4])["nll"]
        assert np.diff(losses, 2)[0] / 1e-8 == pytest.approx(float(vector @ (H @ vector)), rel=1e-5)
    assert abs(flat(pair[0]) @ flat(pair[1])) < 1e-6 * flat(pair[0]).norm() ** 2


def test_towards_ends_at_the_other_weights() -> None:
    model, other = Net(), Net()
    direction = towards(model, other.state_dict())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter + direction[name], other.get_parameter(name))


def test_plane_goes_through_its_points_and_keeps_distances() -> None:
    torch.manual_seed(1)
    model, second, third = Net().double(), Net().double(), Net().double()
    result = plane(model, second.state_dict(), third.state_dict())
    axes = torch.stack([flat(d) for d in result.directions])
    torch.testing.assert_close(axes @ axes.T, torch.eye(2).double())
    for point, state in zip(result.points, (model, second, third), strict=True):
        expected = flat(dict(state.named_parameters())) - flat(dict(model.named_parameters()))
        torch.testing.assert_close(torch.from_numpy(point) @ axes, expected)
    with pytest.raises(InputError, match="on one line"):
        plane(model, second.state_dict(), second.state_dict())


def test_pca_finds_the_plane_of_a_run_and_the_variance_in_it() -> None:
    torch.manual_seed(1)
    model = nn.Linear(6, 5).double()
    basis = torch.linalg.qr(torch.randn(35, 3).double()).Q.T
    coordinates = torch.randn(8, 3).double() * torch.tensor([10, 3, 0.1])
    centre = flat(dict(model.named_parameters())).detach()
    states = []
    for point in centre + coordinates @ basis:
        states.append({"weight": point[:30].view(5, 6), "bias": point[30:]})
    directions, explained = pca_directions(states, model)
    singular = torch.linalg.svdvals(coordinates - coordinates.mean(0))
    expected = singular**2 / (singular**2).sum()
    torch.testing.assert_close(torch.from_numpy(explained), expected[:2])
    axes = torch.stack([flat(d) for d in directions])
    torch.testing.assert_close(axes @ axes.T, torch.eye(2).double())
    assert (axes @ ((coordinates[-1] - coordinates[0]) @ basis) > 0).all()
    with pytest.raises(InputError, match="fewer than 2 directions"):
        pca_directions([states[0], states[1]], model)


def test_eigenvectors_are_cut_in_the_order_of_the_parameters() -> None:
    model = Net()
    number = sum(p.numel() for p in model.parameters())
    vectors = torch.randn(number, 2)
    directions = eigenvector_directions(model, vectors)
    torch.testing.assert_close(flat(directions[1]).float(), vectors[:, 1])
    (head,) = eigenvector_directions(model, torch.randn(36, 1), params="^head")
    assert set(head) == {"head.weight", "head.bias"}
    with pytest.raises(InputError, match=r"expected \(36, k\)"):
        eigenvector_directions(model, vectors, params="^head")


@pytest.mark.parametrize("training", [False, True])
def test_the_gradient_is_that_of_the_mean_and_of_the_penalty(training: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    model.train(training)
    x, y = torch.randn(70, 3).double(), torch.randint(2, (70,))
    batches = [(x[:50], y[:50]), (x[50:], y[50:])]
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = gradient_direction(model, F.cross_entropy, batches, weight_decay=0.3)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())
    loss = sum(len(a) / 70 * F.cross_entropy(model(a), b) for a, b in batches)
    loss = loss + 0.15 * sum(p.square().sum() for p in model.parameters())
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, (name, _) in zip(expected, model.named_parameters(), strict=True):
        torch.testing.assert_close(found[name], gradient)


def test_bad_input_is_named() -> None:
    model = Net()
    with pytest.raises(InputError, match="normalization: 'fitler'"):
        random_directions(model, seed=0, normalization="fitler")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="include"):
        random_directions(nn.LayerNorm(3), seed=0)
    state = model.state_dict()
    with pytest.raises(InputError, match=r"\(2, 2\) for head.weight, expected shape \(4, 8\)"):
        towards(model, {**state, "head.weight": torch.ones(2, 2)})
    del state["temperature"]
    with pytest.raises(InputError, match="nothing for temperature"):
        towards(model, state)
