"""Choice of the device to compute on, and of its precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lossgeometry.errors import InputError


def choose_device(name: str) -> torch.device:
    """Device of the option ``--device``: auto, cpu or cuda.

    Raises `InputError` if a GPU is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda found, but PyTorch sees no GPU here, expected cpu or auto")
    return torch.device(name)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in the dtype of their operands, where cuDNN would round float32 to TF32.

    PyTorch lets it unless told otherwise; the ten bits of a mantissa that remain are enough to
    train with and too few for a second derivative.
    """
    try:
        before = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set for each operation apart, by someone who has thought about it
        yield
        return
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def default_memory(device: torch.device) -> int:
    """Bytes for what products have in common: half of what is free on a GPU, else 2 GiB."""
    if device.type != "cuda":
        return 2 * 1024**3
    free, _ = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + idle) // 2
