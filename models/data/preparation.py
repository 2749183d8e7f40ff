"""How images are brought to one size and normalised before a network sees them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossgeometry.errors import InputError, shown
from models.description import require, require_integer, require_number
from models.specs import split_spec

if TYPE_CHECKING:
    from PIL import Image

_DEFAULTS = {"crop_pct": 0.875, "interpolation": "bilinear", "crop_mode": "center"}
_KNOWN = {"interpolation": ("bilinear", "bicubic"), "crop_mode": ("center", "squash")}


@dataclass(frozen=True)
class Preparation:
    """What the spec of a dataset says after its ``?``; None is not said.

    With an `image_size`, images are resized and their centre is cut out, as torchvision and timm do
    to evaluate a network: the shorter side, or with the `crop_mode` "squash" both, becomes
    ``image_size / crop_pct`` pixels long. What is not said of this is as in torchvision's
    evaluation of ImageNet: ``crop_pct=0.875``, "bilinear", "center".
    """

    image_size: int | None = None  # pixels along each side
    crop_pct: float | None = None
    interpolation: str | None = None
    crop_mode: str | None = None
    mean: tuple[float, ...] | None = None  # of each channel, or one of all, pixels in [0, 1]
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Raise `InputError` if a value is out of range."""
        if self.image_size is None:
            for name in _DEFAULTS:
                value = getattr(self, name)
                require(value is None, name, value, "an image_size beside it")
        else:
            require_integer("image-size", self.image_size, 1, 2**14)
        if self.crop_pct is not None:
            require_number("crop_pct", self.crop_pct, 0.1, 10)
        for name, known in _KNOWN.items():
            value = getattr(self, name)
            require(value is None or value in known, name, value, f"one of {', '.join(known)}")
        means, stds = self.mean or (), self.std or ()
        for mean in means:
            require_number("mean", mean, 0, 1)
        for std in stds:
            require_number("std", std, 1e-6, 1e6)
        if len(means) != len(stds):
            raise InputError(
                f"std: {len(stds)} numbers found, expected {len(means)}, as many as of mean"
            )

    def spec(self, dataset: str) -> str:
        """The spec of a dataset that is prepared like this."""
        texts = {
            name: ",".join(map(repr, value)) if isinstance(value, tuple) else str(value)
            for name, value in asdict(self).items()
            if value is not None
        }
        query = "&".join(f"{key}={text}" for key, text in texts.items())
        return f"{dataset}?{query}" if query else dataset

    def completed(self, config: object, channels: int) -> Preparation:
        """With what timm's ``pretrained_cfg`` of a model says and this does not."""
        if not isinstance(config, Mapping):
            return self
        found: dict[str, Any] = {}
        if self.image_size is not None:
            found = {name: config.get(name) for name in _DEFAULTS if getattr(self, name) is None}
        mean, std = config.get("mean"), config.get("std")
        if self.mean is None and mean and std and len(mean) == len(std) == channels:
            found |= {"mean": tuple(mean), "std": tuple(std)}
        return replace(self, **found)

    def fit(self, image: Image.Image) -> Image.Image:
        """The image in the size that is asked for."""
        if self.image_size is None:
            return image
        from torchvision.transforms import InterpolationMode, functional

        side, interpolation, squash = self._resizing()
        size = [side, side] if squash else [side]
        resized = functional.resize(image, size, InterpolationMode(interpolation))
        return functional.center_crop(resized, [self.image_size, self.image_size])

    def resizing(self) -> str:
        """In words, how `fit` brings images to one size."""
        side, interpolation, squash = self._resizing()
        sides = "both sides" if squash else "the shorter side"
        crop = f"{self.image_size} x {self.image_size}"
        return f"{sides} resized to {side} ({interpolation}), centre of {crop}"

    def _resizing(self) -> tuple[int, str, bool]:
        """Pixels along a side before the crop, the interpolation, whether it is of both sides."""
        how: dict[str, Any] = {
            name: getattr(self, name) or usual for name, usual in _DEFAULTS.items()
        }
        side = math.floor((self.image_size or 0) / how["crop_pct"])
        return side, how["interpolation"], how["crop_mode"] == "squash"


def parse(spec: str | Path) -> tuple[str, Preparation]:
    """The name or path of a dataset, and how its images are prepared.

    Raises `InputError` if the spec is malformed.
    """
    if isinstance(spec, Path) or os.path.exists(spec):  # whatever its name
        return str(spec), Preparation()
    known = [field.name for field in fields(Preparation)]
    expected = f"expected DATA?key=1&key=2 of {', '.join(known)}"
    name, options = split_spec(spec, "dataset", expected)
    for key in options:
        if key not in known:
            raise InputError(f"dataset: {shown(key)} found in {shown(spec)}, {expected}")
    for key in options.keys() & {"mean", "std"}:
        value = options[key]
        options[key] = tuple(value) if isinstance(value, tuple | list) else (value,)
    return name, Preparation(**options)


def prepared(
    spec: str,
    image_size: int | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
) -> str:
    """The spec of a dataset with the options of a command line instead of its own."""
    name, own = parse(spec)
    changed = replace(
        own,
        image_size=own.image_size if image_size is None else image_size,
        mean=mean or own.mean,
        std=std or own.std,
    )
    return changed.spec(name)
