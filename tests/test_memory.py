"""Too little memory: fewer examples at once, the same results, one line that says so."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from analysis.outcomes import outcomes
from lossgeometry import GGN, Hessian
from lossgeometry.landscape.evaluation import Evaluator
from lossgeometry.objective import FrozenLoss
from lossgeometry.running import memory
from lossgeometry.running.memory import Halving, is_out_of_memory
from models import Checkpoint, ImageDataset, training
from models.recipes import PRESETS
from models.training import evaluate

ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
)


class Small(nn.Module):
    """Runs out of memory with more than `most` examples."""

    def __init__(self, most=10**9, error=ERRORS[0]):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(12, 3)
        self.most, self.error, self.seen = most, error, []

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.most:
            raise self.error
        return self.linear(x.flatten(1)).tanh()


@pytest.fixture(autouse=True)
def nothing_announced(monkeypatch):
    monkeypatch.setattr(memory, "_announced", set())
    monkeypatch.setattr(training.evaluating, "size", 256)


def images(n=100):
    torch.manual_seed(1)
    pixels = torch.randint(256, (n, 2, 2, 3), dtype=torch.uint8)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.3)
    return ImageDataset("some", pixels, torch.arange(n) % 3, ("a", "b", "c"), mean, std)


@pytest.mark.parametrize("error", ERRORS)
def test_tries_again_with_half_and_says_so_once(error, capsys):
    tried = []

    def work(size):
        tried.append(size)
        if size > 5:
            raise error
        return size

    halving = Halving(48, "counting")
    assert halving(work) == 3
    assert tried == [48, 24, 12, 6, 3]
    assert halving(work) == 3
    assert Halving(8, "counting")(work) == 4
    assert tried[5:] == [3, 8, 4]
    said = capsys.readouterr().err
    assert said == "counting: not enough memory for 48 examples at once, going on with fewer\n"


def test_other_errors_and_the_last_example_are_not_swallowed():
    def broken(size):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Halving(8, "x")(broken)

    def starving(size):
        raise ERRORS[1]

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        Halving(8, "x")(starving)


def test_what_failed_is_freed_before_the_next_attempt():
    class Big:
        alive = 0

        def __init__(self):
            Big.alive += 1

        def __del__(self):
            Big.alive -= 1

    def work(size):
        assert Big.alive == 0
        held = Big()
        if size > 1:
            raise MemoryError
        return held is not None

    assert Halving(4, "x")(work)


def test_real_exhaustion_of_memory_is_recognised():
    """In a process that may not have more than a few hundred megabytes beyond what it has."""
    program = (
        "import resource, sys, torch\n"
        "from lossgeometry.running.memory import Halving\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))\n"
        "print(Halving(2**30, 'test')(lambda n: len(torch.zeros(n))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr
    assert 2**20 < int(done.stdout) < 2**27
    assert done.stderr.count("not enough memory") == 1


def test_evaluations_are_the_same_to_rounding(capsys):
    plain = evaluate(Small(), images(), images(31))
    little = Small(most=20)
    found = evaluate(little, images(), images(31))
    assert found == pytest.approx(plain, rel=1e-6)
    assert max(little.seen[4:]) == 16  # remembered
    architecture = dict(image_size=2, channels=3)
    checkpoints = [
        Checkpoint(architecture, "some", None, PRESETS["digits"].recipe, 0, 0, {}, model=model)
        for model in (Small(), Small(most=7))
    ]
    expected, found = (outcomes(checkpoint, images()) for checkpoint in checkpoints)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_array_equal(found[1], expected[1])
    assert capsys.readouterr().err.count("not enough memory") == 1


def test_landscapes_are_the_same_to_rounding(capsys):
    x, y = images().inputs, images().labels
    metrics = {"nll": F.cross_entropy}
    plain, little = (Evaluator(m.eval(), metrics, (x, y)) for m in (Small(), Small(most=5)))
    expected = plain(plain.weights)
    assert little(little.weights) == pytest.approx(expected, rel=1e-6)
    assert little(little.weights) == pytest.approx(expected, rel=1e-6)
    assert capsys.readouterr().err.count("not enough memory") == 1


def test_batches_that_are_normalised_over_are_not_cut():
    class Normalising(Small):
        def forward(self, x):
            return self.norm(super().forward(x))

    little = Normalising(most=5)
    little.norm = nn.BatchNorm1d(3)
    evaluator = Evaluator(little, {"nll": F.cross_entropy}, (images().inputs, images().labels))
    with pytest.raises(torch.OutOfMemoryError):
        evaluator(evaluator.weights)
    assert little.seen[-1] == 100


def gradient(objective):
    total = [torch.zeros_like(p) for p in objective.parameters.values()]
    for chunk in objective.chunks:
        with objective.forward(chunk) as outputs:
            loss = objective.loss(outputs, chunk.targets) * chunk.weight
            parts = torch.autograd.grad(loss, list(objective.parameters.values()))
        total = [a + b for a, b in zip(total, parts, strict=True)]
    return total


def test_a_frozen_loss_is_halved_and_the_same():
    data = [(images().inputs, images().labels), (images(31).inputs, images(31).labels)]
    objective = FrozenLoss(Small(), F.cross_entropy, data)
    expected = gradient(objective)
    sizes = []
    while objective is not None:
        sizes.append(max(chunk.size for chunk in objective.chunks))
        torch.testing.assert_close(gradient(objective), expected)
        assert sum(chunk.weight for chunk in objective.chunks) == pytest.approx(1)
        starts = {(c.seed, c.start + i) for c in objective.chunks for i in range(c.size)}
        assert len(starts) == 131
        objective = objective.halved()
    assert sizes == [32, 16, 8, 4, 2, 1]


@pytest.mark.parametrize("operator", [Hessian, GGN])
@pytest.mark.parametrize("most", [2, 5, 20])
def test_operators_go_on_with_smaller_batches(operator, most, capsys):
    data = (images().inputs, images().labels)
    exact = operator(Small(), F.cross_entropy, data)
    A = operator(Small(most), F.cross_entropy, data, memory=10**6)
    v = torch.linspace(-1, 1, A.shape[0])
    torch.testing.assert_close(A @ v, exact @ v)
    torch.testing.assert_close(A @ v, exact @ v)  # from what was kept
    said = f"{operator.__name__}: not enough memory for 32 examples at once, going on with fewer\n"
    assert capsys.readouterr().err == said
    with pytest.raises(type(ERRORS[0])):
        operator(Small(0), F.cross_entropy, data) @ v


def test_what_is_random_or_normalised_over_the_batch_is_not_halved():
    for module in (nn.Dropout(0.5), nn.BatchNorm2d(3)):
        model = nn.Sequential(module, nn.Flatten(), nn.Linear(12, 3)).train()
        data = (images().inputs, images().labels)
        assert FrozenLoss(model, F.cross_entropy, data).halved() is None


def test_recognises_memory_and_nothing_else():
    assert all(map(is_out_of_memory, ERRORS))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))
