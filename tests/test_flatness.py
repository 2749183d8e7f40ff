import numpy as np
import pytest
import torch
from torch import nn

from lossgeometry import flatness, line, random_directions
from lossgeometry.errors import InputError

XS = np.linspace(-1, 1, 41)


def test_a_parabola() -> None:
    found = flatness(XS, [2 + 3 * XS**2], increase=0.75, epsilon=0.2)
    assert found.curvature == pytest.approx([6])
    assert found.width == pytest.approx([1], abs=1e-12)  # both ends are on the grid
    assert found.asymmetry == pytest.approx([0], abs=1e-12)
    assert found.sharpness == pytest.approx([100 * 3 * 0.2**2 / 3])


def test_curvature_is_of_fourth_order() -> None:
    losses = 1 + XS + 2 * XS**2 - 5 * XS**3 + 7 * XS**4 + XS**5
    assert flatness(XS, [losses]).curvature == pytest.approx([4], rel=1e-9)


def test_a_slope_and_a_kink() -> None:
    found = flatness(XS, [np.where(XS > 0, 4 * XS, -XS), XS], increase=0.5, epsilon=0.5)
    assert found.width == pytest.approx([0.125 + 0.5, np.inf])  # a slope rises on one side only
    # The integrals of |L(x) - L(-x)| and of L(x) + L(-x) are 3 and 5 times that of |x|.
    assert found.asymmetry[0] == pytest.approx(3 / 5)
    assert found.sharpness == pytest.approx([100 * 2, 100 * 0.5])


def test_the_width_is_to_the_nearest_crossing() -> None:
    found = flatness(XS, [1 - np.cos(3 * np.pi * XS)], increase=1.0)
    assert found.width == pytest.approx([2 / 6], abs=0.01)


def test_each_line_has_its_numbers_and_nan_stays() -> None:
    lines = np.stack([XS**2, 2 * XS**2, 3 * XS**2, XS**2])
    lines[3, 0] = np.nan
    found = flatness(XS, lines)
    assert found.curvature[:3] == pytest.approx([2, 4, 6])
    for values in (found.curvature, found.width, found.asymmetry, found.sharpness):
        assert np.isnan(values).tolist() == [False, False, False, True]
    estimate = flatness(XS, lines[:3]).estimates()["curvature"]
    assert (estimate.mean, estimate.n) == (pytest.approx(4), 3)
    # Student's t for 2 degrees of freedom, 4.3027, times the standard error of 2, 4, 6.
    assert estimate.half_width == pytest.approx(4.3027 * 2 / 3**0.5, rel=1e-4)


def test_an_infinite_wall_bounds_the_width() -> None:
    losses = np.where(np.abs(XS) > 0.5, np.inf, 0.0)
    found = flatness(XS, [losses], epsilon=1.0)
    assert found.width == pytest.approx([1])
    assert found.sharpness == [np.inf]
    assert np.isnan(found.asymmetry)


def test_quadratic_model_agrees_with_the_closed_form() -> None:
    model = nn.Linear(5, 3).double()
    x = torch.randn(40, 5).double()
    with torch.no_grad():
        y = model(x)  # so that the model is at the minimum
    hessian = x.T @ x / 40
    xs, lines, expected = np.linspace(-1, 1, 401), [], []
    for seed in range(3):
        (direction,) = random_directions(model, 1, seed=seed)
        metrics = {"loss": lambda outputs, y: (outputs - y).square().sum(1).mean() / 2}
        lines.append(line(model, metrics, (x, y), direction, xs)["loss"])
        d = direction["weight"]
        expected.append(torch.trace(d @ hessian @ d.T).item())
    expected = np.array(expected)
    found = flatness(xs, lines, increase=0.01, epsilon=0.5)
    assert found.curvature == pytest.approx(expected, rel=1e-8)
    assert found.width == pytest.approx(2 * np.sqrt(2 * 0.01 / expected), rel=1e-3)
    assert found.asymmetry == pytest.approx([0, 0, 0], abs=1e-12)
    assert found.sharpness == pytest.approx(100 * expected * 0.5**2 / 2)


def test_steps_that_are_too_long_for_sharpness_have_none() -> None:
    xs = np.linspace(-1, 1, 5)
    assert np.isnan(flatness(xs, [xs**2]).sharpness).all()
    assert flatness(xs, [xs**2], epsilon=0.5).sharpness == pytest.approx([25])


def test_bad_input_is_named() -> None:
    for xs in (XS[1:], XS + 0.1, XS[::-1], XS**3, [-1, 0, 1], [XS]):
        with pytest.raises(InputError, match="xs: expected an odd number"):
            flatness(xs, np.zeros((1, np.size(xs))))
    with pytest.raises(InputError, match=r"losses: shape \(41,\), expected \(n, 41\)"):
        flatness(XS, XS)
    for option in ("increase", "epsilon"):
        with pytest.raises(InputError, match=f"{option}: 0"):
            flatness(XS, [XS], **{option: 0})
