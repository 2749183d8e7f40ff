"""How the chunks of an operator's data are kept, and shared among the threads of a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

import numpy as np

# Largest share of the threads' time that may be idle because chunks cannot be dealt out evenly.
# Beyond it, it takes less time if all threads share each operation.
MOST_IDLE = 0.2


@dataclass(frozen=True)
class Plan:
    """Made before the first product, so that all of as many vectors are rounded alike."""

    lengths: Sequence[int]  # examples of each chunk
    kept: int  # chunks, the first, that keep what products have in common
    threads: int = 1  # at most
    spare: float = 0.0  # bytes for all threads together
    at_work: float = 1.0  # bytes that one takes, besides its vectors

    def shares(self, vector_bytes: int) -> list[list[int]]:
        """Numbers of the chunks that each thread takes; a thread's vectors take `vector_bytes`."""
        fitting = int(self.spare / (self.at_work + vector_bytes))
        for number in range(min(self.threads, len(self.lengths), fitting), 1, -1):
            shares = _deal(self.lengths, number)
            longest = max(sum(self.lengths[i] for i in share) for share in shares)
            busy = self.threads // number * sum(self.lengths) / (self.threads * longest)
            if busy >= 1 - MOST_IDLE:
                return shares
        return [list(range(len(self.lengths)))]


def make_plan(
    lengths: Sequence[int], per_example: float, vector_bytes: int, memory: int, threads: int
) -> Plan:
    """Keep as much, and set as many threads to work, as the budget allows.

    To keep all is worth more than threads are, and they are worth more than to keep some.

    Parameters
    ----------
    lengths
        Examples of each chunk.
    per_example
        Bytes of what products have in common.
    vector_bytes
        Those of the vectors of a thread, in a product with one.
    memory
        Bytes for what is kept and for threads.
    threads
        At most so many.
    """
    sizes = np.cumsum(per_example * np.asarray(lengths))
    # A thread makes what is not kept, and a backward pass takes about as much as it is given.
    at_work = max(2 * per_example * max(lengths), 1.0)
    if sizes[-1] <= memory:
        return Plan(lengths, len(lengths), threads, memory - float(sizes[-1]), at_work)
    kept = int(np.searchsorted(sizes, memory / 2, side="right"))
    plan = Plan(lengths, kept, threads, memory / 2, at_work)
    if len(plan.shares(vector_bytes)) > 1:
        return plan
    return Plan(lengths, int(np.searchsorted(sizes, memory, side="right")))


def _deal(lengths: Sequence[int], number: int) -> list[list[int]]:
    """Longest first, to the one that has least."""
    shares: list[list[int]] = [[] for _ in range(number)]
    loads = [0] * number
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        lightest = loads.index(min(loads))
        shares[lightest].append(i)
        loads[lightest] += lengths[i]
    return shares


def runs_python(function: Callable[[], object]) -> bool:
    """Whether Python code is run by the backward passes of `function`, or one cannot tell.

    It may be a hook, a checkpointed part of the model that is computed once more, or a backward
    pass in Python, and have a state that threads must not share.
    """
    if sys.getprofile() is not None:
        return True  # a profiler is at work already, and would not see other threads
    inside = False
    found = False

    def notice(_: FrameType, event: str, what: object) -> None:
        nonlocal inside, found
        if event == "call":
            found |= inside
        elif getattr(what, "__name__", None) == "run_backward":
            inside = event == "c_call"

    sys.setprofile(notice)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found
