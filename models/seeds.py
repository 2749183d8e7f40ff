"""Independent random streams from one stored seed."""

import numpy as np

from models.description import MAX_SEED
from models.errors import InputError, shown


def derive_seed(seed: int, *path: int) -> int:
    """Seed of the stream at `path`, e.g. ``(epoch, batch)``, below `seed`; a 63-bit integer.

    Streams of different paths of one length are independent (numpy's `SeedSequence`; zeros at the
    end of a path do not count), so that any of them can be drawn again without those before it.
    Raises `InputError` if `seed` is negative or has more than 63 bits.
    """
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed: {shown(seed)} found, expected at least 0, below 2^63")
    return int(np.random.SeedSequence((seed, *path)).generate_state(1, np.uint64)[0] >> 1)
