"""What the check of an operator says, and how its products compare with finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Check:
    """How far an operator is from being the symmetric derivative that it claims to be.

    There are three answers: "right", "wrong", and "undecided" where there is no derivative to
    compare with, at parameters where the gradient jumps (a ReLU of exact zeros) or is no number.

    See Also
    --------
    CurvatureOperator.check : returns it, and says how it is measured.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> from lossgeometry import Hessian
    >>> check = Hessian(model, mse_loss, data).check()
    >>> check.verdict, check.symmetry <= check.tolerance
    ('right', True)
    """

    symmetry: float  # ‖(A - Aᵀ)v‖ / ‖Av‖, estimated with random vectors
    finite_difference: float  # ‖Av - central difference‖ / ‖Av‖
    tolerance: float  # of both, from the precision of the operator
    smooth: bool = True  # whether finite differences tend to a derivative

    @property
    def verdict(self) -> Literal["right", "wrong", "undecided"]:
        """Right if both errors are within the tolerance, wrong if one that counts is not."""
        if self.symmetry > self.tolerance:
            return "wrong"
        if self.finite_difference > self.tolerance:
            return "wrong" if self.smooth else "undecided"
        decided = not math.isnan(self.symmetry + self.finite_difference)
        return "right" if decided else "undecided"

    @property
    def ok(self) -> bool:
        """Whether the operator is right, and known to be."""
        return self.verdict == "right"

    def __str__(self) -> str:
        jumps = "" if self.smooth else " (which have no limit here: the gradient jumps)"
        return (
            f"asymmetric by {self.symmetry:.1e} and off finite differences{jumps} by "
            f"{self.finite_difference:.1e}, expected at most {self.tolerance:.1e}"
        )


def against_differences(
    difference: Callable[[float, float], Tensor],
    exact: Tensor,
    steps: Sequence[float],
    tolerance: float,
    rounding: float = 0.0,
) -> tuple[float, bool]:
    """Smallest relative error of central differences, and whether they tend to a derivative.

    ``difference(ahead, behind)`` divides the change between two places by the way between them. No
    more of the `steps` are tried once one is within the `tolerance` of the `exact` product, which
    may itself be off by `rounding`.
    """
    error = math.nan
    for step in steps:
        off = ((difference(step, -step) - exact).norm() - rounding).clamp(min=0)
        error = _smaller(error, _ratio(off, exact.norm()))
        if error <= tolerance:
            return error, True
    smooth = math.isnan(error) or any(_one_limit(difference, step, exact) for step in steps)
    return error, smooth


def _one_limit(difference: Callable[[float, float], Tensor], step: float, exact: Tensor) -> bool:
    """Whether differences agree with each other better than with `exact`, by half at least."""
    central = difference(step, -step)
    doubts = (
        (difference(step, 0.0) - difference(0.0, -step)).norm(),
        (central - difference(step / 2, -step / 2)).norm(),
    )
    return bool(max(doubts) < (central - exact).norm() / 2)


def _ratio(part: Tensor, whole: Tensor) -> float:
    """Quotient of two norms; nothing out of nothing is no error."""
    return 0.0 if part == 0 and whole == 0 else float(part / whole)


def _smaller(a: float, b: float) -> float:
    return b if math.isnan(a) or b < a else a
