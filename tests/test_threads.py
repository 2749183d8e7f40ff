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


def test_random_numbers_are_drawn_in_order_by_one_thread(threads):
    class AlwaysDropout(nn.Linear):
        def forward(self, x):
            sleep(1e-3)  # time enough for another thread to seed the generator
            return super().forward(F.dropout(x.flatten(1), 0.5, training=True))

    data = (torch.randn(70, 1, 4, 4), torch.randint(0, CLASSES, (70,)))
    evaluator = Evaluator(AlwaysDropout(16, CLASSES).eval(), {"nll": F.cross_entropy}, data)
    found = []
    for number in (1, 4):
        threads(number)
        found += [evaluator(evaluator.weights) for _ in range(5)]
    assert all(np.array_equal(values, found[0]) for values in found)
