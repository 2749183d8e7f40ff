"""Checkpoints: the weights of a model and how they came about, in one file that runs no code."""

from __future__ import annotations

import hashlib
import io
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossgeometry.errors import InputError, shown
from models.description import require_description, require_history, require_integer
from models.files import replacing
from models.networks import build_network
from models.reading.weights import read_pickle
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
        "torchvision": metadata.version("torchvision"),  # which takes a second to import
        "numpy": np.__version__,
    }


@dataclass(frozen=True)
class Checkpoint:
    """A model at some epoch of its training, with all that is needed to rebuild its objective."""

    model: nn.Module
    architecture: dict[str, Any]  # as `models.networks` reads it
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
        content["recipe"] = self.recipe.options()
        # Copies, as the weights may be pieces of something larger, which would be written whole.
        state = self.model.state_dict()
        content["state_dict"] = {k: v.to("cpu", copy=True) for k, v in state.items()}
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
        require_description(content)
        recipe = Recipe(**content["recipe"])
        require_integer("epoch", content["epoch"], 0, recipe.epochs)
        if content["history"]:
            require_history(content["history"])
        most = max(len(content["state_dict"]), 1)
        require_integer("depth", content["architecture"].get("depth"), 1, most)
        # Four times the file's bytes: what the options ask for may be anything.
        at_most = {"most_weights": path.stat().st_size}
        model = build_network(content["architecture"] | at_most)
    except (TypeError, InputError) as error:
        reason = str(error)[:300]
        raise InputError(f"{path}: the checkpoint's options do not fit: {reason}") from error
    if misfit := _misfit(content["state_dict"], model.state_dict()):
        raise InputError(f"{path}: the weights do not fit the architecture: {misfit}")
    model.load_state_dict(dict(content["state_dict"]))
    keys = ("architecture", "dataset", "images", "epoch", "seed", "history", "versions")
    return Checkpoint(
        model=model.eval(),
        recipe=recipe,
        path=path,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        **{key: content[key] for key in keys},
    )


def _misfit(found: dict[Any, Any], expected: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the weights in a file, if anything is."""
    for name in expected.keys() - found.keys():
        return f"{name} is missing"
    for name, tensor in found.items():
        if name not in expected:
            return f"{shown(name)} found, which it does not have"
        kind = expected[name].dtype
        if not isinstance(tensor, Tensor) or tensor.dtype != kind:
            return f"{name} is no {str(kind).removeprefix('torch.')} tensor"
        if tensor.shape != expected[name].shape:
            return f"{name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
    return None


def _read(path: Path) -> dict[str, Any]:
    content = read_pickle(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = shown(content.get("format") if isinstance(content, dict) else content)
        raise InputError(f"{path}: its format is {found}, expected {FORMAT!r}")
    for key, kind in _KEYS.items():
        if key not in content or not isinstance(content[key], kind):
            raise InputError(f"{path}: the checkpoint has no usable {key!r}, expected {kind}")
    if not all(isinstance(text, str) for pair in content["versions"].items() for text in pair):
        raise InputError(f"{path}: the checkpoint has no usable 'versions', expected texts")
    return content
