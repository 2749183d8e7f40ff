"""What checkpoints and measurements say of a training, checked for what later code relies on.

Needs no PyTorch. Errors name what was found and what was expected, not the file: the caller does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lossgeometry.errors import InputError, shown

MAX_SEED = 2**63 - 1
SCORES = ("train_nll", "train_error", "test_nll", "test_error")
# Networks of `models.pyramids`, whose range is not an option.
PYRAMIDS = ("resnet", "vit", "pit", "swin")
_PLAIN = re.compile(r"[\w.+-]{1,80}")  # such texts become parts of file names


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise `InputError` unless `condition` holds of the `value` of an option."""
    if not condition:
        raise InputError(f"{name}: {shown(value)} is not usable, expected {expected}")


def require_integer(name: str, value: object, low: int, high: int) -> None:
    """Raise `InputError` unless `value` is an integer, no bool, from `low` to `high`."""
    expected = f"at least {low}" if isinstance(value, int) and value < low else f"{low} to {high}"
    fits = type(value) is int and low <= value <= high
    require(fits, name, value, expected if type(value) is int else f"an integer, {expected}")


def require_number(name: str, value: object, low: float, high: float) -> None:
    """Raise `InputError` unless `value` is a number from `low` to `high`."""
    fits = type(value) in (int, float) and low <= value <= high  # type: ignore[operator]
    require(fits, name, value, f"a number from {low:g} to {high:g}")


def token_range(architecture: Mapping[str, Any]) -> int | None:
    """Tokens along each side of the square, around a token, that its mixer sees.

    Of the networks of `models.isotropic`, as their `range` is, without building them: 2 g - 1 on
    g x g tokens is global. Those of `PYRAMIDS` are of no one range: None.
    """
    if architecture.get("network") in PYRAMIDS:
        return None
    grid = architecture["image_size"] // architecture["patch_size"]
    if "window" in architecture:
        window = architecture["window"]
        return window if window < grid else 2 * grid - 1
    kernel, d = architecture["kernel_size"], architecture.get("dilation", 1)
    seen = 2 * d - 2 + (-(-kernel // d) - 1) * d + 1  # kernel, where it is not dilated
    return min(seen, 2 * grid - 1)


def require_description(found: Mapping[str, Any]) -> None:
    """Raise `InputError` unless this describes a training, as `measurements.describe` does."""
    for key in ("architecture", "recipe"):
        options = found.get(key)
        require(isinstance(options, dict), key, options, "a dictionary")
        for name, value in options.items():  # type: ignore[union-attr]
            require(isinstance(name, str) and bool(_PLAIN.fullmatch(name)), key, name, "a name")
            fits = isinstance(value, float | None)
            if (key, name) == ("architecture", "model"):  # a spec of `models.factory`
                fits = isinstance(value, str) and value.isprintable() and len(value) <= 1000
            elif isinstance(value, str):
                fits = bool(_PLAIN.fullmatch(value))
            elif isinstance(value, int):
                fits = abs(value) < 2**63
            require(fits, name, value, "a number or a word")
    dataset = found.get("dataset")
    # A path; its last part becomes a part of file names and titles.
    plain = isinstance(dataset, str) and len(dataset) < 4096 and dataset.isprintable()
    require(plain, "dataset", dataset, "a name")
    if found.get("images") is not None:
        require_integer("images", found["images"], 1, 2**40)
    require_integer("epoch", found.get("epoch"), 0, 10**6)
    require_integer("seed", found.get("seed"), 0, MAX_SEED)


def require_history(history: Mapping[str, Any]) -> None:
    """Raise `InputError` unless this is the history of a training: equally long columns."""
    for name in ("epoch", *SCORES):
        require(name in history, "history", list(history), f"a column {name}")
    length = len(history["epoch"]) if isinstance(history["epoch"], list) else 0
    for name, values in history.items():
        require(isinstance(name, str), "history", name, "names of columns")
        fits = isinstance(values, list) and 0 < length == len(values)
        require(
            fits and all(type(value) in (int, float) for value in values),
            shown(name),
            values,
            "a list of numbers, one for each epoch",
        )
