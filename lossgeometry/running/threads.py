"""Independent pieces of work on the threads that PyTorch has."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from functools import cache
from typing import TypeVar

import torch
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Piece = TypeVar("Piece")
Result = TypeVar("Result")

MOST_THREADS = 16  # at work on a piece each: as many times the memory of one
_SOME_TENSOR = torch.empty(0)
_current = threading.local()  # its `stop` is set when nobody waits for the thread any more


class Cancelled(BaseException):
    """Raised in a thread whose result nobody waits for any more."""


def parallel(
    function: Callable[[Piece], Result], pieces: Sequence[Piece], workers: int
) -> Generator[tuple[int, Result], None, None]:
    """Yield ``(i, function(pieces[i]))`` as soon as it is there, by `workers` threads.

    PyTorch's threads (`torch.get_num_threads`), which are divided among the workers, share one
    operation and wait for each other at its end. Where operations are short, as those of a small
    network, it takes less time to give each thread a piece of the work to itself. Modes that belong
    to a thread, such as `torch.inference_mode` and autocast, are for `function` to enter. A caller
    that may leave before the end closes the iterator: then what is running ends at its next
    `give_way`, and nothing else begins.
    """
    if workers == 1:
        yield from enumerate(map(function, pieces))
        return
    stop = threading.Event()

    def run(piece: Piece) -> Result:
        _current.stop = stop
        give_way()
        return function(piece)

    running: dict[Future[Result], int] = {}
    try:
        pool = _pool(workers, torch.get_num_threads() // workers)
        for i, piece in enumerate(pieces):
            running[pool.submit(run, piece)] = i
        for future in as_completed(running):
            yield running[future], future.result()
    finally:
        stop.set()
        wait(running)


def free_threads() -> int:
    """Threads among which work may be divided.

    One within `parallel`, where all are at work, and in a mode that other threads do not see:
    autocast, one that overrides functions (as does a default device), or one of dispatch.
    """
    in_a_mode = (
        torch.is_autocast_enabled("cpu")
        or has_torch_function((_SOME_TENSOR,))
        or is_in_torch_dispatch_mode()
    )
    return 1 if in_a_mode or hasattr(_current, "stop") else torch.get_num_threads()


def give_way() -> None:
    """Raise `Cancelled` in a thread of `parallel` whose caller has left."""
    stop = getattr(_current, "stop", None)
    if stop is not None and stop.is_set():
        raise Cancelled


@cache  # memory that a thread has freed is at hand for its next piece of work only if it lives on
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Threads, of which each gives so many of PyTorch's to one operation."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "piece")
    started = threading.Barrier(workers)

    def begin(_: int) -> None:
        torch.get_num_threads()  # a thread takes over the number of all when it is first asked
        torch.set_num_threads(threads)
        started.wait()

    try:
        list(pool.map(begin, range(workers)))
    finally:
        started.abort()  # in case that not all have begun
        torch.set_num_threads(before)  # what a worker sets is the default of threads to come
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
