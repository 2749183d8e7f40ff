"""Processes that work on one thing together: those that torchrun started, or this one alone."""

from __future__ import annotations

import atexit
import os
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


class Team:
    """The processes that share a computation; by default one, to which all of this is trivial.

    Everyone makes the same calls in the same order, and everyone gets the same results, to the
    last bit.

    Parameters
    ----------
    rank, size : int
        Which of how many processes this one is.
    store : torch.distributed.Store, optional
        Where several processes find each other's results.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._shared = 0  # calls of `share`, which must not see each other's keys

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, in place; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def shard(self, n: int) -> slice:
        """Which of `n` consecutive things are this process's; shares differ by at most one."""
        bounds = [rank * n // self.size for rank in (self.rank, self.rank + 1)]
        return slice(*bounds)

    def collect(self, piece: Tensor, n: int) -> Tensor:
        """The (n,) tensor of which every process holds its `shard`."""
        if self.size == 1:
            return piece
        whole = piece.new_zeros(n)
        whole[self.shard(n)] = piece
        return self.sum_(whole)

    def share(self, n: int, work: Callable[[int], Result]) -> Iterator[tuple[int, Result]]:
        """Yield ``(i, work(i))`` for every i below `n`, in no particular order, on every process.

        A process that is done with one thing takes the next that nobody has begun: a slow one does
        not hold up the others. Results travel pickled, and should be small.
        """
        if self._store is None:
            for i in range(n):
                yield i, work(i)
            return
        self._shared += 1
        store = dist.PrefixStore(f"share{self._shared}", self._store)
        seen = 0
        while seen < n:
            i = store.add("begun", 1) - 1
            if i < n:
                result = pickle.dumps((i, work(i)))
                number = store.add("done", 1) - 1
                store.set(f"result{number}", result)  # type: ignore[arg-type]  # takes bytes, too
            ready = store.add("done", 0) if i < n else n  # with nothing left to do, wait for all
            for number in range(seen, ready):
                yield pickle.loads(store.get(f"result{number}"))
            seen = ready


ALONE = Team()


@cache
def join(device: str = "cpu") -> Team:
    """The team of all processes that ``torchrun`` started; this process alone without it.

    Parameters
    ----------
    device : {"cpu", "cuda"}
        What the processes compute on: they talk by gloo or NCCL, and each takes the GPU of its
        local rank.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    store, rank, size = next(dist.rendezvous("env://"))
    store.set_timeout(timedelta(days=30))  # of waiting for a slow process; torchrun ends a dead one
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = {"cpu": "gloo", "cuda": "nccl"}[device]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    atexit.register(dist.destroy_process_group)
    return Team(rank, size, store)
