"""Commands that are interrupted or killed, and go on as if nothing had happened."""

import multiprocessing
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from lossgeometry.algorithms import spectrum
from lossgeometry.landscape.evaluation import Evaluator
from lossgeometry.objective import FrozenLoss
from lossgeometry.operators.base import CurvatureOperator
from lossgeometry.running import saving
from models import load_checkpoint
from tests.commands import SMALL


def test_landscape_goes_on_where_it_was_interrupted(here, call, monkeypatch):
    """Ctrl-C in the middle of a surface, then the same command: as if nothing had happened."""
    arguments = ["--ckpt", "checkpoints/csan3.pt", *SMALL["analysis.landscape"]]
    call("analysis.landscape", *arguments)
    with h5py.File("checkpoints/csan3.h5") as file:
        whole = file["landscape/train/surface/nll"][()]
    Path("checkpoints/csan3.h5").unlink()

    evaluate, calls = Evaluator.__call__, []

    def interrupted(self, weights):
        calls.append(time.monotonic())
        if len(calls) == 7:
            raise KeyboardInterrupt
        return evaluate(self, weights)

    monkeypatch.setattr(Evaluator, "__call__", interrupted)
    code, _, err = call("analysis.landscape", *arguments)
    assert code == 130
    assert "what has been saved is kept" in err
    code, out, _ = call("analysis.landscape", *arguments)
    assert code == 0
    assert "was interrupted; going on from there" in out
    # The lines of training, test and two more directions, the surface, the interruption again.
    assert len(calls) == 4 * 5 + 9 + 1
    with h5py.File("checkpoints/csan3.h5") as file:
        np.testing.assert_array_equal(file["landscape/train/surface/nll"], whole)


@pytest.mark.parametrize(
    ("directions", "kind", "name", "repeated"),
    [
        ("eigenvectors", CurvatureOperator, "__matmul__", 1 + 7),  # and the self-check
        ("bezier --towards checkpoints/other.pt", FrozenLoss, "value_and_gradient", 1),
        ("towards --towards checkpoints/other.pt", Evaluator, "__call__", 1),
    ],
)
def test_landscape_goes_on_while_directions_are_found(
    here, call, monkeypatch, directions, kind, name, repeated
):
    other = load_checkpoint(Path("checkpoints/csan3.pt"))
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.1)
    other.save(Path("checkpoints/other.pt"))
    arguments = ["--ckpt", "checkpoints/csan3.pt", *SMALL["analysis.landscape"]]
    arguments += f"--directions {directions}".split()
    original, calls = getattr(kind, name), []

    def counted(*arguments):
        calls.append(1)
        if len(calls) in interruptions:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(kind, name, counted)
    interruptions = ()
    assert call("analysis.landscape", *arguments)[0] == 0
    needed = len(calls)
    whole = contents("checkpoints/csan3.h5")
    Path("checkpoints/csan3.h5").unlink()
    calls.clear()
    interruptions = (8, 16)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "SAVE_EVERY", 0.0)
        for _ in interruptions:
            assert call("analysis.landscape", *arguments)[0] == 130
    assert call("analysis.landscape", *arguments)[0] == 0
    assert len(calls) == needed + len(interruptions) * repeated
    assert contents("checkpoints/csan3.h5") == whole


def contents(path):
    """The bytes of all arrays."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda key, item: found.update({key: item}))
        return {k: v[()].tobytes() for k, v in found.items() if isinstance(v, h5py.Dataset)}


def test_hessian_goes_on_where_it_was_interrupted(here, call, monkeypatch):
    arguments = ["--ckpt", "checkpoints/csan3.pt", *SMALL["analysis.hessian"], "--batches", "4"]
    call("analysis.hessian", *arguments)
    measured = Path("checkpoints/csan3.h5")
    with h5py.File(measured) as file:
        whole = {key: file["hessian/train"][key][()] for key in ("eigenvalues", "matvecs", "trace")}
    measured.unlink()
    solve, calls = spectrum.eigsh, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:  # the first, and one that starts from it
            raise KeyboardInterrupt
        return solve(*arguments, **options)

    monkeypatch.setattr(spectrum, "eigsh", interrupted)
    code, _, err = call("analysis.hessian", *arguments)
    assert code == 130
    assert "what has been saved is kept" in err
    with h5py.File(measured) as file:
        assert file["unfinished/hessian/train/done"][()].tolist() == [True, True, False, False]
    code, out, _ = call("analysis.hessian", *arguments)
    assert code == 0
    assert "was interrupted; going on from there" in out
    assert len(calls) == 6  # two and the one interrupted; the first again, and the two missing
    with h5py.File(measured) as file:
        assert "unfinished/hessian/train" not in file
        for key, array in whole.items():
            np.testing.assert_array_equal(file["hessian/train"][key], array)


def test_landscape_killed_ten_times_gives_the_same_bytes(here, call, monkeypatch):
    """At random moments, with progress saved after every point."""
    arguments = ["--ckpt", "checkpoints/csan3.pt", "--points", "7", "--line-points", "7"]
    arguments += ["--lines", "1", "--batches", "2"]
    call("analysis.landscape", *arguments)
    measured = Path("checkpoints/csan3.h5")
    with h5py.File(measured) as file:
        whole = {}
        group = file["landscape/train"]
        group.visit(lambda key: whole.__setitem__(key, group[key]))
        whole = {k: v[()].tobytes() for k, v in whole.items() if isinstance(v, h5py.Dataset)}
    measured.unlink()
    rng = np.random.default_rng(0)
    monkeypatch.setattr(saving, "SAVE_EVERY", 0.0)
    fork = multiprocessing.get_context("fork")
    for _ in range(10):
        process = fork.Process(target=call, args=["analysis.landscape", *arguments])
        process.start()
        seen = progress_of(measured)
        wanted = seen + int(rng.integers(1, 7))
        while progress_of(measured) < wanted:
            assert process.is_alive(), "was to be killed before it is done"
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.05)))  # also in the middle of saving
        process.kill()
        process.join()
        assert progress_of(measured) >= wanted, "what was saved is lost"
    assert call("analysis.landscape", *arguments)[0] == 0
    with h5py.File(measured) as file:
        assert "unfinished/landscape/train" not in file
        group = file["landscape/train"]
        assert {key: group[key][()].tobytes() for key in whole} == whole


def progress_of(path):
    """Points that the file says are done."""
    if not path.exists():
        return 0
    done = []

    def count(key, item):
        if key.endswith("/done"):
            done.append(item[()].sum())

    with h5py.File(path) as file:
        file.visititems(count)
    return int(sum(done))
