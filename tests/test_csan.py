"""Window attention against a loop over queries, an unfold implementation and global attention."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from lossgeometry import InputError
from models import CSAN
from models.csan import WindowAttention

GRID, HEADS, DIM = 5, 4, 16


def loop_attention(layer: WindowAttention, x, window, head_window, border):
    """One query at a time, straight from the definition."""
    batch, tokens, dim = x.shape
    d = dim // HEADS
    q, k, v = layer.qkv(x).view(batch, tokens, 3, HEADS, d).unbind(2)
    out = torch.zeros(batch, tokens, HEADS, d, dtype=x.dtype)
    for row, col, head in itertools.product(range(GRID), range(GRID), range(HEADS)):
        top, left, first_head = row - window // 2, col - window // 2, head - head_window // 2
        first_head = min(max(first_head, 0), HEADS - head_window)
        if border == "clamp" or window >= GRID:
            top = min(max(top, 0), max(GRID - window, 0))
            left = min(max(left, 0), max(GRID - window, 0))
        keys, values = [], []
        for r, c, h in itertools.product(
            range(top, top + window),
            range(left, left + window),
            range(first_head, first_head + head_window),
        ):
            if 0 <= r < GRID and 0 <= c < GRID:
                keys.append(k[:, r * GRID + c, h])
                values.append(v[:, r * GRID + c, h])
            elif border == "zero" and window < GRID:
                keys.append(torch.zeros(batch, d, dtype=x.dtype))
                values.append(torch.zeros(batch, d, dtype=x.dtype))
        query = q[:, row * GRID + col, head]
        scores = torch.stack([(query * key).sum(-1) for key in keys], -1) * d**-0.5
        out[:, row * GRID + col, head] = (
            scores.softmax(-1)[..., None] * torch.stack(values, 1)
        ).sum(1)
    return layer.proj(out.flatten(2))


@pytest.mark.parametrize("border", ["clamp", "mask", "zero"])
@pytest.mark.parametrize("head_window", [1, 2, 3, HEADS])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7])
def test_agrees_with_a_loop_over_queries(window, head_window, border):
    layer = WindowAttention(DIM, HEADS, GRID, window, head_window, border).double()
    x = torch.randn(2, GRID**2, DIM, dtype=torch.float64)
    torch.testing.assert_close(
        layer(x), loop_attention(layer, x, window, head_window, border), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("border", ["clamp", "mask", "zero"])
@pytest.mark.parametrize("window", [GRID, GRID + 1, 3 * GRID])
def test_window_of_the_grid_or_more_is_global_attention(window, border):
    layer = WindowAttention(DIM, HEADS, GRID, window, 1, border).double()
    x = torch.randn(2, GRID**2, DIM, dtype=torch.float64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    expected = layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("window", [1, 3])
def test_zero_border_agrees_with_unfold(window):
    """Park and Kim's own way: unfold keys and values with zero padding."""
    layer = WindowAttention(DIM, HEADS, GRID, window, 1, "zero").double()
    x = torch.randn(2, GRID**2, DIM, dtype=torch.float64)
    d = DIM // HEADS
    q, k, v = layer.qkv(x).chunk(3, -1)
    k, v = (
        F.unfold(t.transpose(1, 2).unflatten(2, (GRID, GRID)), window, padding=window // 2)
        .view(2, HEADS, d, window**2, GRID**2)
        .permute(0, 1, 4, 3, 2)  # (B, heads, N, keys, d)
        for t in (k, v)
    )
    q = q.unflatten(-1, (HEADS, d)).permute(0, 2, 1, 3)[..., None, :]
    out = ((q * d**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v)[..., 0, :]
    torch.testing.assert_close(
        layer(x), layer.proj(out.transpose(1, 2).flatten(2)), rtol=0, atol=1e-14
    )


def test_every_query_sees_the_same_number_of_keys_when_clamped():
    for window in range(1, GRID + 1):
        bias = WindowAttention(DIM, HEADS, GRID, window, 3).bias
        keys = torch.full((GRID**2,), GRID**2) if bias is None else bias.isfinite().sum(1)
        assert (keys == (3 * window**2 if bias is not None else GRID**2)).all()


def small(**options):
    defaults = dict(
        image_size=8, channels=1, classes=10, patch_size=2, dim=12, depth=2, heads=3, window=3
    )
    return CSAN(**{**defaults, **options})


def test_class_token_sees_and_is_seen_by_every_token():
    bias = small(pooling="cls").blocks[0].attention.bias
    assert bias[0].isfinite().all()
    assert bias[:, 0].isfinite().all()
    assert not bias.isfinite().all()


@pytest.mark.parametrize("pooling", ["gap", "cls"])
@pytest.mark.parametrize("border", ["clamp", "mask", "zero"])
@pytest.mark.parametrize("head_window", [1, 3])
def test_differentiable_twice_in_both_modes_and_under_vmap(border, head_window, pooling):
    model = small(border=border, head_window=head_window, pooling=pooling).double()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    tangents = {n: torch.randn(2, *p.shape, dtype=p.dtype) for n, p in parameters.items()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, x).square().mean()

    def forward_over_reverse(tangent):
        return torch.func.jvp(torch.func.grad(loss), (parameters,), (tangent,))[1]

    forward = torch.func.vmap(forward_over_reverse)(tangents)
    leaves = {n: p.requires_grad_() for n, p in parameters.items()}
    gradient = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    reverse = torch.autograd.grad(
        gradient, list(leaves.values()), list(tangents.values()), is_grads_batched=True
    )
    for name, expected in zip(leaves, reverse, strict=True):
        torch.testing.assert_close(forward[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("border", ["clamp", "mask", "zero"])
@pytest.mark.parametrize(("window", "head_window"), [(3, 1), (3, 3), (8, 1), (8, 3)])
def test_inference_agrees_with_what_is_differentiated(window, head_window, border):
    attention = WindowAttention(12, 3, 8, window, head_window, border).double()
    x = torch.randn(2, 64, 12, dtype=torch.float64)
    with torch.no_grad():
        fused = attention(x)
    torch.testing.assert_close(fused, attention(x).detach(), rtol=1e-12, atol=1e-12)


def test_stochastic_depth_rises_linearly():
    model = small(depth=3, stochastic_depth=0.2)
    assert [block.drop_path1.p for block in model.blocks] == [0, 0.1, 0.2]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("window", 0),
        ("window", -3),
        ("head_window", 0),
        ("head_window", 4),
        ("border", "wrap"),
        ("pooling", "max"),
        ("heads", 5),
        ("patch_size", 3),
        ("depth", 0),
        ("stochastic_depth", 1.0),
        ("mlp_ratio", 0.0),
    ],
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(InputError, match=rf"^{option}: .*expected"):
        small(**{option: value})
