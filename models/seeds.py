"""Independent random streams from one stored seed."""

import numpy as np


def derive_seed(seed: int, *path: int) -> int:
    """Seed of the stream at `path`, e.g. ``(epoch, batch)``, below `seed`; a 63-bit integer.

    Streams of different paths are independent (numpy's `SeedSequence`), so that any of them can be
    drawn again without drawing those before it.
    """
    return int(np.random.SeedSequence((seed, *path)).generate_state(1, np.uint64)[0] >> 1)
