"""What several processes that work on one thing say to each other."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from lossgeometry.errors import LostProcessError
from lossgeometry.running.devices import choose_device
from lossgeometry.running.team import Team

Result = TypeVar("Result")

PATIENCE = timedelta(days=30)  # with a slow process; torchrun ends those that wait for a dead one


class Processes(Team):
    """A team of several: `rank` is which of the `size` this one is.

    In the `store` they find each other's results.
    """

    def __init__(self, rank: int, size: int, store: dist.Store) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._calls = 0  # of what uses the store: they must not see each other's keys

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, in place; returns it."""
        with _connected():
            dist.all_reduce(tensor)
        return tensor

    def collect(self, piece: Tensor, n: int) -> Tensor:
        """The (n,) tensor of which every process holds its `shard`."""
        whole = piece.new_zeros(n)
        whole[self.shard(n)] = piece
        return self.sum_(whole)

    def share(self, n: int, work: Callable[[int], Result]) -> Iterator[tuple[int, Result]]:
        """Yield ``(i, work(i))`` as they get done, whoever does them."""
        store = self._new_store()
        seen, idle = 0, False
        while seen < n:
            with _connected():
                i = store.add("begun", 1) - 1 if not idle else n
                idle = i >= n
                if not idle:
                    outcome = pickle.dumps((i, *_attempt(work, i)))
                    number = store.add("done", 1) - 1
                    store.set(f"result{number}", outcome)  # type: ignore[arg-type]  # bytes, too
                # With nothing left to do, wait for the next result of another.
                ready = max(store.add("done", 0), seen + idle)
            for number in range(seen, ready):
                with _connected():
                    i, succeeded, result = pickle.loads(_wait(store, f"result{number}"))
                yield i, _result(succeeded, result)
            seen = ready

    def first(self, work: Callable[[], Result]) -> Result:
        """What the first process makes of something, on every process."""
        store = self._new_store()
        outcome = [_attempt(work) if self.rank == 0 else None]
        with _connected():
            # By the store first: however long it takes, nobody is stuck in a collective call.
            if self.rank == 0:
                store.set("done", "")
            _wait(store, "done")
            dist.broadcast_object_list(outcome)
        assert outcome[0] is not None
        return _result(*outcome[0])

    def _new_store(self) -> dist.Store:
        self._calls += 1
        return dist.PrefixStore(f"call{self._calls}", self._store)


def connect(device: str) -> Team:
    """The team of all processes that torchrun started, see `lossgeometry.running.distributed`."""
    device = choose_device(device).type
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = {"cpu": "gloo", "cuda": "nccl"}[device]
    with _connected():
        store, rank, size = next(dist.rendezvous("env://"))
        store.set_timeout(PATIENCE)
        store = _new_part(store, rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    return Processes(rank, size, store)


def _new_part(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of `store` that is all processes' and no one else's.

    When torchrun restarts the processes, its store still holds what the dead ones wrote. So the
    first process writes the name of a new part under names that the living have just made up.
    """
    own = uuid4().hex
    store.set(f"name{rank}", own)
    if rank > 0:
        part = _wait(store, own).decode()
        store.set(f"{part}/seen{rank}", "")
        return dist.PrefixStore(part, store)
    for other in range(1, size):
        while not store.check([f"{own}/seen{other}"]):
            store.set(_wait(store, f"name{other}").decode(), own)
            time.sleep(0.005)
    return dist.PrefixStore(own, store)


def _attempt(work: Callable[..., Any], *arguments: Any) -> tuple[bool, Any]:
    """Whether `work` succeeds, and its result or exception, which is for all processes."""
    try:
        return True, work(*arguments)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return False, RuntimeError(f"{type(error).__name__}: {error}")
        return False, error


def _result(succeeded: bool, result: Any) -> Any:
    if succeeded:
        return result
    raise result


def _wait(store: dist.Store, key: str) -> bytes:
    """The value of a key that another process will set."""
    pause = 0.001
    while not store.check([key]):  # rather than `wait`, during which signals are not heard
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return store.get(key)


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Name the cause of what goes wrong while processes talk."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError("another process has ended") from error
