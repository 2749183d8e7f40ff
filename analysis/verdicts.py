"""Whether each claim of `analysis.statements` holds in what was measured.

Every claim is a difference between networks, or a conjunction of such differences. (D5 is about the
difference of two differences, which is judged as any other.) A difference

- that is claimed to be positive holds if its whole 95 % interval is above 0, does not hold if the
  whole interval is below 0, and is undecided otherwise;
- that is claimed not to be positive (C3: "no worse error") does not hold if its whole interval is
  above 0, holds if it is not that and the whole interval lies below a margin of non-inferiority of
  one percentage point, and is undecided otherwise.

A conjunction holds if all of its parts do, and does not hold if one of them does not.

The interval is Student's over the differences at each seed, and there is no verdict with fewer
than three seeds: of one network it is over the images or mini-batches, and says nothing about other
seeds. Where what is measured is a sample that all seeds share (test images, mini-batches; not the
training set, which is all there is), what its choice adds is added (`analysis.intervals`).

Beside each verdict stand two others. Holm's is what is left when all differences of one table, C1
to C6 of the windows of a study or D1 to F6 of its families, are judged at once, at a family-wise
5 % (Holm 1979). The unpaired one does not use which seeds belong together, and is named where it is
another.

When this was fixed: the rule of the two signs and of Student's interval before any network of
CIFAR-100 was measured, but six hours after those of the digits that C1, C2, C3 and C5 are about.
The interval over shared units, Holm's verdicts, and that single networks get none, came after all
of these results, and before any network of the study that decides D1 to F6 was trained.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from analysis.intervals import Interval, of_shared_units, over_units, paired, unpaired
from analysis.measurements import comparisons, labels
from analysis.measurements.files import collect_each, sparing
from analysis.measurements.schema import Measurement
from analysis.statements import OF_FAMILIES, OF_WINDOWS, QUANTITIES, Claim, Part, Variant
from lossgeometry.errors import InputError

MARGIN = 0.01  # of the error: what counts as no worse
SEEDS = 3  # that a verdict takes
LEVEL = 0.05

Verdict = Literal["holds", "does not hold", "undecided", "no verdict", "not measured"]


@dataclass(frozen=True)
class Finding:
    """What was measured of a part."""

    part: Part
    interval: Interval | None
    over: str  # what the interval is over
    verdict: Verdict
    unpaired: Verdict | None = None  # without regard to which seeds belong together
    corrected: Verdict | None = None  # by Holm, for all differences of the study
    missing: tuple[str, ...] = ()  # what to measure, and by which command

    @property
    def text(self) -> str:
        """The verdict, and the unpaired one where that is another."""
        if self.unpaired in (None, self.verdict):
            return self.verdict
        return f"{self.verdict} (unpaired: {self.unpaired})"


@dataclass(frozen=True)
class Answer:
    """What was measured of a claim."""

    claim: Claim
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """Of the conjunction of its parts."""
        return conjunction([finding.verdict for finding in self.findings])

    @property
    def corrected(self) -> Verdict:
        """Of the conjunction of its parts as Holm's correction leaves them."""
        return conjunction([finding.corrected or finding.verdict for finding in self.findings])


def conjunction(verdicts: Sequence[Verdict]) -> Verdict:
    """Of claims that are all made at once."""
    order: tuple[Verdict, ...] = ("does not hold", "not measured", "no verdict", "undecided")
    return next((decisive for decisive in order if decisive in verdicts), "holds")


def judge(
    places: Iterable[Path], left_out: list[InputError] | None = None
) -> dict[str, list[Answer]]:
    """The answer to every claim, for each study in the HDF5 files and folders `places`.

    What is wrong with files that cannot be used is added to `left_out`; without it, it is raised.
    """
    found = collect_each(places, ("history", "outcomes", "robustness", "hessian/train"), left_out)
    return sparing(_answers, [m for members in found.values() for m in members], left_out)


def _answers(measurements: Sequence[Measurement]) -> dict[str, list[Answer]]:
    trained = [m for m in measurements if not labels.foreign(m)]
    tables = {
        study: _table(OF_WINDOWS, members, comparisons.in_study)
        for study, members in comparisons.studies(trained).items()
        if any(m.name == "history" and labels.network(m) == "csan" for m in members)
    }
    for study, members in comparisons.families(trained).items():
        tables[study] = _table(OF_FAMILIES, members, comparisons.in_families)
    return tables


def _table(
    claims: Iterable[Claim], members: Sequence[Measurement], text: Callable[[Measurement], str]
) -> list[Answer]:
    """The answers to claims about `members`, which a variant is found among by its `text`."""
    of_text: dict[str, list[Measurement]] = defaultdict(list)
    for m in members:
        of_text[text(m)].append(m)
    return _corrected([Answer(c, tuple(_find(p, of_text) for p in c.parts)) for c in claims])


def decide(interval: Interval, sign: Literal[">", "<="]) -> Verdict:
    """The verdict on a difference, by the rule above."""
    if sign == ">":
        if interval.low > 0:
            return "holds"
        return "does not hold" if interval.high < 0 else "undecided"
    if interval.low > 0:
        return "does not hold"
    return "holds" if interval.high < MARGIN else "undecided"


def significance(interval: Interval, sign: Literal[">", "<="]) -> float:
    """The p-value of a decision: the level whose intervals `decide` just finds undecided."""
    p = interval.p_value(0)
    if sign == ">" or (interval.estimate >= MARGIN):
        return p
    below = interval.p_value(MARGIN)
    return min(p, below) if interval.estimate > 0 else below


def holm(p_values: Sequence[float]) -> list[float]:
    """Of (n,) p-values, those adjusted for all of them (Holm 1979), in the same order."""
    order = np.argsort(p_values, kind="stable")
    raised = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1)
    return adjusted.tolist()


def _corrected(answers: Sequence[Answer]) -> list[Answer]:
    """With the verdicts that are left when all differences of a study are judged at once."""
    judged = {
        finding.part: significance(finding.interval, finding.part.sign)
        for answer in answers
        for finding in answer.findings
        if finding.interval and finding.verdict != "no verdict"
    }
    adjusted = dict(zip(judged, holm(list(judged.values())), strict=True))

    def correct(finding: Finding) -> Finding:
        kept = adjusted.get(finding.part, 0) <= LEVEL
        return replace(finding, corrected=finding.verdict if kept else "undecided")

    return [replace(a, findings=tuple(correct(f) for f in a.findings)) for a in answers]


def _find(part: Part, members: Mapping[str, Sequence[Measurement]]) -> Finding:
    """Measure a part in one study, whose `members` are by the texts of variants."""
    quantity, variants = QUANTITIES[part.quantity], (*part.plus, *part.minus)
    of_seed = [_values(part.quantity, v, members) for v in variants]
    common = sorted(set.intersection(*map(set, of_seed)))
    if not common:
        lacking = [v for v, values in zip(variants, of_seed, strict=True) if not values]
        missing = [_missing(part.quantity, v, members) for v in lacking]
        missing = missing or ["a seed in common"]
        return Finding(part, None, "", "not measured", missing=tuple(missing))
    signs = np.repeat([1, -1], [len(part.plus), len(part.minus)])
    units = _contrast([[values[seed].units for seed in common] for values in of_seed], signs)
    if len(common) >= SEEDS:
        terms = signs[:, None] * [[values[s].value for s in common] for values in of_seed]
        intervals, over = [paired(terms), unpaired(terms)], f"{len(common)} seeds"
        if units is not None and quantity.sampled:
            shared = of_shared_units(units)
            intervals = [replace(i, parts=(*i.parts, shared)) for i in intervals]
            over += f" × {units.shape[1]} {quantity.unit}"
        verdict, otherwise = (decide(interval, part.sign) for interval in intervals)
        return Finding(part, intervals[0], over, verdict, unpaired=otherwise)
    if units is None:
        missing = [
            _missing(part.quantity, v, members)
            for v, values in zip(variants, of_seed, strict=True)
            if any(values[s].units is None for s in common)
        ]
        missing = missing or ["all networks measured on the same images"]
        return Finding(part, None, "", "not measured", missing=tuple(missing))
    over = (
        f"{'one network' if len(common) == 1 else 'two networks'}, {units.shape[1]} {quantity.unit}"
    )
    return Finding(part, over_units(units.mean(axis=0)), over, "no verdict")


def _contrast(
    networks: Sequence[Sequence[np.ndarray | None]], signs: np.ndarray
) -> np.ndarray | None:
    """Of each seed on each unit: (seeds, units); None unless all networks are of the same units."""
    arrays = [units for seeds in networks for units in seeds if units is not None]
    if len(arrays) < sum(map(len, networks)) or len({len(units) for units in arrays}) > 1:
        return None
    return np.tensordot(signs, np.array(networks, dtype=float), axes=1)


@dataclass(frozen=True)
class _Value:
    """Of one network: the value, and that of each unit (n,), where it was kept."""

    value: float
    units: np.ndarray | None


def _values(
    quantity: str, variant: Variant, members: Mapping[str, Sequence[Measurement]]
) -> dict[int, _Value]:
    """A quantity of all networks of a variant, by their seeds."""
    epoch = QUANTITIES[quantity].epoch

    def kind(name: str) -> dict[int, Measurement]:
        found = [
            m
            for of_text in members.values()
            for m in of_text
            if m.name == name and m.checkpoint["epoch"] == m.checkpoint["recipe"][epoch]
        ]
        alike = {m.path for m in labels.measured_alike(found)} if found else set()
        own = [m for m in members.get(variant.text, ()) if m.name == name and m.path in alike]
        return {m.checkpoint["seed"]: m for m in reversed(own)}

    if quantity in ("nep", "ape"):
        of_batch = _negative_share if quantity == "nep" else positive_mean
        return {
            seed: _Value(float(m.arrays[quantity]), of_batch(m.arrays["eigenvalues"]))
            for seed, m in kind("hessian/train").items()
        }
    if quantity == "corruption":
        return {
            seed: _Value(float(m.arrays["mean_corruption_error"]), m.arrays["image_error"])
            for seed, m in kind("robustness").items()
        }
    key, single = {
        "train_nll": ("train_nll", "train/nll"),
        "error": ("test_error", "test/correct"),
    }[quantity]
    outcomes = kind("outcomes")
    values = {}
    for seed, m in kind("history").items():
        units = outcomes[seed].arrays[single] if seed in outcomes else None
        if units is not None and quantity == "error":
            units = ~units
        values[seed] = _Value(float(m.arrays[key][-1]), units)
    return values


def _negative_share(eigenvalues: np.ndarray) -> np.ndarray:
    """NEP of each mini-batch (n,) of (n, k) eigenvalues; NaN where one of them is NaN."""
    return np.where(np.isnan(eigenvalues), np.nan, eigenvalues < 0).mean(axis=1)


def positive_mean(eigenvalues: np.ndarray) -> np.ndarray:
    """What each mini-batch (n,) of (n, k) eigenvalues adds to APE, a ratio of two sums.

    To first order; the mean is APE. A mini-batch that has none that are positive adds nothing.
    """
    sums = np.where(eigenvalues < 0, 0, eigenvalues).sum(axis=1)
    counts = (eigenvalues > 0).sum(axis=1)
    if not counts.any():
        return np.full(len(counts), np.nan)
    ape = sums.sum() / counts.sum()
    return ape + (sums - ape * counts) / counts.mean()


def _missing(quantity: str, variant: Variant, members: Mapping[str, Sequence[Measurement]]) -> str:
    """What of a network has not been measured, and the command that does."""
    known = [m for m in members.get(variant.text, ()) if m.name == "history"]
    if not known and not variant.options:
        return f"no training {variant.name}; studies/dispute.toml declares one"
    if not known:
        every = (m for of_text in members.values() for m in of_text)
        example = next(m for m in every if m.name == "history").checkpoint
        data = shlex.quote(example["dataset"])
        images = "" if example["images"] is None else f" --images {example['images']}"
        return (
            f"no training {variant.name}: python -m models.train --dataset {data}"
            f"{images} {variant.options} --epochs {example['recipe']['epochs']} --out NAME.pt"
        )
    path = known[0].path.with_suffix(".pt")
    if QUANTITIES[quantity].epoch == "warmup_epochs":
        path = (
            path.with_suffix("") / f"epoch{known[0].checkpoint['recipe']['warmup_epochs']:03d}.pt"
        )
    command = f"python -m analysis.{QUANTITIES[quantity].command} --ckpt {shlex.quote(str(path))}"
    return f"{QUANTITIES[quantity].symbol} {variant.name}: {command}"
