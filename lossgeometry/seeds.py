"""Independent random streams from one stored seed, and the global generators."""

# ruff: noqa: NPY002 - what models draw from are NumPy's legacy numbers.

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from lossgeometry.errors import InputError, shown


def derive_seed(seed: int, *path: int) -> int:
    """Seed of the stream at `path`, e.g. ``(epoch, batch)``, below `seed`; a 63-bit integer.

    Streams of different paths of one length are independent (numpy's `SeedSequence`; zeros at the
    end of a path do not count), so that any of them can be drawn again without those before it.
    Raises `InputError` if `seed` is negative or has more than 63 bits.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"seed: {shown(seed)} found, expected at least 0, below 2^63")
    return int(np.random.SeedSequence((seed, *path)).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def untouched_rng(device: torch.device, *, torch_alone: bool = False) -> Iterator[None]:
    """Put the global random states back afterwards: PyTorch's, and NumPy's and Python's as well."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if torch_alone:
            yield
            return
        python, arrays = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def seed_everything(device: torch.device, seed: int, *, torch_alone: bool = False) -> None:
    """Seed the global generators of the CPU and of `device`, and of no other device."""
    if not torch_alone:
        random.seed(seed)
        np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def drawn_since_seeded(device: torch.device, seed: int) -> bool:
    """Whether random numbers have been drawn since ``seed_everything(device, seed)``."""
    drawn = _states(device)
    with seeded(device, seed):
        return drawn != _states(device)


def _states(device: torch.device) -> list[object]:
    _, keys, *position = np.random.get_state()
    tensors = [torch.get_rng_state()]
    if device.type == "cuda":
        tensors.append(torch.cuda.get_rng_state(device))
    arrays = [np.asarray(keys), *(tensor.numpy() for tensor in tensors)]
    return [random.getstate(), position, *(array.tobytes() for array in arrays)]


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Inside, the global generators draw from `seed`; outside, nothing has happened."""
    with untouched_rng(device):
        seed_everything(device, seed)
        yield


class Stream:
    """Numbers that the CPU's global generator draws from `seed` on, in portions.

    Each ``with stream:`` goes on where the one before has ended; outside, nothing has happened.
    """

    def __init__(self, seed: int) -> None:
        self._state = torch.Generator().manual_seed(seed).get_state()

    def __enter__(self) -> None:
        self._outside = torch.get_rng_state()
        torch.set_rng_state(self._state)

    def __exit__(self, *exception: object) -> None:
        self._state = torch.get_rng_state()
        torch.set_rng_state(self._outside)
