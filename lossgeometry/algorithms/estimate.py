"""What a stochastic estimate is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from scipy import special  # scipy.stats takes half a second to import
from torch import Tensor

from lossgeometry.errors import InputError
from lossgeometry.storing import Result

Value = TypeVar("Value", float, np.ndarray, Tensor)


@dataclass(frozen=True, repr=False)
class Estimate(Result, Generic[Value]):
    """A stochastic estimate and its errors, all of one shape, in the units of what is estimated.

    See Also
    --------
    trace : returns one of a number.
    diagonal : returns one of an array.
    SpectralDensity.count : returns one of a number of eigenvalues.

    Examples
    --------
    >>> import torch
    >>> from lossgeometry import trace
    >>> T = trace(torch.diag(torch.linspace(0, 1, 200)), matvecs=30)
    >>> abs(T.estimate - 100) < 4 * T.standard_error, T.matvecs
    (True, 30)
    """

    estimate: Value
    standard_error: Value  # by chance: of the random vectors
    degrees_of_freedom: float | np.ndarray  # of the standard error, infinite where it is exact
    systematic_error: float | np.ndarray  # besides: of rounding, or what a quadrature may miss
    matvecs: int  # products that were made

    def interval(self, confidence: float = 0.95) -> tuple[Value, Value]:
        """Lower and upper end of the interval that holds the truth with this `confidence`.

        Student's, with what is wrong besides by chance added to its half-width. Raises `InputError`
        if `confidence` is not between 0 and 1.

        Examples
        --------
        >>> Estimate(3.0, 0.5, 9, 0.0, 10).interval()  # 2.262 standard errors
        (1.86..., 4.13...)
        """
        quantile = student_quantile(self.degrees_of_freedom, confidence)
        half = quantile * self.standard_error + self.systematic_error
        return self.estimate - half, self.estimate + half


@dataclass(frozen=True, repr=False)
class NormEstimate(Estimate[float]):
    """A norm, which has no sign and whose errors are factors."""

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Lower and upper end of the interval that holds the truth with this `confidence`.

        Student's of the logarithm, with what is wrong besides by chance added at both ends.

        Examples
        --------
        >>> NormEstimate(3.0, 0.5, 10, 0.0, 10).interval()  # a factor of exp(2.228 * 0.5 / 3)
        (2.06..., 4.34...)
        """
        factor, wrong = 1.0, float(self.systematic_error)
        if self.standard_error:
            quantile = student_quantile(self.degrees_of_freedom, confidence)
            factor = math.exp(quantile * self.standard_error / self.estimate)
        return max(self.estimate / factor - wrong, 0.0), self.estimate * factor + wrong


def student_quantile(degrees: float | np.ndarray, confidence: float) -> Any:
    """Half of Student's interval of this `confidence`, in standard errors; inf: the normal one.

    Raises `InputError` if `confidence` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence: {confidence}, expected a number between 0 and 1")
    level = (1 + confidence) / 2
    quantile = np.where(np.isinf(degrees), special.ndtri(level), special.stdtrit(degrees, level))
    return quantile if quantile.ndim else float(quantile)


def effective_degrees(residuals: Tensor) -> float:
    """Degrees of freedom of the mean square of the columns (P, k) of ``B Z``, for random `Z`.

    The mean of ``|Bz|²`` is ``|B|²``, its variance ``2 |B²|²`` (Frobenius norms, z normal), so that
    the mean of k has ``ν = k |B|⁴ / |B²|²`` degrees of freedom (Satterthwaite 1946): k where one
    eigenvalue is all there is, and k times as many as there are equal ones. Both have unbiased
    estimates in the Gram matrix of the columns.
    """
    k = residuals.shape[1]
    residuals = residuals / residuals.abs().max()  # squares neither overflow nor vanish
    gram = (residuals.T @ residuals).double()
    gram = gram / gram.trace()
    fourth = (float(gram.square().sum()) - 1 / k) / ((k + 2) * (k - 1))  # of |B²|²
    squared = (1 - 2 * k * fourth) / k**2  # of |B|⁴
    return k * squared / fourth if fourth > 0 else float("inf")
