"""Chunks of an operator's data that are kept and shared among threads."""

import gc
import sys
import threading
import weakref
from functools import partial
from time import sleep

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lossgeometry import GGN, Fisher, Hessian
from lossgeometry.operators.sharing import make_plan, runs_python
from lossgeometry.running import memory
from tests.dense import CLASSES, MODELS, AlwaysDropout, Checkpointed, mini_batches


@pytest.mark.parametrize(
    ("lengths", "budget", "threads", "kept", "shares"),
    [
        ([8] * 6, 100, 3, 6, 3),  # all, and every thread
        ([8] * 6, 10.1, 4, 6, 2),  # all, and what a thread takes, which is two more, twice
        ([8] * 6, 10.1, 3, 6, 1),  # the third would be idle
        ([8] * 6, 7, 3, 6, 1),  # keeping all comes first
        ([8] * 20, 8.1, 2, 4, 2),  # where that cannot be, half is for threads
        ([8] * 20, 7, 3, 7, 1),
        ([8] * 20, 9, 3, 9, 1),  # for two threads of three
        ([8] * 20, 13, 3, 6, 3),
        ([8] * 20, 13, 1, 13, 1),
        ([8] * 20, 0, 3, 0, 1),
        ([8] * 6, 100, 4, 6, 2),  # of two threads each, for of four shares two were half as long
        ([8] * 3, 100, 2, 3, 1),  # a thread would wait while the other has two
        ([8, 2] * 4, 100, 2, 8, 2),  # both get as much of the long ones
    ],
)
def test_a_budget_is_for_what_is_kept_and_for_threads(lengths, budget, threads, kept, shares):
    plan = make_plan(lengths, 1.0, 0, 8 * budget, threads)
    assert plan.kept == kept
    found = plan.shares(0)
    assert len(found) == shares
    assert plan.shares(8 * 1000) == [list(range(len(lengths)))]  # no room for so long vectors


@given(st.lists(st.integers(1, 32), min_size=1), st.integers(0, 1000), st.integers(1, 16))
def test_every_chunk_is_in_one_share_and_no_thread_is_idle_for_long(lengths, memory, threads):
    plan = make_plan(lengths, 1.0, 0, memory, threads)
    shares = plan.shares(0)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert len(shares) == 1 or sum(loads) >= 0.8 * len(loads) * max(loads)
    assert sum(lengths[: plan.kept]) <= memory
    if len(shares) > 1:
        assert sum(lengths[: plan.kept]) + 2 * len(shares) * max(lengths) <= memory


def small_hessian(data, loss=F.cross_entropy, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return Hessian(model.to(data[0][0].dtype), loss, data, **options)


@pytest.fixture(scope="module")
def chunk_bytes():
    """What products of 32 examples have in common, in float32; twice that in float64."""
    H = small_hessian(mini_batches(1, size=32))
    H @ torch.ones(H.shape[0])
    return H.kept_bytes()


def shares(operator, vectors=1):
    return len(operator._shares(vectors))


class CheckpointedFunction(nn.Linear):
    """What is computed once more is not a module."""

    def forward(self, x):
        return checkpoint(self.dropped, x.flatten(1), use_reentrant=False)

    def dropped(self, x):
        sleep(1e-3)
        return F.dropout(F.linear(x, self.weight, self.bias).tanh(), 0.5, training=True)


def checkpointed():
    inner = Checkpointed(nn.Linear(16, 8), nn.Tanh(), nn.Dropout(0.5))
    return nn.Sequential(nn.Flatten(), inner, nn.Linear(8, CLASSES))


@pytest.mark.parametrize("operator", [Hessian, GGN, Fisher])
@pytest.mark.parametrize(
    "make",
    [
        *MODELS.values(),
        partial(AlwaysDropout, 16, CLASSES),
        partial(CheckpointedFunction, 16, CLASSES),
        checkpointed,
    ],
)
def test_products_do_not_depend_on_the_number_of_threads(make, operator, threads):
    model, data = make().double().train(), mini_batches(dtype=torch.float64)
    found = []
    for number in (1, 2, 3):
        threads(number)
        A = operator(model, F.cross_entropy, data, weight_decay=0.1)
        v = torch.ones(A.shape[0], 2, dtype=torch.float64)
        found += [A @ v, A @ v]
        assert torch.equal(found[-1], found[-2])
        assert shares(A) == number
    for product in found[1:]:
        torch.testing.assert_close(product, found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("number", "budget", "kept"), [(1, 30, 20), (3, 30, 20), (3, 17, 8), (2, 12, 6), (1, 0, 0)]
)
def test_products_do_not_depend_on_what_is_kept(number, budget, kept, threads, chunk_bytes):
    """Nor is more kept, or made at a time, than the budget allows."""
    threads(number)
    data = mini_batches(20, torch.float64, size=32)
    exact = small_hessian(data)
    v = torch.ones(exact.shape[0], 2, dtype=torch.float64)
    H = small_hessian(data, memory=2 * budget * chunk_bytes)
    alive, most = set(), []
    make = H._linear_map

    def counted(chunk):
        linear_map = make(chunk)
        alive.add(key := object())
        most.append(len(alive))
        weakref.finalize(linear_map.apply, alive.discard, key)
        return linear_map

    H._linear_map = counted
    products = [H @ v, H @ v]
    assert torch.equal(*products)
    torch.testing.assert_close(products[0], exact @ v, rtol=1e-10, atol=1e-12)
    assert shares(H, 2) == number
    assert len(alive) == kept
    assert max(most) <= kept + (number if kept < len(data) else 0)


@pytest.mark.parametrize("operator", [Hessian, GGN, Fisher])
def test_what_is_kept_goes_with_the_operator(operator):
    """Without the garbage collector, which does not know how large it is."""
    gc.disable()
    try:
        A = operator(MODELS["conv"](), F.cross_entropy, mini_batches(2))
        A @ torch.ones(A.shape[0])
        assert A.kept_bytes() > 0
        kept = weakref.ref(A._kept[0].apply)
        del A
        assert kept() is None
    finally:
        gc.enable()


class InPython(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class CustomFunction(nn.Linear):
    def forward(self, x):
        return InPython.apply(super().forward(x.flatten(1)).tanh())


def hooked():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    model[2].register_full_backward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("operator", [Hessian, GGN])
@pytest.mark.parametrize(
    "make",
    [
        partial(CustomFunction, 16, CLASSES),
        hooked,
    ],
)
def test_one_thread_where_a_product_runs_python(make, operator, threads):
    model, data = make().double(), mini_batches(dtype=torch.float64)
    found = []
    for number in (1, 3):
        threads(number)
        state = torch.get_rng_state()
        A = operator(model, F.cross_entropy, data)
        found.append(A @ torch.ones(A.shape[0], dtype=torch.float64))
        assert shares(A) == 1
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*found)


def test_a_profiler_is_left_alone():
    calls = []
    sys.setprofile(lambda *_: calls.append(1))
    try:
        assert runs_python(lambda: None)
        assert sys.getprofile() is not None
    finally:
        sys.setprofile(None)
    assert not runs_python(lambda: None)
    assert sys.getprofile() is None


class Doubled(TorchFunctionMode):
    """Every loss counts twice."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is F.cross_entropy else result


@pytest.mark.parametrize(
    "mode",
    [
        Doubled,
        partial(torch.autocast, "cpu", torch.bfloat16),
        partial(FlopCounterMode, display=False),
    ],
)
def test_modes_of_the_calling_thread_are_obeyed(mode, threads, chunk_bytes):
    data, found, flops = mini_batches(20, size=32), [], []
    two, one = (small_hessian(data, memory=13 * chunk_bytes) for _ in range(2))
    v = torch.ones(two.shape[0])
    for number, H in ((2, two), (1, one)):
        threads(number)
        H._made_plan = two._plan()
        assert shares(H) == 2
        H @ v
        with mode() as entered:
            found.append(H @ v)
        if isinstance(entered, FlopCounterMode):
            flops.append(entered.get_total_flops())
    assert torch.equal(*found)
    assert len(set(flops)) <= 1


def test_a_product_with_no_vectors():
    H = small_hessian(mini_batches(3))
    assert (H @ torch.ones(H.shape[0], 0)).shape == (H.shape[0], 0)


def test_rounding_is_that_of_the_first_product(threads):
    threads(3)
    H = small_hessian(mini_batches(30))
    v = torch.randn(H.shape[0])
    first = H @ v
    for number in (1, 2, 4):
        threads(number)
        assert torch.equal(H @ v, first)


@pytest.mark.parametrize("make", [MODELS["conv"], MODELS["resnet"]])
def test_threads_go_first_where_memory_is_short(make, threads, monkeypatch, capsys):
    """Batches that are normalised, which cannot be smaller, too."""

    def loss(outputs, targets):
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError
        return F.cross_entropy(outputs, targets)

    model, data = make().train(), mini_batches(20)
    exact = Hessian(model, F.cross_entropy, data)
    v = torch.ones(exact.shape[0])
    expected = exact @ v
    threads(2)
    monkeypatch.setattr(memory, "_announced", set())
    H = Hessian(model, loss, data)
    memory_before = H._memory
    torch.testing.assert_close(H @ v, expected)
    assert shares(H) == 1
    assert H._memory == memory_before // 2
    assert [chunk.size for chunk in H._objective.chunks] == [8] * 20
    assert "for 16 examples at once" in capsys.readouterr().err


def test_no_thread_goes_on_when_a_product_fails(threads):
    threads(2)
    begun = []

    def loss(outputs, targets):
        begun.append(1)
        if len(begun) == 100:
            raise ZeroDivisionError
        if len(begun) > 100:
            sleep(0.01)  # time enough to be told
        return F.cross_entropy(outputs, targets)

    H = small_hessian(mini_batches(1000), loss)
    begun.clear()
    with pytest.raises(ZeroDivisionError):
        H @ torch.ones(H.shape[0])
    assert shares(H) == 2
    number = len(begun)
    assert number < 200
    sleep(0.05)
    assert len(begun) == number
