"""Checkpoints: the weights of a model and how they came about, in one file that runs no code."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossgeometry.errors import InputError, shown
from models.description import require_integer
from models.files import replacing
from models.networks import build_network
from models.provenance import DESCRIBED, FORMAT, Provenance, misfit, provenance, read_content


@dataclass(frozen=True)
class Checkpoint(Provenance):
    """A model at some epoch of its training, with all that is needed to rebuild its objective."""

    model: nn.Module = field(kw_only=True)

    def save(self, path: Path) -> None:
        """Write to `path`, whole or not at all."""
        content = {key: getattr(self, key) for key in DESCRIBED if key != "recipe"}
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
    content = read_content(path, weights=True)
    found = provenance(content, path)
    try:
        most = max(len(content["state_dict"]), 1)
        require_integer("depth", found.architecture.get("depth"), 1, most)
        # Four times the file's bytes: what the options ask for may be anything.
        model = build_network(found.architecture | {"most_weights": path.stat().st_size})
    except (TypeError, InputError) as error:
        raise misfit(path, error) from error
    if difference := _difference(content["state_dict"], model.state_dict()):
        raise InputError(f"{path}: the weights do not fit the architecture: {difference}")
    model.load_state_dict(dict(content["state_dict"]))
    return Checkpoint(model=model.eval(), **vars(found))


def _difference(found: dict[Any, Any], expected: Mapping[str, Tensor]) -> str | None:
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
