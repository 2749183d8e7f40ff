"""Differences between networks with 95 % intervals, over seeds and over what was measured on.

The seeds of a study are measured on the same mini-batches or images. That is a crossed design: the
difference d[s, u] of seed s on unit u has a part of its seed, a part of its unit, which all seeds
share, and a rest. An interval over the seeds alone leaves the second out: other mini-batches would
give other means (Baayen, Davidson and Bates, *Journal of Memory and Language* 59, 2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special  # scipy.stats takes half a second to import


@dataclass(frozen=True)
class Interval:
    """An estimate whose error is a sum of independent ones, each of a variance that was estimated.

    The square of half the interval is the sum of those of Student's interval of each part. It
    covers at least at the nominal rate (Banerjee, *Sankhya* 22, 1960), and a further part never
    makes it narrower.
    """

    estimate: float
    parts: tuple[tuple[float, float], ...]  # variance (NaN: not known) and degrees of freedom

    @property
    def low(self) -> float:
        """Of the 95 % interval."""
        return self.estimate - self._half_width(0.05)

    @property
    def high(self) -> float:
        """Of the 95 % interval."""
        return self.estimate + self._half_width(0.05)

    def p_value(self, value: float) -> float:
        """The level at which `value` is the end of the interval; NaN where there is no interval."""
        away = abs(self.estimate - value)
        if not np.isfinite(self._half_width(0.5)):
            return np.nan
        tiny = 1e-12  # a level that no claim is judged at
        if away >= self._half_width(tiny):
            return tiny
        low, high = tiny, 1.0
        while high > low * (1 + 1e-12):
            level = (low * high) ** 0.5
            low, high = (level, high) if self._half_width(level) > away else (low, level)
        return high

    def _half_width(self, level: float) -> float:
        halves = [special.stdtrit(freedom, level / 2) ** 2 * v for v, freedom in self.parts]
        return float(np.sqrt(sum(halves)))


def over_units(differences: np.ndarray | Sequence[float]) -> Interval:
    """Of the mean of (n,) differences of two networks, one an image or a mini-batch (Student)."""
    values = np.asarray(differences, dtype=float)
    variance = values.var(ddof=1) / len(values) if len(values) > 1 else np.nan
    return Interval(float(values.mean()), ((float(variance), max(len(values) - 1, 1)),))


def paired(terms: np.ndarray | Sequence[np.ndarray]) -> Interval:
    """Of the sum over (k, n) terms, k signed networks of each of n seeds (Student)."""
    return over_units(np.sum(terms, axis=0))


def unpaired(terms: np.ndarray | Sequence[np.ndarray]) -> Interval:
    """The same without regard to which seeds belong together, of which each term has its own."""
    own = [over_units(term) for term in terms]
    estimate = sum(interval.estimate for interval in own)
    return Interval(estimate, tuple(part for interval in own for part in interval.parts))


def of_shared_units(differences: np.ndarray) -> tuple[float, float]:
    """What the choice of units adds to an interval over seeds: a variance, and its freedom.

    Parameters
    ----------
    differences : (seeds, units)
        All seeds are of the same units.

    Notes
    -----
    The analysis of variance of two crossed random factors: the means of the units vary by their
    own variance and by that of the rest over the number of seeds, and the latter, which the
    variance over seeds contains already, is taken off. What would be negative is zero.
    """
    seeds, units = differences.shape
    of_unit = differences.mean(axis=0)
    rest = differences - of_unit - differences.mean(axis=1, keepdims=True) + differences.mean()
    of_rest = (rest**2).sum() / ((seeds - 1) * (units - 1))
    return float(np.maximum(of_unit.var(ddof=1) - of_rest / seeds, 0) / units), units - 1
