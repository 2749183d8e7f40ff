"""Work divided among threads, and surfaces that are computed by several."""

import os
from threading import get_ident
from time import sleep

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from analysis.landscape.evaluation import Evaluator
from analysis.threads import parallel
from tests.dense import CLASSES, MODELS


@pytest.fixture
def threads():
    """Choose how many threads PyTorch has, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_are_divided_and_given_back(threads):
    threads(6)

    def share(piece):
        torch.ones(100_000).exp()  # PyTorch sets up a thread when it is first busy
        return piece, torch.get_num_threads(), get_ident()

    found = list(parallel(share, range(40), 3))
    assert [piece for piece, _, _ in found] == list(range(40))
    assert {own for _, own, _ in found} == {2}
    assert get_ident() not in {ident for _, _, ident in found}
    assert torch.get_num_threads() == 6
    assert list(parallel(share, [0], 1)) == [(0, 6, get_ident())]


def test_an_exception_is_passed_on(threads):
    threads(2)
    with pytest.raises(ZeroDivisionError):
        list(parallel(lambda piece: 1 / piece, [1, 0, 1], 2))
    assert torch.get_num_threads() == 2
    assert list(parallel(abs, [-1, 2], 2)) == [1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(threads):
    threads(2)
    list(parallel(abs, [-1, 2], 2))
    child = os.fork()
    if child == 0:
        os._exit(int(list(parallel(abs, [-1, 2], 2)) != [1, 2]))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("name", ["csan-clamp-1", "resnet", "conv", "vit"])
def test_metrics_do_not_depend_on_the_number_of_threads(name, threads):
    model = MODELS[name]().double().eval()
    data = (torch.randn(70, 1, 4, 4).double(), torch.randint(0, CLASSES, (70,)))
    evaluator = Evaluator(model, {"nll": F.cross_entropy}, data)
    moved = {key: weight + 0.1 for key, weight in evaluator.weights.items()}
    found = []
    for number in (1, 2, 5):
        threads(number)
        found.append([evaluator(weights) for weights in (moved, evaluator.weights)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-14)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-14)
    expected = F.cross_entropy(model(data[0]), data[1]).item()
    np.testing.assert_allclose(found[0][1], expected, rtol=1e-12)


class AlwaysDropout(nn.Linear):
    def forward(self, x):
        sleep(1e-3)  # time enough for another thread to seed the generator
        return super().forward(F.dropout(x.flatten(1), 0.5, training=True))


class Remembers(nn.Linear):
    def forward(self, x):
        self.seen = x
        sleep(1e-3)  # time enough for another thread to put something else there
        return super().forward(self.seen.flatten(1))


class Hooked(nn.Linear):
    """What a hook has seen last decides the result."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        seen = {}

        def remember(module, inputs):
            seen["last"] = inputs[0]
            sleep(1e-3)
            return (seen["last"].flatten(1),)

        self.register_forward_pre_hook(remember)


class RemembersTargets:
    """A metric with a state."""

    def __call__(self, outputs, targets):
        self.targets = targets
        sleep(1e-3)
        return F.cross_entropy(outputs, self.targets)


@pytest.mark.parametrize("model", [AlwaysDropout, Remembers, Hooked])
def test_threads_do_not_meet_in_models_and_metrics_with_a_state(model, threads):
    data = (torch.randn(200, 1, 4, 4), torch.randint(0, CLASSES, (200,)))
    model = model(16, CLASSES).eval()
    found = []
    for number in (1, 4):
        threads(number)
        evaluator = Evaluator(model, {"nll": RemembersTargets()}, data)
        found += [evaluator(evaluator.weights) for _ in range(5)]
    for values in found:
        np.testing.assert_allclose(values, found[0], rtol=1e-6)


def test_one_thread_where_a_model_cannot_be_copied_or_memory_was_short(threads):
    class Single(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("there is but one")

    data = (torch.randn(50, 16), torch.randint(0, CLASSES, (50,)))
    threads(3)
    single = Evaluator(Single(16, CLASSES).eval(), {"nll": F.cross_entropy}, data)
    short = Evaluator(nn.Linear(16, CLASSES).eval(), {"nll": F.cross_entropy}, data)
    short._at_once.size //= 2
    many = Evaluator(nn.Linear(16, CLASSES).eval(), {"nll": F.cross_entropy}, data)
    for evaluator, workers in ((single, 1), (short, 1), (many, 3)):
        assert evaluator._workers(evaluator.weights, evaluator._sets[0]) == workers
