"""Independent random streams from one stored seed."""

import numpy as np

from models.errors import InputError


def derive_seed(seed: int, *path: int) -> int:
    """Seed of the stream at `path`, e.g. ``(epoch, batch)``, below `seed`; a 63-bit integer.

    Streams of different paths of one length are independent (numpy's `SeedSequence`; zeros at the
    end of a path do not count), so that any of them can be drawn again without those before it.
    Raises `InputError` if `seed` is negative.
    """
    if seed < 0:
        raise InputError(f"seed: {seed} found, expected at least 0")
    return int(np.random.SeedSequence((seed, *path)).generate_state(1, np.uint64)[0] >> 1)
