"""Choice of the device to compute on."""

from __future__ import annotations

import torch

from models.errors import InputError


def choose_device(name: str) -> torch.device:
    """Device of the option ``--device``: auto, cpu or cuda.

    Raises `InputError` if a GPU is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda found, but PyTorch sees no GPU here, expected cpu or auto")
    return torch.device(name)
