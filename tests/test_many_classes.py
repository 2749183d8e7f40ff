"""Cross-entropy of many logits: the Gauss-Newton matrix in closed form, and in pieces."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lossgeometry import GGN
from tests.dense import assert_same, identity

TOKENS, CLASSES = 28, 40_000  # more than a million logits


class Head(nn.Module):
    """Logits (tokens, classes) that are linear in a few parameters."""

    def __init__(self, dtype):
        super().__init__()
        self.mix = nn.Linear(3, 2, bias=False, dtype=dtype)
        self.head = nn.Linear(2, CLASSES, dtype=dtype).requires_grad_(False)

    def forward(self, x):
        return self.head(self.mix(x))


KINDS = {
    "plain": {},
    "ignoring": dict(ignoring=True),
    "weighted": dict(weighted=True, ignoring=True),
    "smoothed": dict(smoothing=0.1, ignoring=True, weighted=True),
    "soft": dict(soft=True, smoothing=0.1, weighted=True),
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none", ignoring=True),
}
FORMS = {  # of logits (tokens, classes)
    "flat": lambda z, y: (z, y),
    "of one example": lambda z, y: (z.mT[None], y[None] if y.ndim == 1 else y.mT[None]),
    "capped": lambda z, y: (2 * (z / 2).tanh(), y),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_is_exact(kind, form):
    """Against PyTorch's derivatives of cross-entropy written down anew."""
    how = dict(KINDS[kind])
    model, x = Head(torch.float64), torch.randn(TOKENS, 3).double()
    y = torch.randint(CLASSES, (TOKENS,))
    y[:7] = -100 if how.pop("ignoring", False) else 5
    counts = (y >= 0)[:, None].double()
    q = F.one_hot(y.clamp(min=0), CLASSES) * counts
    if how.pop("soft", False):
        y = q = torch.randn(TOKENS, CLASSES).double().softmax(-1)
    weight = torch.rand(CLASSES).double() if how.pop("weighted", False) else None
    w = torch.ones(CLASSES).double() if weight is None else weight
    smoothing, reduction = how.get("smoothing", 0.0), how.get("reduction", "mean")
    total = {"mean": TOKENS if kind == "soft" else (q * w).sum(), "sum": 1, "none": 9}[reduction]
    q = w * ((1 - smoothing) * q + counts * smoothing / CLASSES)

    def loss(z, y):
        z, y = FORMS[form](z, y)
        options = dict(weight=weight, label_smoothing=smoothing, reduction=reduction)
        return F.cross_entropy(z, y, **options).sum() / (9 if reduction == "none" else 1)

    def anew(z, _):
        z = FORMS["capped" if form == "capped" else "flat"](z, y)[0]
        return -(q * z.log_softmax(-1)).sum() / total

    A, B = (GGN(model, fn, (x, y)) for fn in (loss, anew))
    assert_same(A @ identity(A), B @ identity(B), 1e-9)


def test_bytes_are_indices_as_well():
    model, x, y = Head(torch.float64), torch.randn(TOKENS, 3).double(), torch.arange(TOKENS)
    A, B = (GGN(model, F.cross_entropy, (x, targets)) for targets in (y.byte(), y))
    assert_same(A @ identity(A), B @ identity(B), 1e-12)


def peak(work):
    """Bytes of memory that are held at most during `work`, besides those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = [e for e in events if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_memory_is_a_few_times_that_of_the_logits(smoothing):
    model = Head(torch.float32)
    x, y = torch.randn(4, 64, 3), torch.randint(CLASSES, (4, 64))

    def loss(z, y):
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=smoothing)

    logits = 4 * 64 * CLASSES * 4

    def product():
        A = GGN(model, loss, (x, y))
        return A @ torch.ones(6)

    assert logits < peak(product) < 4.1 * logits  # with those themselves, and pieces
