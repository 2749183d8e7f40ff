"""Planes of a trained network: what is in them agrees with what it was made of."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import cuts
from analysis.objective import build_objective
from lossgeometry import InputError, line, surface
from lossgeometry.landscape.directions import as_vector, random_directions
from lossgeometry.parameters import flatten
from models import load_dataset
from models.train import Options, untrained


@pytest.fixture(scope="module")
def objective():
    """Augmented digits, stochastic depth, L2: all that may differ between gradient and loss."""
    options = Options(out=Path("x.pt"), window=3, dim=12, depth=2)
    dataset = load_dataset("digits").first(64)
    built = build_objective(untrained(options, dataset), dataset, batch_size=16, batches=3)
    return built.double()


def moved(objective, scale, seed=1):
    """Weights at a random place."""
    (direction,) = random_directions(objective.model, 1, seed=seed, include="all")
    return {
        name: weight + scale * direction.get(name, 0)
        for name, weight in objective.model.state_dict().items()
    }


def loss_along(objective, cut, axis, steps):
    found = line(
        objective.model,
        objective.metrics,
        objective.batches,
        cut.tensors(objective.model)[axis],
        steps,
        weight_decay=objective.weight_decay,
    )
    return found["nll"] + found["l2"]


@pytest.mark.parametrize(
    ("low", "high", "points"), [(-1, 1, 21), (-0.3, 1.3, 11), (-25.0, 6.5, 51)]
)
def test_steps_are_even_and_one_is_at_the_weights(low, high, points):
    cut = cuts.Cut(np.zeros((2, 1)), ("a", "b"), (low, low), (high, high))
    steps = cut.along(0, points)
    assert len(steps) == points
    assert 0 in steps
    step = (high - low) / (points - 1)
    np.testing.assert_allclose(np.diff(steps), step)
    assert abs(steps[0] - low) <= step / 2 * (1 + 1e-9)


def test_second_differences_along_eigenvectors_are_the_eigenvalues(objective):
    cut = cuts.eigenvector_cut(objective, seed=0, span=1.0)
    largest, smallest = cut.extras["eigenvalues"]
    assert smallest < 0 < largest
    h = 1e-3
    for axis, eigenvalue in enumerate((largest, smallest)):
        values = loss_along(objective, cut, axis, [-2 * h, -h, 0, h, 2 * h])
        curvature = values @ np.array([-1, 16, -30, 16, -1]) / 12 / h**2
        assert curvature == pytest.approx(eigenvalue, rel=1e-4)
        np.testing.assert_allclose(np.linalg.norm(cut.directions[axis]), 1)


def test_the_gradient_is_the_slope(objective):
    cut = cuts.gradient_cut(objective, seed=0, span=1.0)
    h = 1e-6
    down, up = loss_along(objective, cut, 0, [-h, h])
    length = np.linalg.norm(cut.directions[0])
    slope = (up - down) / (2 * h) / length
    assert slope == pytest.approx(cut.extras["gradient_norm"].item(), rel=1e-5)
    assert length == pytest.approx(np.linalg.norm(cut.directions[1]))


def test_the_way_to_another_checkpoint_ends_there(objective):
    other = moved(objective, 0.3)
    cut = cuts.towards_cut(objective, other, seed=0, span=1.0)
    there = copy.deepcopy(objective.model)
    there.load_state_dict(other)
    at_end = loss_along(objective, cut, 0, [1.0])
    expected = line(there, objective.metrics, objective.batches, {}, [0.0])["nll"]
    expected = expected + objective.weight_decay / 2 * sum(
        p.square().sum().item() for p in there.parameters()
    )
    np.testing.assert_allclose(at_end, expected)
    first, second = cut.directions
    assert first @ second == pytest.approx(0, abs=1e-9 * (first @ first))
    assert np.linalg.norm(first) == pytest.approx(np.linalg.norm(second))
    np.testing.assert_allclose(cut.extras["linear/nll"][-1], expected - l2_of(there, objective))
    with pytest.raises(InputError, match="towards: the same weights"):
        cuts.towards_cut(objective, objective.model.state_dict(), seed=0, span=1.0)


@pytest.mark.parametrize("kind", [("filter", "all"), ("none", "weights")])
def test_the_random_direction_across_is_the_kind_that_was_asked_for(objective, kind):
    how = dict(zip(("normalization", "include"), kind, strict=True))
    (drawn,) = random_directions(objective.model, 1, seed=0, **how)
    drawn = as_vector(drawn, objective.model).numpy()
    along = cuts.gradient_cut(objective, seed=0, span=1.0, **how)
    np.testing.assert_allclose(along.directions[1], drawn)
    assert along.names[1].startswith("filter" if kind[0] == "filter" else "Gaussian")
    way, across = cuts.towards_cut(
        objective, moved(objective, 0.3), seed=0, span=1.0, **how
    ).directions
    drawn -= drawn @ way / (way @ way) * way
    np.testing.assert_allclose(across / np.linalg.norm(across), drawn / np.linalg.norm(drawn))


def l2_of(model, objective):
    return objective.weight_decay / 2 * sum(p.square().sum().item() for p in model.parameters())


def test_a_fitted_curve_lies_in_its_plane_and_below_the_straight_path(objective):
    other = moved(objective, 0.5)
    cut = cuts.bezier_cut(objective, other, seed=0, span=1.0)
    np.testing.assert_allclose(cut.points[0], 0, atol=1e-9)
    step_x, step_y = cut.points[25]
    values = surface(
        objective.model,
        objective.metrics,
        objective.batches,
        cut.tensors(objective.model),
        [step_x],
        [step_y],
    )
    np.testing.assert_allclose(values["nll"][0, 0], cut.extras["bezier/nll"][25], rtol=1e-6)
    assert cut.extras["bezier/nll"].mean() < cut.extras["linear/nll"].mean()


def test_marked_points_are_where_the_checkpoints_are(objective):
    second, third = moved(objective, 0.3), moved(objective, 0.2, seed=2)
    cut = cuts.plane_cut(objective, second, third, span=1.0)
    start = as_vector({}, objective.model) + flatten(
        p.detach() for p in objective.model.parameters()
    )
    for (x, y), state in zip(cut.points[1:], (second, third), strict=True):
        point = start.numpy() + x * cut.directions[0] + y * cut.directions[1]
        expected = flatten(state[name] for name, _ in objective.model.named_parameters())
        np.testing.assert_allclose(point, expected, atol=1e-9)
    for axis in (0, 1):
        assert cut.low[axis] < cut.points[:, axis].min()
        assert cut.high[axis] > cut.points[:, axis].max()


def test_a_training_is_seen_in_the_plane_of_its_snapshots(objective):
    snapshots = [moved(objective, scale) for scale in (0.5, 0.2)]
    snapshots.append(moved(objective, 0.3, seed=3))
    snapshots.append(objective.model.state_dict())
    cut = cuts.pca_cut(objective, snapshots, [0, 5, 7, 9], span=1.0)
    assert cut.extras["epochs"].tolist() == [0, 5, 7, 9]
    assert cut.points.shape == (4, 2)
    np.testing.assert_allclose(cut.points[-1], 0, atol=1e-9)
    assert cut.extras["explained_variance"].sum() == pytest.approx(1)  # they lie in a plane
    assert cut.extras["polar/distances"][-1] == 0


def test_cuts_survive_storage(objective):
    from analysis.measurements.packing import pack_cut, unpack_cut

    cut = cuts.towards_cut(objective, moved(objective, 0.3), seed=0, span=1.0)
    arrays = pack_cut(cut, objective.model)
    again = unpack_cut(arrays)
    assert again is not None
    np.testing.assert_array_equal(again.directions, cut.directions)
    np.testing.assert_array_equal(again.points, cut.points)
    assert (again.names, again.low, again.high) == (cut.names, cut.low, cut.high)
    assert again.extras.keys() == cut.extras.keys()
    first, start = cut.tensors(objective.model)[0], 0
    for name, shape in json.loads(arrays["cut/parameters"].item()).items():
        end = start + int(np.prod(shape))
        assert torch.equal(torch.tensor(cut.directions[0, start:end]).reshape(shape), first[name])
        start = end
    assert start == cut.directions.shape[1]
    assert unpack_cut({}) is None
