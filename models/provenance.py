"""How the weights of a checkpoint came about: all that its file says but the weights.

Needs no PyTorch, so that what has been measured already is found before PyTorch is loaded.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from lossgeometry.errors import InputError, shown
from models.description import require_description, require_history, require_integer
from models.reading.weights import read_pickle
from models.recipes import Recipe

FORMAT = "locality-landscapes checkpoint 1"
DESCRIBED: dict[str, type | tuple[type, ...]] = {
    "architecture": dict,
    "dataset": str,
    "images": (int, type(None)),
    "recipe": dict,
    "epoch": int,
    "seed": int,
    "history": dict,
    "versions": dict,
}
_KEYS = DESCRIBED | {"state_dict": dict}


def versions() -> dict[str, str]:
    """Versions of what decides a number."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": metadata.version("torchvision"),  # which takes a second to import
        "numpy": np.__version__,
    }


@dataclass(frozen=True)
class Provenance:
    """Of which training, at which epoch, the weights of a checkpoint are."""

    architecture: dict[str, Any]  # as `models.networks` reads it
    dataset: str  # a spec of `load_dataset`
    images: int | None  # the first so many training images were used; None: all
    recipe: Recipe
    epoch: int
    seed: int
    history: dict[str, list[float]]  # one entry an epoch, the first before training
    versions: dict[str, str] = field(default_factory=versions)
    path: Path | None = None  # of the file
    sha256: str | None = None  # of that file


def read_provenance(path: str | Path) -> Provenance:
    """Of a checkpoint of this project; `models.checkpoint.load_checkpoint` reads the weights, too.

    Raises
    ------
    InputError
        If the file is missing, is damaged, or is not a checkpoint of this project. Nothing in it is
        executed.
    """
    path = Path(path)
    return provenance(read_content(path, weights=False), path)


def read_content(path: Path, *, weights: bool) -> dict[str, Any]:
    """What is in the file of a checkpoint, of the kinds that are expected.

    Raises `InputError` if it is not a checkpoint of this project.
    """
    content = read_pickle(path, weights=weights)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = shown(content.get("format") if isinstance(content, dict) else content)
        raise InputError(
            f"{path}: its format is {found}, expected {FORMAT!r}; --model names the model of other "
            "weights"
        )
    for key, kind in _KEYS.items():
        if key not in content or not isinstance(content[key], kind):
            raise InputError(f"{path}: the checkpoint has no usable {key!r}, expected {kind}")
    if not all(isinstance(text, str) for pair in content["versions"].items() for text in pair):
        raise InputError(f"{path}: the checkpoint has no usable 'versions', expected texts")
    return content


def provenance(content: dict[str, Any], path: Path) -> Provenance:
    """What `content` of the file at `path` says; raises `InputError` if it is not usable."""
    try:
        require_description(content)
        recipe = Recipe(**content["recipe"])
        require_integer("epoch", content["epoch"], 0, recipe.epochs)
        if content["history"]:
            require_history(content["history"])
    except (TypeError, InputError) as error:
        raise misfit(path, error) from error
    return Provenance(
        recipe=recipe,
        path=path,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        **{key: content[key] for key in DESCRIBED if key != "recipe"},
    )


def misfit(path: Path, error: Exception) -> InputError:
    """That the options in the file at `path` do not describe a network or a training."""
    return InputError(f"{path}: the checkpoint's options do not fit: {str(error)[:300]}")
