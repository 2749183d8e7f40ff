from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lossgeometry import Slice, random_directions, surface
from lossgeometry.errors import InputError

AXIS = np.linspace(-1, 1, 51)
X, Y = np.meshgrid(AXIS, AXIS)

Function = Callable[[Tensor, Tensor], Tensor]


class Point(nn.Module):
    """A model whose output is its only parameter: any function of x and y is a metric of it."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(1, 2).double())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.at


def measure(
    *functions: Function, tolerance: float | None, axis: np.ndarray = AXIS, **options: float
) -> Slice:
    x_axis, y_axis = ({"at": torch.tensor([row]).double()} for row in ([1, 0], [0, 1]))
    metrics = {
        f"f{i}": lambda outputs, _, f=f: f(*outputs.mean(0)) for i, f in enumerate(functions)
    }
    data = torch.ones(1, 2).double(), torch.zeros(1)
    return surface(
        Point(), metrics, data, (x_axis, y_axis), axis, axis, adaptive=tolerance, **options
    )


def bowl(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 + 3 * (1 - torch.exp(-3 * x**2 - 6 * y**2 - x * y))


def waves(x: Tensor, y: Tensor) -> Tensor:
    return 2 + torch.sin(3 * x + y) * torch.cos(2 * y) + 0.3 * x**3


def ridge(x: Tensor, y: Tensor) -> Tensor:
    return 1 + F.softplus(6 * (x + 0.3 * y)) / 6 + y**2


def jumps(x: Tensor, y: Tensor) -> Tensor:
    return 1 + torch.floor(7 * x + 5 * y) % 2


@pytest.mark.parametrize("function", [bowl, waves, ridge])
@pytest.mark.parametrize("tolerance", [0.03, 0.01])
def test_every_point_is_within_the_tolerance(function: Function, tolerance: float) -> None:
    truth = function(torch.from_numpy(X), torch.from_numpy(Y)).numpy()
    found = measure(function, tolerance=tolerance)
    assert np.abs(found["f0"] / truth - 1).max() <= tolerance
    assert found.settings["interpolated"] is True
    assert found.settings["adaptive"] == tolerance
    assert found.settings["evaluations"] == found.evaluated.sum() <= 2601 / 10
    np.testing.assert_array_equal(found["f0"][found.evaluated], truth[found.evaluated])


def test_a_smooth_surface_takes_a_25th_of_the_evaluations() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    data = torch.randn(64, 6), torch.randint(4, (64,))
    arguments = (model, {"nll": F.cross_entropy}, data, random_directions(model, seed=0))
    whole = surface(*arguments, AXIS, AXIS)
    found = surface(*arguments, AXIS, AXIS, adaptive=0.01)
    assert found.settings["evaluations"] <= 2601 / 25
    assert np.abs(found["nll"] / whole["nll"] - 1).max() <= 0.01


def test_the_stated_errors_are_those_of_the_last_predictions() -> None:
    truth = waves(torch.from_numpy(X), torch.from_numpy(Y)).numpy()
    found = measure(waves, bowl, tolerance=0.05)
    stated = found.settings["objective_error"]
    assert 0 < stated <= 0.05 / 2
    # All values lie between 0.7 and 3.3.
    assert 0.7 * stated <= found.settings["f0_error"] <= 3.3 * stated
    # The predictions have become better since, as their points are known now.
    assert np.abs(found["f0"] / truth - 1).max() <= 2 * stated
    assert found.settings["f1_error"] > 0


def test_the_penalty_is_part_of_the_objective() -> None:
    alone = measure(bowl, tolerance=0.01)
    with_penalty = measure(bowl, tolerance=0.01, weight_decay=100.0)
    assert with_penalty.settings["evaluations"] < alone.settings["evaluations"]
    np.testing.assert_allclose(with_penalty["l2"], 50 * (X**2 + Y**2), rtol=1e-12, atol=1e-12)


def test_other_metrics_come_along_with_their_own_error() -> None:
    found = measure(waves, jumps, tolerance=0.05)
    assert found.settings["interpolated"] is True
    assert found.settings["f1_error"] > 0.1


def test_a_surface_that_is_not_smooth_is_evaluated_on_the_whole_grid() -> None:
    axis = np.linspace(-1, 1, 31)
    found = measure(jumps, tolerance=0.01, axis=axis)
    assert found.settings["interpolated"] is False
    assert found.settings["evaluations"] == 31**2
    assert found.evaluated.all()
    assert found["f0"].tobytes() == measure(jumps, tolerance=None, axis=axis)["f0"].tobytes()
    assert "objective_error" not in found.settings


def test_nan_and_infinity_are_not_interpolated() -> None:
    def diverges(x: Tensor, y: Tensor) -> Tensor:
        return 1 / torch.relu(1.2 - x - y) + torch.sqrt(1.9 + x)

    def hole(x: Tensor, y: Tensor) -> Tensor:
        return 1 + torch.sqrt(x + 0.9)

    for function, bad in ((diverges, np.isinf), (hole, np.isnan)):
        found = measure(function, tolerance=0.01)
        truth = function(torch.from_numpy(X), torch.from_numpy(Y)).numpy()
        assert bad(found["f0"]).any()
        assert not found.settings["interpolated"]
        np.testing.assert_array_equal(found["f0"], truth)


def test_a_small_grid_is_evaluated_whole() -> None:
    found = measure(bowl, tolerance=0.01, axis=np.linspace(-1, 1, 4))
    assert found.evaluated.all()
    assert not found.settings["interpolated"]


@pytest.mark.parametrize("tolerance", [0.0, -1.0, np.nan])
def test_the_tolerance_is_positive(tolerance: float) -> None:
    with pytest.raises(InputError, match="adaptive: "):
        measure(bowl, tolerance=tolerance)
