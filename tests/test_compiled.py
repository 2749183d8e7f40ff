"""Compiled products are those of the operator as it is."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from lossgeometry import Fisher, Hessian
from lossgeometry.errors import InputError
from lossgeometry.operators.compiled import _split
from tests.dense import CLASSES, OPERATORS, assert_same, flat, make


@pytest.mark.parametrize("operator", OPERATORS.values())
def test_compiled_products_are_the_same(operator):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.LayerNorm(6), nn.GELU())
    model.extend([nn.Dropout(0.5), nn.Linear(6, CLASSES)]).double()
    x, y = torch.randn(14, 1, 4, 4).double(), torch.randint(0, CLASSES, (14,))
    batches = [(x[:5], y[:5]), (x[5:10], y[5:10]), (x[10:], y[10:])]  # the last of another shape
    plain = operator(model, F.cross_entropy, batches, weight_decay=0.1)
    compiled = operator(model, F.cross_entropy, batches, weight_decay=0.1, compile=True)
    V = torch.randn(plain.shape[0], 3, dtype=torch.float64)
    random_state = torch.get_rng_state()
    assert_same(compiled @ V, plain @ V, 1e-13)
    assert_same(compiled @ V, plain @ V, 1e-13)  # what is kept was not changed
    assert compiled._compiled.fits(compiled._objective.chunks[1])
    other = [(x[3:8], y[3:8])]
    assert_same(compiled.on(other, seed=4) @ V, plain.on(other, seed=4) @ V, 1e-13)
    block = [
        v.reshape(3, *p.shape)
        for v, p in zip(
            V.T.split([p.numel() for p in model.parameters()], 1), model.parameters(), strict=True
        )
    ]
    linear_map = compiled._kept[0]
    found = linear_map.apply(block, True)
    expected = linear_map.apply([b[1] for b in block], False)
    assert_same(flat(f[1] for f in found), flat(expected), 1e-13)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_compiled_products_that_differ_are_refused(monkeypatch):
    model, loss_fn, x, y = make("conv")

    def wrong(program, **_):
        return lambda *inputs: [2 * product for product in program(*inputs)]

    monkeypatch.setattr(torch, "compile", wrong)
    with pytest.raises(InputError, match="compile: products are off by "):
        Hessian(model, loss_fn, (x, y), compile=True)


def test_what_is_drawn_for_one_batch_is_not_recorded_for_all():
    model, loss_fn, x, y = make("conv")
    with pytest.raises(InputError, match="mc_samples: 2, expected None where"):
        Fisher(model, loss_fn, (x, y), mc_samples=2, compile=True)


def test_programs_are_cut_where_the_vector_comes_in():
    def whole(c, v):
        shared = c.exp()
        changed = (c * 2).add_(v)  # must not change what is kept for the next product
        return shared * changed, shared

    c, v = torch.randn(2, 3)
    first, second = _split(make_fx(whole)(c, v), constant=1)
    kept = first(c)
    for _ in range(2):
        for found, expected in zip(second(v, *kept), whole(c, v), strict=True):
            torch.testing.assert_close(found, expected)
