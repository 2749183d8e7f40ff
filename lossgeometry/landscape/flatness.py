"""What lines through weight space say in numbers: how flat a minimum is, how high a barrier."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lossgeometry.errors import InputError
from lossgeometry.statistics import Mean, across_seeds
from lossgeometry.storing import Result


@dataclass(frozen=True, repr=False)
class Flatness(Result):
    """Flatness along n independent random directions; see `flatness` for the definitions.

    See Also
    --------
    flatness : computes it.

    Examples
    --------
    >>> import numpy as np
    >>> from lossgeometry import flatness
    >>> xs = np.linspace(-1, 1, 9)
    >>> flat = flatness(xs, [xs**2, 3 * xs**2])
    >>> flat.estimates()["curvature"].format(".1f")  # of 2 and 6, as a mean ± its 95 % interval
    '4.0 ± 25.4'
    """

    curvature: np.ndarray  # (n,) second derivative of the loss at the weights
    width: np.ndarray  # (n,) steps between the points left and right where the loss has risen
    asymmetry: np.ndarray  # (n,) in [0, 1] where the loss rises on both sides
    sharpness: np.ndarray  # (n,) in percent

    def estimates(self) -> dict[str, Mean]:
        """Each of the four by name: its mean over directions, and half of the 95 % interval."""
        return {name: across_seeds(values) for name, values in vars(self).items()}


def flatness(
    xs: ArrayLike, losses: ArrayLike, *, increase: float = 0.1, epsilon: float = 0.1
) -> Flatness:
    """Summarise the loss along lines through a minimum.

    With filter-normalised directions, x = 1 is as long as the weights, and networks of different
    scale compare (Li et al., NeurIPS 2018).

    Parameters
    ----------
    xs : (m,) array_like
        Steps: increasing, evenly spaced, symmetric about 0; m is odd and at least 5.
    losses : (n, m) array_like
        Along n lines.
    increase : float
        Of the loss, that defines the width.
    epsilon : float
        Largest |x| that counts for the sharpness.

    Returns
    -------
    Flatness
        - curvature: central difference of fourth order of the five points around 0.
        - width: the distance between the nearest points on both sides of 0 at which the loss,
          interpolated linearly, is `increase` above that at 0; infinity where it is not reached.
        - asymmetry: integral of |L(x) - L(-x)| over that of |L(x) + L(-x) - 2 L(0)|.
        - sharpness: 100 max(L(x) - L(0)) / (1 + L(0)) over |x| <= epsilon; that of Keskar et al.,
          *On Large-Batch Training for Deep Learning*, ICLR 2017, metric 2.1, along a line; NaN if
          steps are longer than `epsilon`.

        A line with NaN has NaN.

    Raises
    ------
    InputError
        If `xs` is not as described, shapes do not match, or an option is not positive.

    See Also
    --------
    line : the losses along one direction.
    random_directions : what the lines should be along.

    Examples
    --------
    >>> import numpy as np
    >>> from lossgeometry import flatness
    >>> xs = np.linspace(-1, 1, 9)
    >>> flat = flatness(xs, [xs**2])
    >>> flat.curvature.round(6), flat.asymmetry
    (array([2.]), array([0.]))
    """
    xs, losses = np.asarray(xs, dtype=float), np.asarray(losses, dtype=float)
    _require_usable(xs, losses, increase, epsilon)
    middle = len(xs) // 2
    at_weights = losses[:, middle]
    rises = losses - at_weights[:, None]
    mirrored = rises[:, ::-1]
    trapezoid = np.ones(len(xs))
    trapezoid[[0, -1]] = 0.5  # the rule's weights, in steps
    with np.errstate(invalid="ignore"):  # a flat line has no asymmetry, an infinite one neither
        odd, even = (np.abs(rises + sign * mirrored) for sign in (-1, 1))
        asymmetry = (odd @ trapezoid) / (even @ trapezoid)
    near = rises[:, np.abs(xs) <= epsilon * (1 + 1e-12)]
    highest = near.max(axis=1) if near.shape[1] > 1 else np.full(len(losses), np.nan)
    stencil = np.array([-1, 16, -30, 16, -1]) / 12 / (xs[middle + 1] - xs[middle]) ** 2
    result = Flatness(
        curvature=losses[:, middle - 2 : middle + 3] @ stencil,
        width=np.array(
            [
                _crossing(xs[middle:], rise[middle:], increase)
                + _crossing(xs[middle:], rise[middle::-1], increase)
                for rise in rises
            ]
        ),
        asymmetry=asymmetry,
        sharpness=100 * highest / (1 + at_weights),
    )
    broken = np.isnan(losses).any(axis=1)
    for values in vars(result).values():
        values[broken] = np.nan
    return result


def barrier(ts: np.ndarray, values: np.ndarray) -> float:
    """Largest height over the straight line between the values at both ends.

    As Frankle et al., *Linear Mode Connectivity and the Lottery Ticket Hypothesis*, ICML 2020,
    measure it, for ends of different height. NaN if any value on the way is.
    """
    return float(np.max(values - (values[0] + (values[-1] - values[0]) * ts)))


def _crossing(distances: np.ndarray, rise: np.ndarray, increase: float) -> float:
    """Distance from 0 at which the loss has first risen by `increase`."""
    above = np.flatnonzero(rise >= increase)
    if not len(above):
        return np.inf
    i = above[0]
    share = (increase - rise[i - 1]) / (rise[i] - rise[i - 1])
    return float(distances[i - 1] + share * (distances[i] - distances[i - 1]))


def _require_usable(xs: np.ndarray, losses: np.ndarray, increase: float, epsilon: float) -> None:
    m = len(xs) if xs.ndim == 1 else 0
    even = m >= 5 and m % 2 == 1 and np.allclose(xs, np.linspace(-xs[-1], xs[-1], m), atol=1e-9)
    if not (even and xs[-1] > 0):
        raise InputError(
            "xs: expected an odd number of at least 5 evenly spaced steps symmetric about 0, "
            f"found {xs.tolist()}"
        )
    if losses.ndim != 2 or losses.shape[1] != m:
        raise InputError(f"losses: shape {losses.shape}, expected (n, {m})")
    for name, value in {"increase": increase, "epsilon": epsilon}.items():
        if not value > 0:
            raise InputError(f"{name}: {value} is not usable, expected a positive number")
