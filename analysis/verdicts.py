"""The claims of the dispute, and whether each holds in what was measured.

The rule was fixed before any network of CIFAR-100 was measured. Every claim is a difference between
two networks, or a conjunction of such differences. A difference

- that is claimed to be positive holds if its whole 95 % interval is above 0, does not hold if the
  whole interval is below 0, and is undecided otherwise;
- that is claimed not to be positive (C3: "no worse error") does not hold if its whole interval is
  above 0, holds if it is not that and the whole interval lies below a margin of non-inferiority of
  one percentage point, and is undecided otherwise.

A conjunction holds if all of its parts do, and does not hold if one of them does not.

Where three or more seeds were trained, the interval is Student's over seeds, of differences
between networks of one seed. Where there are fewer, it is a paired bootstrap over the images or
mini-batches that both networks were measured on, of the differences averaged over the seeds: it
then says nothing about other seeds. (Student's interval over two seeds is 13 standard errors wide
to either side.)
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from analysis.measurements import comparisons, labels
from analysis.measurements.files import collect, sparing
from analysis.measurements.schema import Measurement
from lossgeometry.errors import InputError
from lossgeometry.statistics import Interval, over_seeds, over_units

MARGIN = 0.01  # of the error: what counts as no worse
SEEDS = 3  # that an interval over seeds takes

Verdict = Literal["holds", "does not hold", "undecided", "not measured"]
Variant = tuple[int, int]  # window, head window


@dataclass(frozen=True)
class Quantity:
    """What is compared, and where it comes from."""

    symbol: str
    scale: float  # from what is stored to what is shown
    axis: str
    unit: str  # that both networks were measured on, and that is resampled
    command: str  # that measures it


QUANTITIES = {
    "train_nll": Quantity("NLL_train", 1, "train NLL", "train images", "nll"),
    "error": Quantity("error", 100, "error (%)", "test images", "nll"),
    "corruption": Quantity("corruption error", 100, "error (%)", "test images", "robustness"),
    "nep": Quantity("NEP", 100, "NEP at the end of warm-up (%)", "mini-batches", "hessian"),
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
    """A conjunction of parts, and what the paper reads off its Figure 7."""

    key: str
    statement: str
    parts: tuple[Part, ...]
    paper: str


CLAIMS = (
    Claim(
        "C1",
        "global attention is harder to optimise",
        (Part("train_nll", (8, 1), (5, 1)),),
        "holds: train NLL of 5×5 is below 8×8",
    ),
    Claim(
        "C2",
        "moderate locality improves the model",
        (Part("error", (8, 1), (5, 1)),),
        "holds: error of 5×5 is below 8×8",
    ),
    Claim(
        "C3",
        "too local regularises",
        (Part("train_nll", (3, 1), (5, 1)), Part("error", (3, 1), (5, 1), "<=")),
        "holds: NLL of 3×3 a little above 5×5, errors alike",
    ),
    Claim(
        "C4",
        "stronger representation generalises better",
        (Part("corruption", (3, 1), (5, 1)),),
        "holds: 5×5 is clearly more robust than 3×3",
    ),
    Claim(
        "C5",
        "locality convexifies",
        (Part("nep", (8, 1), (5, 1)), Part("nep", (8, 1), (3, 1))),
        "holds: fewer negative eigenvalues for 3×3 and 5×5",
    ),
    Claim(
        "C6",
        "head interaction is what hurts",
        tuple(
            Part(quantity, (window, 3), (window, 1))
            for window in (3, 5, 8)
            for quantity in ("train_nll", "error")
        ),
        "not in the paper: a reader's hypothesis",
    ),
)


@dataclass(frozen=True)
class Finding:
    """What was measured of a part."""

    part: Part
    interval: Interval | None
    over: str  # what the interval is over
    verdict: Verdict
    missing: tuple[str, ...] = ()  # what to measure, and by which command


@dataclass(frozen=True)
class Answer:
    """What was measured of a claim."""

    claim: Claim
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """Of the conjunction of its parts."""
        verdicts = [finding.verdict for finding in self.findings]
        order: tuple[Verdict, ...] = ("does not hold", "not measured", "undecided")
        for decisive in order:
            if decisive in verdicts:
                return decisive
        return "holds"


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
        study: [
            Answer(claim, tuple(_find(part, members) for part in claim.parts)) for claim in CLAIMS
        ]
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


def _find(part: Part, measurements: Sequence[Measurement]) -> Finding:
    """Measure a part in one study."""
    of_seed = {v: _values(part.quantity, v, measurements) for v in (part.first, part.second)}
    first, second = of_seed[part.first], of_seed[part.second]
    common = sorted(first.keys() & second.keys())
    if not common:
        lacking = [v for v, values in of_seed.items() if not values]
        missing = [_missing(part.quantity, v, measurements) for v in lacking]
        return Finding(part, None, "", "not measured", tuple(missing or ["a seed in common"]))
    if len(common) >= SEEDS:
        interval = over_seeds([first[s].value - second[s].value for s in common])
        return Finding(part, interval, f"{len(common)} seeds", decide(interval, part.sign))
    differences = []
    for seed in common:
        one, other = first[seed].units, second[seed].units
        if one is None or other is None or len(one) != len(other):
            lacking = [v for v in of_seed if of_seed[v][seed].units is None]
            missing = [_missing(part.quantity, v, measurements) for v in lacking]
            missing = missing or ["both networks measured on the same images"]
            return Finding(part, None, "", "not measured", tuple(missing))
        differences.append(one.astype(float) - other)
    if len({len(units) for units in differences}) > 1:
        missing = ["all seeds measured on the same images"]
        return Finding(part, None, "", "not measured", tuple(missing))
    interval = over_units(sum(differences) / len(differences))
    over = f"{len(differences[0])} {QUANTITIES[part.quantity].unit}"
    over += f", {len(common)} seeds" if len(common) > 1 else ""
    return Finding(part, interval, over, decide(interval, part.sign))


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
