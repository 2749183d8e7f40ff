"""Teams of forked processes, which need no import of PyTorch of their own."""

import multiprocessing
import os
import pickle
import socket
from pathlib import Path

import torch

from lossgeometry.running.distributed import join


def start_team(size, function, *arguments, folder):
    """Start processes as torchrun does, each of which calls ``function(team, *arguments)``."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    folder.mkdir(parents=True, exist_ok=True)
    members = [
        fork.Process(target=_member, args=(rank, size, port, folder, function, arguments))
        for rank in range(size)
    ]
    for member in members:
        member.start()
    return members


def run_team(size, function, *arguments, folder):
    """What ``function(team, *arguments)`` returns in each process of a team."""
    members = start_team(size, function, *arguments, folder=folder)
    for member in members:
        member.join()
    assert [member.exitcode for member in members] == [0] * size
    return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(size)]


def _member(rank, size, port, folder, function, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    join.cache_clear()
    team = join("cpu")
    result = function(team, *arguments)
    Path(folder, f"result{rank}").write_bytes(pickle.dumps(result))
    team.sum_(torch.zeros(1))  # the store lives in the first process: leave together
