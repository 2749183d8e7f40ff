"""Independent pieces of work on the threads that PyTorch has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")

MOST_THREADS = 16  # at work on a piece each: as many times the memory of one


def parallel(
    function: Callable[[Piece], Result], pieces: Sequence[Piece], workers: int
) -> Iterator[Result]:
    """``map(function, pieces)`` by `workers` threads, among which PyTorch's own are divided.

    PyTorch's threads (`torch.get_num_threads`) share one operation and wait for each other at its
    end. Where operations are short, as those of a small network, it takes less time to give each
    thread a piece of the work to itself. Results come in the order of the pieces. Modes that belong
    to a thread, such as `torch.inference_mode` and autocast, are for `function` to enter.
    """
    if workers == 1:
        yield from map(function, pieces)
        return
    pool = _pool(workers, torch.get_num_threads() // workers)
    running = [pool.submit(function, piece) for piece in pieces]
    try:
        for future in running:
            yield future.result()
    finally:
        for future in running:
            future.cancel()
        wait(running)


@cache  # memory that a thread has freed is at hand for its next piece of work only if it lives on
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Threads, of which each gives so many of PyTorch's to one operation."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "piece")
    started = Barrier(workers)

    def begin(_: int) -> None:
        torch.get_num_threads()  # a thread takes over the number of all when it is first asked
        torch.set_num_threads(threads)
        started.wait()

    list(pool.map(begin, range(workers)))
    torch.set_num_threads(before)  # what a worker sets is the default of threads to come
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
