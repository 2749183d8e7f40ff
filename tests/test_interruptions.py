"""Commands that are interrupted or killed, and go on as if nothing had happened."""

import multiprocessing
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from analysis import corrupted
from lossgeometry.algorithms import spectrum
from lossgeometry.landscape import sampling
from lossgeometry.objective import FrozenLoss
from lossgeometry.operators.base import CurvatureOperator
from lossgeometry.running import saving
from models import load_checkpoint
from tests.commands import SMALL

LANDSCAPE = ("analysis.landscape", *SMALL["analysis.landscape"], "--ckpt", "checkpoints/csan3.pt")
HESSIAN = ("analysis.hessian", *SMALL["analysis.hessian"], "--ckpt", "checkpoints/csan3.pt")
ROBUSTNESS = ("analysis.robustness", "--images", "8")
EIGENVECTORS = ("--directions", "eigenvectors")
TOWARDS = ("--towards", "checkpoints/other.pt", "--directions")
# A command, what is called again and again, at which calls it is interrupted, and how many calls
# are made again after each: the one that was interrupted, and what others need.
CASES = {
    "surface": (LANDSCAPE, sampling, "displaced", (7, 19), 1),
    # The self-check of the products, too.
    "eigenvectors": ((*LANDSCAPE, *EIGENVECTORS), CurvatureOperator, "__matmul__", (12, 24), 1 + 7),
    "bezier": ((*LANDSCAPE, *TOWARDS, "bezier"), FrozenLoss, "value_and_gradient", (8, 16), 1),
    "path": ((*LANDSCAPE, *TOWARDS, "towards"), sampling, "displaced", (8, 16), 1),
    # The second spectrum starts from the first, which is made again.
    "spectrum": ((*HESSIAN, "--batches", "4"), spectrum, "eigsh", (3,), 1 + 1),
    # Three corruptions are done, and two severities of the fourth.
    "corruptions": (ROBUSTNESS, corrupted, "corrupted_dataset", (18,), 1 + 2),
}


@pytest.mark.parametrize("case", CASES)
def test_goes_on_where_it_was_interrupted(here, call, monkeypatch, unrendered, case):
    """Ctrl-C in the middle, then the same command: as if nothing had happened."""
    other = load_checkpoint(Path("checkpoints/csan3.pt"))
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.1)
    other.save(Path("checkpoints/other.pt"))
    command, kind, name, interruptions, repeated = CASES[case]
    original, calls, at = getattr(kind, name), [], ()

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) in at:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(kind, name, counted)
    assert call(*command)[0] == 0
    needed, whole = len(calls), contents()
    for path in Path("checkpoints").glob("*.h5"):
        path.unlink()
    calls.clear()
    at = interruptions
    with monkeypatch.context() as patch:
        patch.setattr(saving, "SAVE_EVERY", 0.0)
        for _ in at:
            code, _, err = call(*command)
            assert code == 130
            assert "what has been saved is kept" in err
    code, out, _ = call(*command)
    assert code == 0
    assert "was interrupted; going on from there" in out
    assert len(calls) == needed + len(at) * repeated
    assert contents() == whole


def contents():
    """The bytes of all arrays, by file and name."""
    found = {}
    for path in Path().rglob("*.h5"):
        with h5py.File(path) as file:
            names = []
            file.visit(names.append)
            arrays = {name: file[name] for name in names if isinstance(file[name], h5py.Dataset)}
            found |= {(path, name): array[()].tobytes() for name, array in arrays.items()}
    return found


def test_landscape_killed_ten_times_gives_the_same_bytes(here, call, monkeypatch, unrendered):
    """At random moments, with progress saved after every point."""
    arguments = ["--ckpt", "checkpoints/csan3.pt", "--points", "7", "--line-points", "7"]
    arguments += ["--lines", "1", "--batches", "2"]
    call("analysis.landscape", *arguments)
    whole, measured = contents(), Path("checkpoints/csan3.h5")
    measured.unlink()
    rng = np.random.default_rng(0)
    monkeypatch.setattr(saving, "SAVE_EVERY", 0.0)
    fork = multiprocessing.get_context("fork")
    for _ in range(10):
        process = fork.Process(target=call, args=["analysis.landscape", *arguments])
        process.start()
        wanted = progress_of(measured) + int(rng.integers(1, 7))
        wait_for_progress(measured, wanted, process)
        time.sleep(float(rng.uniform(0, 0.05)))  # also in the middle of saving
        process.kill()
        process.join()
        assert progress_of(measured) >= wanted, "what was saved is lost"
    assert call("analysis.landscape", *arguments)[0] == 0
    assert contents() == whole


def wait_for_progress(path, wanted, process):
    """Until the file, which is read when it has changed, says that so many points are done."""
    seen = None
    while True:
        assert process.is_alive(), "was to be killed before it is done"
        now = path.stat().st_mtime_ns if path.exists() else None
        if now != seen and progress_of(path) >= wanted:
            return
        seen = now
        time.sleep(0.002)


def progress_of(path):
    """Points that the file says are done."""
    if not path.exists():
        return 0
    done = []

    def count(key, item):
        if key.endswith(("/done", "/evaluated")):
            done.append(item[()].sum())

    with h5py.File(path) as file:
        file.visititems(count)
    return int(sum(done))
