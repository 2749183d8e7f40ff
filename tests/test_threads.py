"""Work divided among threads, and surfaces and spectra that are computed by several."""

import os
import random
from contextlib import closing
from functools import partial
from threading import get_ident
from time import sleep

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lossgeometry import Hessian, eigsh, max_eigenvalue_spectrum
from lossgeometry.algorithms.spectrum import _choose_threads
from lossgeometry.landscape.evaluation import Evaluator
from lossgeometry.running import saving
from lossgeometry.running.threads import give_way, parallel
from tests.dense import CLASSES, MODELS, AlwaysDropout, Checkpointed, mini_batches


def test_threads_are_divided_and_given_back(threads):
    threads(6)

    def share(piece):
        torch.ones(100_000).exp()  # PyTorch sets up a thread when it is first busy
        return piece, torch.get_num_threads(), get_ident()

    found = [result for _, result in sorted(parallel(share, range(40), 3))]
    assert [piece for piece, _, _ in found] == list(range(40))
    assert {own for _, own, _ in found} == {2}
    assert get_ident() not in {ident for _, _, ident in found}
    assert torch.get_num_threads() == 6
    assert list(parallel(share, [0], 1)) == [(0, (0, 6, get_ident()))]


def test_an_exception_is_passed_on(threads):
    threads(2)
    with pytest.raises(ZeroDivisionError):
        list(parallel(lambda piece: 1 / piece, [1, 0, 1], 2))
    assert torch.get_num_threads() == 2
    assert dict(parallel(abs, [-1, 2], 2)) == {0: 1, 1: 2}


def test_results_come_as_they_are_ready_and_work_ends_when_the_caller_leaves(threads):
    threads(2)
    begun = []

    def work(piece):
        begun.append(piece)
        sleep(1e-3)
        while piece == 0:
            give_way()
        return piece

    with closing(parallel(work, range(1000), 2)) as results:
        i, result = next(results)
        assert i == result > 0
    number = len(begun)
    assert number < 1000
    sleep(0.05)
    assert len(begun) == number


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(threads):
    threads(2)
    list(parallel(abs, [-1, 2], 2))
    child = os.fork()
    if child == 0:
        os._exit(int(dict(parallel(abs, [-1, 2], 2)) != {0: 1, 1: 2}))
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


def grown(weights, factor):
    return {name: weight * factor for name, weight in weights.items()}


class Noise(nn.Module):
    """A layer that does nothing but draw, so often that another thread comes in between."""

    def forward(self, x):
        drawn = [torch.rand(len(x), 1, dtype=x.dtype) for _ in range(300)]
        return x * torch.cat(drawn, 1).mean(1, keepdim=True) + torch.randn_like(x)


@pytest.mark.parametrize("sets", [1, 2])
def test_points_are_the_same_by_several_threads_where_layers_draw(sets, threads):
    seen = set()

    def nll(outputs, targets):
        seen.add(get_ident())
        return F.cross_entropy(outputs, targets)

    model = nn.Sequential(Noise(), nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)).train()
    batches = [(torch.randn(9, 16), torch.randint(0, CLASSES, (9,))) for _ in range(3)]
    data = {str(i): batches for i in range(sets)}
    state, found = torch.get_rng_state(), []
    for number in (1, 4):
        threads(number)
        seen.clear()
        evaluator = Evaluator(model, {"nll": nll}, data, seed=3)
        points = [partial(grown, evaluator.weights, 1 + t / 10) for t in range(12)]
        found.append(np.stack([values for _, values in sorted(evaluator.at(points))]))
        assert len(seen - {get_ident()}) == (number if number > 1 else 0)
    np.testing.assert_array_equal(found[1], found[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("drawing", [torch.rand, lambda *shape: torch.full(shape, random.random())])
def test_one_thread_where_more_than_single_layers_draw(drawing, threads):
    class Drawing(nn.Linear):
        def forward(self, x):
            sleep(1e-3)
            return super().forward(x * drawing(len(x), 1).to(x))

    data = (torch.randn(20, 16), torch.randint(0, CLASSES, (20,)))
    model = nn.Sequential(Drawing(16, 8), nn.Linear(8, CLASSES))
    found = []
    for number in (1, 4):
        threads(number)
        evaluator = Evaluator(model, {"nll": F.cross_entropy}, data)
        points = [partial(grown, evaluator.weights, 1.0)] * 8
        found += [float(values[0]) for _, values in evaluator.at(points)]
    assert len(set(found)) == 1


def test_memory_that_is_short_in_a_thread_leaves_the_other_points_as_they_are(threads):
    class Starving(nn.Linear):
        def forward(self, x):
            if len(x) > 10 and self.bias[0] > 2:
                raise MemoryError
            return super().forward(x)

    data = (torch.randn(50, 16).double(), torch.randint(0, CLASSES, (50,)))
    model = Starving(16, CLASSES).double().eval()
    nn.init.ones_(model.bias)
    found = []
    for number in (1, 3):
        threads(number)
        evaluator = Evaluator(model, {"nll": F.cross_entropy}, data)
        values = dict(evaluator.at([partial(grown, evaluator.weights, t) for t in range(9)]))
        found.append([float(values[i][0]) for i in range(9)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)


def test_one_thread_where_a_model_cannot_be_copied_or_memory_was_short(threads):
    class Single(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("there is but one")

    class Starving(nn.Linear):
        def forward(self, x):
            if len(x) > 10:
                raise MemoryError
            return super().forward(x)

    seen = set()

    def nll(outputs, targets):
        seen.add(get_ident())
        return F.cross_entropy(outputs, targets)

    data = (torch.randn(50, 16), torch.randint(0, CLASSES, (50,)))
    threads(3)
    for kind, several in ((Single, False), (Starving, False), (nn.Linear, True)):
        evaluator = Evaluator(kind(16, CLASSES).eval(), {"nll": nll}, data)
        evaluator(evaluator.weights)
        assert bool(seen - {get_ident()}) == several


@pytest.mark.parametrize("make", [*MODELS.values(), partial(AlwaysDropout, 16, CLASSES)])
def test_eigenvalues_do_not_depend_on_the_number_of_threads(make, threads):
    model = make().double().train()
    data = mini_batches(dtype=torch.float64)
    found = []
    for number in (1, 2, 5):
        threads(number)
        found.append(max_eigenvalue_spectrum(model, F.cross_entropy, data, k=2, tol=1e-5))
    for S in found[1:]:
        torch.testing.assert_close(S.eigenvalues, found[0].eigenvalues, rtol=1e-9, atol=1e-12)
        assert torch.equal(S.matvecs, found[0].matvecs)


def test_mini_batches_are_solved_by_several_threads(threads):
    seen = set()

    def loss(outputs, targets):
        seen.add(get_ident())
        return F.cross_entropy(outputs, targets)

    threads(3)
    data = mini_batches(30)
    max_eigenvalue_spectrum(nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)), loss, data, k=2)
    assert len(seen - {get_ident()}) > 1


def test_threads_leave_the_precision_and_the_random_state_as_they_were(threads):
    threads(4)
    model, data = AlwaysDropout(16, CLASSES), mini_batches(30)
    state = torch.get_rng_state()
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        max_eigenvalue_spectrum(model, F.cross_entropy, data, k=2)
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_spectrum_by_threads_is_resumed_to_the_last_bit(threads, monkeypatch):
    threads(2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2048), nn.Tanh(), nn.Linear(2048, CLASSES))
    # Large enough that PyTorch shares operations of one mini-batch among threads, which rounds.
    data = [(torch.randn(50, 16), torch.randint(0, CLASSES, (50,))) for _ in range(4)]
    saved = []
    monkeypatch.setattr(saving, "SAVE_EVERY", 0.0)
    whole = max_eigenvalue_spectrum(
        model,
        F.cross_entropy,
        data,
        k=3,
        save=lambda rows: saved.append({key: rows[key].copy() for key in rows}),
    )
    for rows in saved:
        resumed = max_eigenvalue_spectrum(model, F.cross_entropy, data, k=3, resume=rows)
        assert torch.equal(resumed.eigenvalues, whole.eigenvalues)
        assert torch.equal(resumed.residuals, whole.residuals)


def test_as_many_threads_as_memory_holds_solves(threads):
    threads(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    H = Hessian(model, F.cross_entropy, mini_batches(1))
    eigsh(H, 2)
    assert H.kept_bytes() > 0
    one = 2 * H.kept_bytes() + 21 * H.shape[0] * H.dtype.itemsize
    for memory, expected in ((0, 1), (one, 1), (5 * one // 2, 2), (100 * one, 4)):
        assert _choose_threads(H, 2, 10, memory) == expected
    assert _choose_threads(H, 2, 3, 100 * one) == 3
    assert _choose_threads(H, 2, 0, 100 * one) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert _choose_threads(H, 2, 10, 100 * one) == 1
    assert _choose_threads(H.on(mini_batches(1)), 2, 10, 100 * one) == 1  # it keeps nothing yet


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
def test_one_thread_where_a_product_runs_python(threads):
    threads(4)
    for kind in (Checkpointed, nn.Sequential):  # what is kept is not computed anew
        changed = kind(nn.Linear(16, 8), nn.Tanh(), nn.Dropout(0.5))
        model = nn.Sequential(nn.Flatten(), changed, nn.Linear(8, CLASSES))
        H = Hessian(model, F.cross_entropy, mini_batches(1))
        eigsh(H, 2)
        assert _choose_threads(H, 2, 10, 2**30) == 4
    changed.register_full_backward_hook(lambda *_: None)
    H = H.on(mini_batches(1))
    eigsh(H, 2)
    assert _choose_threads(H, 2, 10, 2**30) == 1


def test_no_thread_goes_on_when_saving_fails(threads, monkeypatch):
    threads(2)
    monkeypatch.setattr(saving, "SAVE_EVERY", 0.0)
    begun = []

    def loss(outputs, targets):
        begun.append(1)
        return F.cross_entropy(outputs, targets)

    def save(rows):
        if rows["done"].sum() == 3:
            raise OSError("disk full")

    model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    with pytest.raises(OSError, match="disk full"):
        max_eigenvalue_spectrum(model, loss, mini_batches(200), k=2, save=save)
    number = len(begun)
    assert number < 200
    sleep(0.05)
    assert len(begun) == number
