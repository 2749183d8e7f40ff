"""The claims of the dispute, and whether each holds in what was measured.

Every claim is a difference between two networks, or a conjunction of such differences. A difference

- that is claimed to be positive holds if its whole 95 % interval is above 0, does not hold if the
  whole interval is below 0, and is undecided otherwise;
- that is claimed not to be positive (C3: "no worse error") does not hold if its whole interval is
  above 0, holds if it is not that and the whole interval lies below a margin of non-inferiority of
  one percentage point, and is undecided otherwise.

A conjunction holds if all of its parts do, and does not hold if one of them does not.

The interval is Student's over differences between networks of one seed, and there is no verdict
with fewer than three seeds: of one network it is over the images or mini-batches, and says nothing
about other seeds. Where what is measured is a sample that all seeds share (test images,
mini-batches; not the training set, which is all there is), what its choice adds is added
(`analysis.intervals`).

Beside each verdict stand two others. Holm's is what is left when all differences of a study are
judged at once, at a family-wise 5 % (Holm 1979). The unpaired one does not use which seeds belong
together, and is named where it is another.

When this was fixed: the rule of the two signs and of Student's interval before any network of
CIFAR-100 was measured, but six hours after those of the digits that C1, C2, C3 and C5 are about.
The interval over shared units, Holm's verdicts, and that single networks get none, came after all
of these results.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from analysis.intervals import Interval, of_shared_units, over_units, paired, unpaired
from analysis.measurements import comparisons, labels
from analysis.measurements.files import collect, sparing
from analysis.measurements.schema import Measurement
from lossgeometry.errors import InputError

MARGIN = 0.01  # of the error: what counts as no worse
SEEDS = 3  # that a verdict takes
LEVEL = 0.05

Verdict = Literal["holds", "does not hold", "undecided", "no verdict", "not measured"]
Variant = tuple[int, int]  # window, head window


@dataclass(frozen=True)
class Quantity:
    """What is compared, and where it comes from."""

    symbol: str
    scale: float  # from what is stored to what is shown
    axis: str
    unit: str  # that both networks were measured on
    sampled: bool  # whether the units are some of many, rather than all there are
    command: str  # that measures it


QUANTITIES = {
    "train_nll": Quantity("NLL_train", 1, "train NLL", "train images", False, "nll"),
    "error": Quantity("error", 100, "error (%)", "test images", True, "nll"),
    "corruption": Quantity("corruption error", 100, "error (%)", "test images", True, "robustness"),
    "nep": Quantity("NEP", 100, "NEP (%)", "mini-batches", True, "hessian"),
}


@dataclass(frozen=True)
class Part:
    """A difference between two networks, and the side of 0 that it is claimed to be on."""

    quantity: str  # of QUANTITIES
    first: Variant
    second: Variant
    sign: Literal[">", "<="] = ">"

    @property
    def text(self) -> str:
        """In a formula, e.g. ``NLL_train(8) - NLL_train(5) > 0``."""
        symbol = QUANTITIES[self.quantity].symbol
        heads = self.first[1] > 1 or self.second[1] > 1
        one, other = (
            f"{symbol}({w}" + (f", {h} head{'s' if h > 1 else ''})" if heads else ")")
            for w, h in (self.first, self.second)
        )
        when = " at the end of warm-up" if self.quantity == "nep" else ""
        return f"{one} - {other} {'≤' if self.sign == '<=' else '>'} 0{when}"


@dataclass(frozen=True)
class Claim:
    """A conjunction of parts."""

    key: str
    statement: str
    parts: tuple[Part, ...]
    paper: str  # the verdict that it reads off its own figure


CLAIMS = (
    Claim(
        "C1",
        "global attention is harder to optimise",
        (Part("train_nll", (8, 1), (5, 1)),),
        "holds",
    ),
    Claim(
        "C2",
        "moderate locality improves the model",
        (Part("error", (8, 1), (5, 1)),),
        "holds",
    ),
    Claim(
        "C3",
        "too local regularises",
        (Part("train_nll", (3, 1), (5, 1)), Part("error", (3, 1), (5, 1), "<=")),
        "holds",
    ),
    Claim(
        "C4",
        "stronger representation generalises better",
        (Part("corruption", (3, 1), (5, 1)),),
        "holds",
    ),
    Claim(
        "C5",
        "locality convexifies",
        (Part("nep", (8, 1), (5, 1)), Part("nep", (8, 1), (3, 1))),
        "holds",
    ),
    Claim(
        "C6",
        "head interaction is what hurts",
        tuple(
            Part(quantity, (window, 3), (window, 1))
            for window in (3, 5, 8)
            for quantity in ("train_nll", "error")
        ),
        "–",
    ),
)


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
    places = list(places)
    groups = ("history", "outcomes", "robustness", "hessian/train")
    found = [m for group in groups for m in collect(places, group, left_out)]
    return sparing(_answers, found, left_out)


def _answers(measurements: Sequence[Measurement]) -> dict[str, list[Answer]]:
    return {
        study: _corrected(
            [Answer(claim, tuple(_find(p, members) for p in claim.parts)) for claim in CLAIMS]
        )
        for study, members in comparisons.studies(measurements).items()
        if any(m.name == "history" and labels.network(m) == "csan" for m in members)
    }


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


def _find(part: Part, measurements: Sequence[Measurement]) -> Finding:
    """Measure a part in one study."""
    quantity = QUANTITIES[part.quantity]
    of_seed = {v: _values(part.quantity, v, measurements) for v in (part.first, part.second)}
    first, second = of_seed[part.first], of_seed[part.second]
    common = sorted(first.keys() & second.keys())
    if not common:
        lacking = [v for v, values in of_seed.items() if not values]
        missing = [_missing(part.quantity, v, measurements) for v in lacking]
        missing = missing or ["a seed in common"]
        return Finding(part, None, "", "not measured", missing=tuple(missing))
    units = _differences([(first[seed].units, second[seed].units) for seed in common])
    if len(common) >= SEEDS:
        values = [first[s].value for s in common], [second[s].value for s in common]
        intervals, over = [paired(*values), unpaired(*values)], f"{len(common)} seeds"
        if units is not None and quantity.sampled:
            shared = of_shared_units(units)
            intervals = [replace(i, parts=(*i.parts, shared)) for i in intervals]
            over += f" × {units.shape[1]} {quantity.unit}"
        verdict, otherwise = (decide(interval, part.sign) for interval in intervals)
        return Finding(part, intervals[0], over, verdict, unpaired=otherwise)
    if units is None:
        lacking = [v for v in of_seed if any(of_seed[v][s].units is None for s in common)]
        missing = [_missing(part.quantity, v, measurements) for v in lacking]
        missing = missing or ["all networks measured on the same images"]
        return Finding(part, None, "", "not measured", missing=tuple(missing))
    over = (
        f"{'one network' if len(common) == 1 else 'two networks'}, {units.shape[1]} {quantity.unit}"
    )
    return Finding(part, over_units(units.mean(axis=0)), over, "no verdict")


def _differences(pairs: Sequence[tuple[np.ndarray | None, np.ndarray | None]]) -> np.ndarray | None:
    """Of pairs of networks, on each unit: (seeds, units); None unless all are of the same units."""
    arrays = [units for pair in pairs for units in pair if units is not None]
    if len(arrays) < 2 * len(pairs) or len({len(units) for units in arrays}) > 1:
        return None
    return np.array(arrays[::2], dtype=float) - np.array(arrays[1::2], dtype=float)


@dataclass(frozen=True)
class _Value:
    """Of one network: the value, and that of each unit (n,), where it was kept."""

    value: float
    units: np.ndarray | None


def _values(
    quantity: str, variant: Variant, measurements: Sequence[Measurement]
) -> dict[int, _Value]:
    """A quantity of all networks of a window and head window, by their seeds."""

    def kind(name: str, *, epoch: str = "epochs") -> dict[int, Measurement]:
        found = [
            m
            for m in measurements
            if m.name == name and m.checkpoint["epoch"] == m.checkpoint["recipe"][epoch]
        ]
        alike = labels.measured_alike(found) if found else []
        own = [m for m in alike if comparisons.variant(m) == variant]
        return {m.checkpoint["seed"]: m for m in reversed(own)}

    if quantity == "nep":
        return {
            seed: _Value(float(m.arrays["nep"]), _negative_share(m.arrays["eigenvalues"]))
            for seed, m in kind("hessian/train", epoch="warmup_epochs").items()
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


def _missing(quantity: str, variant: Variant, measurements: Sequence[Measurement]) -> str:
    """What of a network has not been measured, and the command that does."""
    window, heads = variant
    known = [m for m in measurements if m.name == "history" and comparisons.variant(m) == variant]
    what = f"window {window}, head window {heads}"
    if not known:
        example = next(m for m in measurements if m.name == "history").checkpoint
        data = shlex.quote(example["dataset"])
        images = "" if example["images"] is None else f" --images {example['images']}"
        return (
            f"no training with {what}: python -m models.train --dataset {data}"
            f"{images} --window {window} --head-window {heads} "
            f"--epochs {example['recipe']['epochs']} --out NAME.pt"
        )
    path = known[0].path.with_suffix(".pt")
    if quantity == "nep":
        path = (
            path.with_suffix("") / f"epoch{known[0].checkpoint['recipe']['warmup_epochs']:03d}.pt"
        )
    command = f"python -m analysis.{QUANTITIES[quantity].command} --ckpt {shlex.quote(str(path))}"
    return f"{QUANTITIES[quantity].symbol} with {what}: {command}"
