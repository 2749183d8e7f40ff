"""Checkpoints: the weights of a model and how they came about, in one file that runs no code."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

from models.csan import CSAN
from models.errors import InputError
from models.files import replacing
from models.recipes import Recipe

FORMAT = "locality-landscapes checkpoint 1"
_KEYS: dict[str, type | tuple[type, ...]] = {
    "architecture": dict,
    "dataset": str,
    "images": (int, type(None)),
    "recipe": dict,
    "epoch": int,
    "seed": int,
    "history": dict,
    "versions": dict,
    "state_dict": dict,
}


def versions() -> dict[str, str]:
    """Versions of what decides a number."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }


@dataclass(frozen=True)
class Checkpoint:
    """A model at some epoch of its training, with all that is needed to rebuild its objective."""

    model: nn.Module
    architecture: dict[str, Any]  # options of CSAN
    dataset: str  # a spec of `load_dataset`
    images: int | None  # the first so many training images were used; None: all
    recipe: Recipe
    epoch: int
    seed: int
    history: dict[str, list[float]]  # one entry an epoch, the first before training
    versions: dict[str, str] = field(default_factory=versions)
    path: Path | None = None  # where it was loaded from
    sha256: str | None = None  # of that file

    def save(self, path: Path) -> None:
        """Write to `path`, whole or not at all."""
        content = {key: getattr(self, key) for key in _KEYS if key not in ("recipe", "state_dict")}
        content["recipe"] = dataclasses.asdict(self.recipe)
        content["state_dict"] = {k: v.cpu() for k, v in self.model.state_dict().items()}
        save({"format": FORMAT, **content}, path)


def save(content: Mapping[str, Any], path: Path) -> None:
    """``torch.save``, whole or not at all.

    Raises `OSError`, which names `path`, if it cannot be written.
    """
    file = io.BytesIO()  # PyTorch's own files would not say that the disk is full
    torch.save(dict(content), file)
    with replacing(path) as partial:
        partial.write_bytes(file.getbuffer())


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Rebuild the model of a checkpoint, in evaluation mode on the CPU.

    Raises
    ------
    InputError
        If the file is missing, is not a checkpoint of this project, or its weights do not fit its
        architecture. Nothing in the file is executed.
    """
    path = Path(path)
    content = _read(path)
    try:
        recipe = Recipe(**content["recipe"])
        model = CSAN(**content["architecture"])
    except (TypeError, InputError) as error:
        raise InputError(f"{path}: the checkpoint's options do not fit: {error}") from error
    try:
        model.load_state_dict(content["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()).partition(": ")[2]
        raise InputError(f"{path}: the weights do not fit the architecture: {reason}") from error
    keys = ("architecture", "dataset", "images", "epoch", "seed", "history", "versions")
    return Checkpoint(
        model=model.eval(),
        recipe=recipe,
        path=path,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        **{key: content[key] for key in keys},
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file, expected a checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file fails in any way it likes
        reason = "it would run code" if "GLOBAL" in str(error) else "it is damaged"
        raise InputError(
            f"{path}: not a checkpoint ({reason}), expected a file that models.train wrote"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path}: its format is {found!r}, expected {FORMAT!r}")
    for key, kind in _KEYS.items():
        if not isinstance(content.get(key), kind):
            raise InputError(f"{path}: the checkpoint has no usable {key!r}, expected {kind}")
    return content
