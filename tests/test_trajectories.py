import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lossgeometry import (
    pca_directions,
    plane,
    polar,
    project,
    random_directions,
    towards,
    trajectory,
)
from lossgeometry.errors import InputError


def states(points: Tensor) -> list[dict[str, Tensor]]:
    return [{"weight": p[:12].view(3, 4), "bias": p[12:]} for p in points.double()]


def model(at: Tensor) -> nn.Module:
    network = nn.Linear(4, 3).double()
    network.load_state_dict(states(at[None])[0])
    return network


def test_trajectory_has_the_coordinates_of_the_snapshots_around_the_model() -> None:
    plane = torch.linalg.qr(torch.randn(15, 2).double()).Q.T
    inside = torch.tensor([[4, 3], [3, -1], [1, 0.5], [0, 0]]).double()
    points = torch.randn(15).double() + inside @ plane
    found = trajectory(model(points[-1]), states(points))
    assert found.explained_variance.sum() == pytest.approx(1)
    assert found.explained_variance[0] > found.explained_variance[1] > 0
    assert found.coordinates[-1] == pytest.approx([0, 0], abs=1e-12)
    axes = torch.stack([torch.cat([d["weight"].flatten(), d["bias"]]) for d in found.directions])
    torch.testing.assert_close(
        points[-1] + torch.from_numpy(found.coordinates) @ axes, points, rtol=1e-10, atol=1e-10
    )


def test_projection_on_directions_that_are_neither_orthogonal_nor_complete() -> None:
    origin = torch.randn(15).double()
    network = model(origin)
    first, second = random_directions(network, seed=0)
    skewed = [first, {"weight": first["weight"] + second["weight"]}]
    out_of_plane = torch.zeros(15).double()
    out_of_plane[12:] = 7  # the directions leave the bias where it is
    flat = [torch.cat([d["weight"].flatten(), torch.zeros(3).double()]) for d in skewed]
    point = origin + 2 * flat[0] - 3 * flat[1] + out_of_plane
    assert project(network, states(point[None]), skewed) == pytest.approx(np.array([[2, -3]]))


def test_polar_view_of_a_known_path() -> None:
    path = torch.zeros(5, 15)
    path[:, :2] = torch.tensor([[2, 0], [2, 2], [0, 2], [0, 1], [0, 0]])
    found = polar(model(torch.randn(15)), states(path))
    assert found.distances == pytest.approx([2, 8**0.5, 2, 1, 0])
    assert found.angles[:4] == pytest.approx([0, np.pi / 4, np.pi / 2, np.pi / 2])
    assert np.isnan(found.angles[4])
    assert found.turns == pytest.approx([np.pi / 2, np.pi / 2, 0])


def test_small_angles_are_accurate() -> None:
    path = torch.zeros(3, 15).double()
    path[:, :2] = torch.tensor([[0, 0], [1, 0], [2, 1e-9]])
    assert polar(model(torch.zeros(15)), states(path)).turns == pytest.approx([1e-9], rel=1e-6)


def test_bad_input_is_named() -> None:
    network = model(torch.zeros(15))
    with pytest.raises(InputError, match="snapshots: 1, expected"):
        polar(network, states(torch.zeros(1, 15)))
    with pytest.raises(InputError, match="nothing for bias"):
        trajectory(network, [{"weight": torch.zeros(3, 4)}] * 3)
    line = states(torch.arange(4.0)[:, None] * torch.ones(15))
    with pytest.raises(InputError, match="fewer than 2 directions"):
        pca_directions(line, network)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_snapshots_are_counted(count: int) -> None:
    with pytest.raises(InputError, match=f"snapshots: {count} that span .* expected 3 or more"):
        trajectory(model(torch.zeros(15)), states(torch.zeros(count, 15)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    points = torch.randn(4, 15)
    network, broken = model(points[-1]), model(points[-1])
    points[1, 13] = value
    with torch.no_grad():
        broken.bias[0] = value
    one_of_three = "1 of 3 numbers in bias are not finite"
    for place in (trajectory, polar):
        with pytest.raises(InputError, match=one_of_three):
            place(network, states(points))
    for direction in (towards, lambda *states: plane(*states, states[1])):
        with pytest.raises(InputError, match=one_of_three):
            direction(network, states(points)[1])
        with pytest.raises(InputError, match=one_of_three):
            direction(broken, states(points)[0])


def test_run_that_does_not_move_is_refused() -> None:
    still = states(torch.ones(4, 15))
    with pytest.raises(InputError, match="4 that span fewer than 2 directions"):
        trajectory(model(torch.ones(15)), still)


def test_projection_needs_snapshots_and_independent_directions() -> None:
    network = model(torch.randn(15))
    first, second = random_directions(network, seed=0)
    points = states(torch.randn(2, 15))
    with pytest.raises(InputError, match="snapshots: none"):
        project(network, [], [first, second])
    for other in (first, {"weight": 0 * first["weight"]}):
        with pytest.raises(InputError, match="directions: one is zero or a sum of others"):
            project(network, points, [first, other])
    # However different their lengths are.
    tiny = {"weight": 1e-9 * second["weight"]}
    found = project(network, points, [first, tiny]) * [1, 1e-9]
    np.testing.assert_allclose(found, project(network, points, [first, second]), rtol=1e-6)


def test_snapshots_keep_their_precision_beside_a_model_of_less() -> None:
    points = torch.randn(4, 15).double()
    coarse = model(points[-1]).bfloat16()
    found = trajectory(coarse, states(points))
    exact = trajectory(model(points[-1]), states(points))
    np.testing.assert_allclose(found.explained_variance, exact.explained_variance, rtol=1e-9)
