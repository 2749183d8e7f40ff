import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lossgeometry import Path, bezier_path, fit_bezier, linear_path
from lossgeometry.errors import InputError
from lossgeometry.running import saving

TS = np.linspace(0, 1, 11)


class Point(nn.Module):
    """A model whose output is its only parameter."""

    def __init__(self, *at: float) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor([at]).double())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.at


ONE = torch.ones(1, 2).double(), torch.zeros(1)


def ring(outputs: Tensor, targets: Tensor) -> Tensor:
    """Low on the unit circle, 1 in its middle."""
    return (outputs.square().sum(1) - 1).square().mean()


def test_linear_path_and_its_barrier() -> None:
    model, other = Point(-1, 0), Point(1, 0)
    found = linear_path(model, other.state_dict(), {"ring": ring}, ONE, TS)
    x = 2 * TS - 1
    assert found.metrics["ring"] == pytest.approx((x**2 - 1) ** 2)
    assert found.barrier("ring") == pytest.approx(1)


def test_barrier_is_measured_from_the_chord() -> None:
    assert Path(np.array([0, 0.25, 1]), {"nll": np.array([4, 4.5, 0])}).barrier("nll") == 1.5
    assert Path(np.array([0, 0.5, 1]), {"nll": np.array([4, 1, 0])}).barrier("nll") == 0
    assert np.isnan(Path(np.array([0, 0.5, 1]), {"nll": np.array([4, np.nan, 0])}).barrier("nll"))


def test_bezier_curve_goes_where_it_should() -> None:
    model, other = Point(0, 0), Point(2, 0)
    bend = {"at": torch.tensor([[1, 3]]).double()}
    metrics = {"x": lambda o, _: o[0, 0], "y": lambda o, _: o[0, 1]}
    found = bezier_path(model, other.state_dict(), bend, metrics, ONE, TS).metrics
    assert found["x"] == pytest.approx(2 * TS * (1 - TS) * 1 + TS**2 * 2)
    assert found["y"] == pytest.approx(2 * TS * (1 - TS) * 3, abs=1e-15)


def test_the_fitted_curve_goes_around_a_hill() -> None:
    model, other = Point(-1, 0.1), Point(1, 0.1)
    before = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    fit = fit_bezier(model, other.state_dict(), ring, ONE, steps=400, learning_rate=0.05, seed=3)
    assert torch.equal(torch.get_rng_state(), generator)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.at.grad is None
    straight = linear_path(model, other.state_dict(), {"ring": ring}, ONE, TS)
    curved = bezier_path(model, other.state_dict(), fit.bend, {"ring": ring}, ONE, TS)
    # The best parabola through both ends has its top near (0, 1.1): a fine grid of control points
    # has its smallest mean loss at a height of 2.1.
    heights = np.linspace(0, 4, 401)
    t = np.linspace(0, 1, 201)
    mean = [np.mean(ring_on_parabola(height, t)) for height in heights]
    assert fit.bend["at"][0, 1].item() == pytest.approx(heights[np.argmin(mean)], abs=0.1)
    assert curved.barrier("ring") < 0.1 * straight.barrier("ring")
    assert fit.losses[-50:].mean() < 0.2 * fit.losses[:5].mean()


def ring_on_parabola(height: float, t: np.ndarray) -> np.ndarray:
    y = (1 - t) ** 2 * 0.1 + 2 * t * (1 - t) * height + t**2 * 0.1
    x = t**2 - (1 - t) ** 2
    return (x**2 + y**2 - 1) ** 2


def test_the_fit_takes_ragged_batches_dropout_and_the_penalty() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 2))

    model, other = network(), network()
    x, y = torch.randn(30, 3), torch.randint(2, (30,))
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    arguments = (model, other.state_dict(), F.cross_entropy, batches)
    fit = fit_bezier(*arguments, steps=7, seed=1)
    again = fit_bezier(*arguments, steps=7, seed=1)
    decayed = fit_bezier(*arguments, steps=7, seed=1, weight_decay=10.0)
    assert np.isfinite(fit.losses).all()
    assert fit.losses.tolist() == again.losses.tolist()
    assert all(torch.equal(fit.bend[name], again.bend[name]) for name in fit.bend)
    assert decayed.bend["0.weight"].norm() < fit.bend["0.weight"].norm()


def test_fits_and_paths_go_on_where_they_were_interrupted(monkeypatch) -> None:
    monkeypatch.setattr(saving, "SAVE_EVERY", 0.0)
    model, other = Point(-1, 0.1), Point(1, 0.1).state_dict()
    states: list[dict[str, np.ndarray]] = []

    def save(state: dict[str, np.ndarray]) -> None:
        states.append(copy.deepcopy(state))

    fit = fit_bezier(model, other, ring, ONE, steps=9, save=save)
    for state in states:
        again = fit_bezier(model, other, ring, ONE, steps=9, resume=state)
        assert torch.equal(again.bend["at"], fit.bend["at"])
        assert again.losses.tolist() == fit.losses.tolist()
    assert len(states) == 9
    states.clear()
    path = bezier_path(model, other, fit.bend, {"ring": ring}, ONE, TS, save=save)
    assert [int(state["done"].sum()) for state in states] == [*range(1, 12)]

    def never(outputs: Tensor, targets: Tensor) -> Tensor:
        raise AssertionError

    for resume, metric in ((states[3], ring), (states[-1], never)):
        again = bezier_path(model, other, fit.bend, {"ring": metric}, ONE, TS, resume=resume)
        assert again.metrics["ring"].tolist() == path.metrics["ring"].tolist()


def test_bad_input_is_named() -> None:
    model, other = Point(0, 0), Point(1, 0).state_dict()
    for ts in ([0], [0, 0.5], [0.1, 1], [0, 0.6, 0.5, 1], [[0, 1]]):
        with pytest.raises(InputError, match="ts: "):
            linear_path(model, other, {"ring": ring}, ONE, ts)
    with pytest.raises(InputError, match="resume: no control found"):
        fit_bezier(model, other, ring, ONE, resume={"losses": TS})
    with pytest.raises(InputError, match=r"resume: float64 \(11,\) found for values, expected"):
        resume = {"values": TS, "done": TS < 2}
        linear_path(model, other, {"ring": ring}, ONE, TS, resume=resume)
    with pytest.raises(InputError, match="steps: 0"):
        fit_bezier(model, other, ring, ONE, steps=0)
    with pytest.raises(InputError, match="for at, expected shape"):
        linear_path(model, {"at": torch.ones(3)}, {"ring": ring}, ONE, TS)
