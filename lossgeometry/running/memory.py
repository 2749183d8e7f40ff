"""Fewer examples at once where memory does not suffice for all of them."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
_announced: set[str] = set()

# Parameters of glibc's mallopt, and the largest that it takes for the latter.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MOST_MMAP = -1, -3, 32 * 1024**2


class Halving:
    """How many examples pass through a model at once: half as many when memory runs out.

    Parameters
    ----------
    size : int
        Examples to begin with.
    what : str
        What they are examples for, in the line on stderr that says that they were too many.
    """

    def __init__(self, size: int, what: str) -> None:
        self.size = size
        self.what = what

    def __call__(self, work: Callable[[int], Result]) -> Result:
        """Return ``work(size)`` for the largest size, from the present one downwards, that works.

        Every attempt begins anew. An exception is raised if it is not about memory, or if memory
        does not suffice for a single example.
        """
        while True:
            try:
                return work(self.size)
            except (RuntimeError, MemoryError) as error:
                if self.size <= 1 or not is_out_of_memory(error):
                    raise
            # Not above, where the exception keeps alive what the attempt had allocated.
            make_room(self.what, self.size)
            self.size //= 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, NumPy or PyTorch says that memory did not suffice."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which need not be imported here
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees, for the next time that it needs some.

    Otherwise glibc gives much of it back to the system, which has to clear it before it is used
    again. With other allocators nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, _MOST_MMAP)


def make_room(what: str, size: int) -> None:
    """Free what can be freed, and say on stderr, once, that `size` examples were too many."""
    if what not in _announced:
        print(
            f"{what}: not enough memory for {size} examples at once, going on with fewer",
            file=sys.stderr,
        )
        _announced.add(what)
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
