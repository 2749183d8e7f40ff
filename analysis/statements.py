"""The claims of the dispute: what is compared with what, and what is claimed of the difference.

C1 to C6 are about the windows of one network, as they were made in the thread. D1 to D6 are about
what the reader held against them, networks of other mixers that see as far; F4 to F6 about the
paper's Figures 4 to 6; both were fixed before any network of the study that decides them was
trained. `analysis.verdicts` judges them, and says when the rules were fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Quantity:
    """What is compared, and where it comes from."""

    symbol: str
    scale: float  # from what is stored to what is shown
    axis: str
    unit: str  # that all networks were measured on
    sampled: bool  # whether the units are some of many, rather than all there are
    command: str  # that measures it
    epoch: Literal["epochs", "warmup_epochs"] = "epochs"  # of the recipe, at whose end it is


QUANTITIES = {
    "train_nll": Quantity("NLL_train", 1, "train NLL", "train images", False, "nll"),
    "error": Quantity("error", 100, "error (%)", "test images", True, "nll"),
    "corruption": Quantity("corruption error", 100, "error (%)", "test images", True, "robustness"),
    "nep": Quantity("NEP", 100, "NEP (%)", "mini-batches", True, "hessian", "warmup_epochs"),
    "ape": Quantity("APE", 1, "APE", "mini-batches", True, "hessian", "warmup_epochs"),
}


@dataclass(frozen=True)
class Variant:
    """Networks that differ in their seeds alone."""

    text: str  # in a formula, see `comparisons.in_study` and `comparisons.in_families`
    options: str = ""  # of models.train, by which a missing one can be made

    @property
    def name(self) -> str:
        """In a sentence, after what is asked of it."""
        if not self.options:
            return f"of {self.text}"
        options = self.options.removeprefix("--").split(" --")
        return "with " + ", ".join(option.replace("-", " ") for option in options)


@dataclass(frozen=True)
class Part:
    """A sum of networks less a sum of others, and the side of 0 that it is claimed to be on."""

    quantity: str  # of QUANTITIES
    plus: tuple[Variant, ...]
    minus: tuple[Variant, ...]
    sign: Literal[">", "<="] = ">"

    @property
    def text(self) -> str:
        """In a formula, e.g. ``NLL_train(8) - NLL_train(5) > 0``."""
        quantity = QUANTITIES[self.quantity]
        plus, minus = (
            [f"{quantity.symbol}({v.text})" for v in own] for own in (self.plus, self.minus)
        )
        text = f"{plus[0]} - {minus[0]}"
        for one, other in zip(minus[1:], plus[1:], strict=True):
            text += f" - [{one} - {other}]"
        when = " at the end of warm-up" if quantity.epoch == "warmup_epochs" else ""
        return f"{text} {'≤' if self.sign == '<=' else '>'} 0{when}"


def difference(
    quantity: str, first: Variant, second: Variant, sign: Literal[">", "<="] = ">"
) -> Part:
    """Of one network from another."""
    return Part(quantity, (first,), (second,), sign)


def interaction(
    quantity: str, ours: tuple[Variant, Variant], theirs: tuple[Variant, Variant]
) -> Part:
    """How much more one difference is than another."""
    (first, second), (third, fourth) = ours, theirs
    return Part(quantity, (first, fourth), (second, third))


@dataclass(frozen=True)
class Claim:
    """A conjunction of parts."""

    key: str
    statement: str
    parts: tuple[Part, ...]
    paper: str  # the verdict that it reads off its own figure


def _window(window: int, heads: int = 1) -> Variant:
    text = f"{window}, {heads} heads" if heads > 1 else str(window)
    return Variant(text, f"--window {window} --head-window {heads}")


_3, _5, _8 = map(_window, (3, 5, 8))

OF_WINDOWS = (
    Claim(
        "C1",
        "global attention is harder to optimise",
        (difference("train_nll", _8, _5),),
        "holds",
    ),
    Claim("C2", "moderate locality improves the model", (difference("error", _8, _5),), "holds"),
    Claim(
        "C3",
        "too local regularises",
        (difference("train_nll", _3, _5), difference("error", _3, _5, "<=")),
        "holds",
    ),
    Claim(
        "C4",
        "stronger representation generalises better",
        (difference("corruption", _3, _5),),
        "holds",
    ),
    Claim(
        "C5",
        "locality convexifies",
        (difference("nep", _8, _5), difference("nep", _8, _3)),
        "holds",
    ),
    Claim(
        "C6",
        "head interaction is what hurts",
        tuple(
            difference(quantity, _window(window, 3), _window(window))
            for window in (3, 5, 8)
            for quantity in ("train_nll", "error")
        ),
        "–",
    ),
)

STATIC = ("ConvNeXt", "RepLKNet")  # whose weights do not depend on the data


def _member(network: str, reach: str) -> Variant:
    return Variant(f"{network} {reach}")


def _far_and_near(network: str) -> tuple[Variant, Variant]:
    return _member(network, "global"), _member(network, "5×5")


def _hinders(key: str, network: str, what: str, paper: str = "–") -> Claim:
    part = difference("train_nll", *_far_and_near(network))
    return Claim(key, f"range hinders optimisation in {what}", (part,), paper)


_RESNET, _PIT, _SWIN = map(Variant, ("ResNet", "PiT", "Swin"))
_VIT, _VIT_GAP = Variant("ViT (CLS)"), Variant("ViT (GAP)")

OF_FAMILIES = (
    _hinders("D1", "CSAN", "attention", "holds"),
    _hinders("D2", "ConvNeXt", "ConvNeXt"),
    _hinders("D3", "RepLKNet", "RepLKNet"),
    _hinders("D4", "VAN", "VAN"),
    Claim(
        "D5",
        "range hinders attention more than static convolutions",
        tuple(
            interaction("train_nll", _far_and_near("CSAN"), _far_and_near(other))
            for other in STATIC
        ),
        "–",
    ),
    Claim(
        "D6",
        "at equal range, attention has lower train NLL and error than static convolutions",
        tuple(
            difference(quantity, _member(other, reach), _member("CSAN", reach))
            for quantity in ("train_nll", "error")
            for other in STATIC
            for reach in ("5×5", "global")
        ),
        "–",
    ),
    Claim(
        "F4",
        "a ViT has more negative and smaller max eigenvalues than a ResNet",
        (difference("nep", _VIT, _RESNET), difference("ape", _RESNET, _VIT)),
        "holds",
    ),
    Claim(
        "F5",
        "the weaker the bias, the higher train NLL and error",
        tuple(
            difference(quantity, weaker, stronger)
            for quantity in ("train_nll", "error")
            for weaker, stronger in ((_VIT, _PIT), (_PIT, _SWIN))
        ),
        "holds",
    ),
    Claim(
        "F6",
        "average pooling has fewer negative max eigenvalues than a class token",
        (difference("nep", _VIT, _VIT_GAP),),
        "holds",
    ),
)
