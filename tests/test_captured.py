"""What is recorded and replayed, and what is not; the recording itself is tested on a GPU."""

import contextlib
import warnings

import pytest
import torch
from torch.nn import functional as F

from lossgeometry import Hessian
from lossgeometry.operators.captured import Captured, RowProducts
from tests.dense import MODELS


class Recorder:
    """Of a CPU: a recording sees nothing but the tensor that it was made with."""

    def __init__(self, failing=None):
        self.refused = False
        self.failing = failing  # "rehearse" or "record", with a message
        self.done = []

    def stream(self):
        return contextlib.nullcontext()

    def _do(self, what):
        self.done.append(what)
        if self.failing and self.failing[0] == what:
            raise RuntimeError(self.failing[1])

    def rehearse(self, work):
        self._do("rehearse")
        return work()

    def record(self, function, rows):
        self._do("record")
        given, found = rows.clone(), rows.new_empty(0)

        def replay(rows):
            self.done.append("replay")
            given.copy_(rows)
            torch.add(function(given), 0, out=found.resize_(0))
            return found

        return replay


def double(rows):
    return 2 * rows


def test_a_shape_is_rehearsed_then_recorded_then_replayed():
    recorder = Recorder()
    captured = Captured(double, recorder)
    for n in (1, 1, 3, 1, 3, 3):
        rows = torch.randn(n, 4)
        assert torch.equal(captured(rows), 2 * rows)
    once = ["rehearse", "record", "replay"]
    assert recorder.done == [*once, "rehearse", "replay", "record", "replay", "replay"]


@pytest.mark.parametrize("failing", ["rehearse", "record"])
def test_what_cannot_be_recorded_is_said_once_and_computed_as_it_is(failing):
    recorder = Recorder((failing, "it waits\nfor somebody"))
    captured, other = (Captured(double, recorder) for _ in range(2))
    rows = torch.randn(1, 4)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for function in (captured, captured, captured, other, other):
            assert torch.equal(function(rows), 2 * rows)
    (said,) = (str(warning.message) for warning in warned)
    assert said == "products are not replayed as a CUDA graph: it waits"
    assert recorder.done.count(failing) == 1


def test_memory_that_runs_out_in_a_rehearsal_is_the_callers_to_free():
    recorder = Recorder(("rehearse", "DefaultCPUAllocator: can't allocate memory"))
    with pytest.raises(RuntimeError, match="allocate"):
        Captured(double, recorder)(torch.ones(1, 4))
    assert not recorder.refused


@pytest.mark.parametrize("record", [True, False])
def test_products_of_several_vectors_at_once_are_those_one_by_one(record):
    model = MODELS["csan-clamp-1"]().double()
    batch = torch.randn(4, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    H = Hessian(model, F.cross_entropy, batch)
    (linear_map,) = H._linear_maps([0])
    rows = torch.randn(5, H.shape[0], dtype=torch.float64)
    products = RowProducts(linear_map, H._parameters, Recorder() if record else None)
    for _ in range(3):
        found = torch.ones_like(rows)
        products.add_to(found, rows)
        torch.testing.assert_close(found - 1, (H @ rows.T).T, rtol=1e-10, atol=1e-12)
