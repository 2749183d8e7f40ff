"""Estimates with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special  # scipy.stats takes half a second to import


@dataclass(frozen=True)
class Mean:
    """A mean over independent repetitions and the half-width of its 95 % confidence interval.

    See Also
    --------
    across_seeds : computes it.
    """

    mean: float
    half_width: float  # NaN for a single repetition, and of what is not finite
    n: int

    def format(self, digits: str = ".3f", scale: float = 1.0) -> str:
        """For example "0.123 ± 0.004", or without an interval if there is none."""
        text = f"{self.mean * scale:{digits}}"
        known = np.isfinite(self.half_width)
        return f"{text} ± {self.half_width * scale:{digits}}" if known else text


def across_seeds(values: Sequence[float] | np.ndarray) -> Mean:
    """Mean of (n,) values, one a seed, with Student's 95 % confidence interval.

    See Also
    --------
    lossgeometry.plots.plot_samples : draws values beside it.

    Examples
    --------
    >>> across_seeds([1.0, 2.0, 3.0]).format(".2f")  # 4.303 standard errors
    '2.00 ± 2.48'
    """
    sample = np.asarray(values, dtype=float)
    n = len(sample)
    if n < 2 or not np.isfinite(sample).all():
        return Mean(float(sample.mean()), float("nan"), n)
    spread = special.stdtrit(n - 1, 0.975) * _standard_error(sample)
    return Mean(float(sample.mean()), float(spread), n)


def across_images(values: np.ndarray) -> Mean:
    """Mean of (n,) values, one an image, with the normal 95 % confidence interval."""
    half_width = special.ndtri(0.975) * _standard_error(np.asarray(values, dtype=float))
    return Mean(float(np.mean(values, dtype=float)), float(half_width), len(values))


def _standard_error(sample: np.ndarray) -> float:
    return float(sample.std(ddof=1) / len(sample) ** 0.5)
