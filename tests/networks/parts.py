"""Random layers and chains of them, each with a text that says what it is."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from tests.networks import layers

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    name: getattr(nn, name)
    for name in (
        "Tanh Sigmoid Softplus SiLU GELU Mish ELU CELU SELU LogSigmoid Softsign Tanhshrink "
        "ReLU ReLU6 LeakyReLU Hardtanh Hardsigmoid Hardswish Softshrink Hardshrink PReLU RReLU"
    ).split()
} | {
    "GELU(tanh)": lambda: nn.GELU(approximate="tanh"),
    "ReLU(inplace)": lambda: nn.ReLU(inplace=True),
    "Hardswish(inplace)": lambda: nn.Hardswish(inplace=True),
    "Threshold": lambda: nn.Threshold(0.1, 0.3),
}
SMOOTH = ("Tanh", "Sigmoid", "Softplus", "SiLU", "GELU", "Mish")


@dataclass
class Part:
    """A module that keeps the kind of what it is given, and the number of its features then."""

    module: nn.Module
    text: str
    width: int


def activation(rng: random.Random, names: tuple[str, ...] = tuple(ACTIVATIONS)) -> Part:
    name = rng.choice(names)
    return Part(ACTIVATIONS[name](), name, 0)


# -- of any kind: vectors (n, d), sequences (n, t, d), images (n, d, h, w) -------------------------


def mixing(rng: random.Random, kind: str, width: int, out: int | None = None) -> Part:
    """Something affine."""
    out = out or rng.randint(2, 4)
    bias = rng.random() < 0.8
    if kind != "image":
        if kind == "sequence" and rng.random() < 0.3:
            mode = rng.choice(("zeros", "circular", "reflect", "replicate"))
            conv = nn.Conv1d(width, out, 3, padding=1, bias=bias, padding_mode=mode)
            return Part(layers.Transposed(conv), f"Conv1d({width},{out},{mode})", out)
        return Part(nn.Linear(width, out, bias=bias), f"Linear({width},{out})", out)
    choice = rng.randrange(5)
    if choice == 0:
        return Part(nn.Conv2d(width, out, 1, bias=bias), f"Conv2d({width},{out},1)", out)
    if choice == 1:
        conv = nn.ConvTranspose2d(width, out, 3, padding=1, bias=bias)
        return Part(conv, f"ConvTranspose2d({width},{out})", out)
    if choice == 2:
        conv = nn.Conv2d(width, 2 * width, 3, padding=1, groups=width, bias=bias)
        return Part(conv, f"Conv2d({width},{2 * width},groups={width})", 2 * width)
    mode = rng.choice(("zeros", "circular", "reflect"))
    conv = nn.Conv2d(width, out, 3, padding=1, bias=bias, padding_mode=mode, dilation=1)
    return Part(conv, f"Conv2d({width},{out},{mode})", out)


def norm(rng: random.Random, kind: str, width: int) -> Part:
    affine = rng.random() < 0.7
    batch = dict(
        affine=affine,
        momentum=rng.choice((0.1, None)),
        track_running_stats=rng.random() < 0.8,
    )
    if kind == "image":
        names = ("BatchNorm2d", "GroupNorm", "InstanceNorm2d", "LocalResponseNorm")
    else:
        names = ("LayerNorm", "RMSNorm", "BatchNorm1d")
        names += ("GroupNorm",) if kind == "vector" else ("InstanceNorm1d",)
    name = rng.choice(names)
    if name.startswith("Batch"):
        module = getattr(nn, name)(width, **batch)
        text = f"{name}({width},tracking={batch['track_running_stats']})"
    elif name.startswith("Instance"):
        module = getattr(nn, name)(width, affine=affine, track_running_stats=rng.random() < 0.4)
        text = f"{name}({width},tracking={module.track_running_stats})"
    elif name == "GroupNorm":
        groups = 1 if kind == "vector" else rng.choice([g for g in (1, 2, 3) if width % g == 0])
        module, text = nn.GroupNorm(groups, width, affine=affine), f"GroupNorm({groups},{width})"
    elif name == "LocalResponseNorm":
        module, text = nn.LocalResponseNorm(2, alpha=0.5), "LocalResponseNorm(2)"
    elif name == "RMSNorm":  # its eps is that of the dtype, unless given
        module, text = nn.RMSNorm(width, 1e-4, elementwise_affine=affine), f"RMSNorm({width})"
    else:
        module, text = nn.LayerNorm(width, 1e-4, elementwise_affine=affine), f"LayerNorm({width})"
    if kind == "sequence" and name[-2:] == "1d":
        module = layers.Transposed(module)
    return Part(module, text, width)


def gate(rng: random.Random, kind: str, width: int) -> Part:
    function = activation(rng, (*SMOOTH, "Hardsigmoid", "Hardswish", "ReLU"))
    if kind == "image" and rng.random() < 0.5:
        return Part(
            layers.Excite(width, function.module), f"Excite({width},{function.text})", width
        )
    dim = 1 if kind == "image" else -1
    return Part(layers.Gate(width, function.module, dim), f"Gate({width},{function.text})", width)


def dropout(rng: random.Random, kind: str, width: int) -> Part:
    name = rng.choice(("Dropout", "AlphaDropout", "Dropout2d" if kind == "image" else "Dropout"))
    return Part(getattr(nn, name)(0.3), f"{name}(0.3)", width)


def running(rng: random.Random, kind: str, width: int) -> Part:
    anew = rng.random() < 0.5
    return Part(layers.Running(anew), f"Running(anew={anew})", width)


# -- of sequences ----------------------------------------------------------------------------------


def attention(rng: random.Random, kind: str, width: int) -> Part:
    heads = rng.choice([h for h in (1, 2) if width % h == 0])
    choice = rng.randrange(4)
    if choice == 0:
        weights = rng.random() < 0.5
        text = f"MultiheadAttention({width},{heads},need_weights={weights})"
        return Part(layers.SelfAttention(width, heads, weights), text, width)
    if choice == 1:
        padded = rng.random() < 0.5
        options = dict(
            activation=rng.choice(("relu", "gelu")), norm_first=rng.random() < 0.5, bias=True
        )
        text = f"TransformerEncoder({width},{heads},padded={padded},{options})"
        return Part(layers.Encoder(width, heads, padded, **options), text, width)
    fused, causal = choice == 2, rng.random() < 0.5
    text = f"Attention({width},{heads},fused={fused},causal={causal})"
    return Part(layers.Attention(width, heads, fused, causal), text, width)


def recurrent(rng: random.Random, kind: str, width: int) -> Part:
    name, out = rng.choice(("RNN", "LSTM", "GRU")), rng.randint(2, 3)
    options = rng.choice(({}, {}, {"bidirectional": True}, {"num_layers": 2}))
    if name == "LSTM" and rng.random() < 0.3:
        options = {"proj_size": 1}
    width_out = 2 * out if "bidirectional" in options else options.get("proj_size", out)
    text = f"{name}({width},{out},{options})"
    return Part(layers.Recurrent(name, width, out, **options), text, width_out)


# -- of images -------------------------------------------------------------------------------------


def pooling(rng: random.Random, kind: str, width: int) -> Part:
    """Windows of three, with padding: of the same size."""
    name = rng.choice(("MaxPool2d", "AvgPool2d", "LPPool2d", "AdaptiveMaxPool2d", "Upsample"))
    if name == "LPPool2d":
        return Part(nn.Sequential(nn.Softplus(), nn.LPPool2d(2, 2)), "Softplus, LPPool2d(2)", width)
    if name == "AdaptiveMaxPool2d":
        return Part(nn.AdaptiveMaxPool2d(3), "AdaptiveMaxPool2d(3)", width)
    if name == "Upsample":
        mode = rng.choice(("nearest", "bilinear", "bicubic"))
        return Part(nn.Upsample((4, 4), mode=mode), f"Upsample({mode})", width)
    return Part(getattr(nn, name)(3, 1, 1), f"{name}(3)", width)


# -- compositions ----------------------------------------------------------------------------------

LEAVES = {
    "vector": (mixing, mixing, norm, gate, dropout, running),
    "sequence": (mixing, mixing, norm, gate, dropout, attention, attention, recurrent, running),
    "image": (mixing, mixing, norm, norm, gate, dropout, pooling, running),
}


def leaf(rng: random.Random, kind: str, width: int) -> Part:
    return rng.choice(LEAVES[kind])(rng, kind, width)


def chain(rng: random.Random, kind: str, width: int, depth: int, *, back: bool = False) -> Part:
    """Layers one after another; `back`: to as many features as there were."""
    parts, now = [], width
    for _ in range(depth):
        part = (composed if rng.random() < 0.35 else leaf)(rng, kind, now)
        parts.append(part)
        now = part.width
        if rng.random() < 0.5:
            parts.append(activation(rng))
    if back and now != width:
        parts.append(mixing(rng, kind, now, width))
        if parts[-1].width != width:  # a convolution in groups has a width of its own
            out = nn.Conv2d(parts[-1].width, width, 1)
            parts.append(Part(out, f"Conv2d({parts[-1].width},{width},1)", width))
        now = width
    modules = [part.module for part in parts]
    return Part(nn.Sequential(*modules), " > ".join(part.text for part in parts), now)


def composed(rng: random.Random, kind: str, width: int) -> Part:
    """A chain with something done to it."""
    choice = rng.choice(
        "residual residual checkpoint checkpoint twice frozen spare compiled mode".split()
    )
    if choice in ("residual", "twice"):
        inner = chain(rng, kind, width, 1, back=True)
        if "Pool" in inner.text or "Upsample" in inner.text:  # another size
            return inner
        if choice == "twice":
            return Part(layers.Twice(inner.module), f"twice({inner.text})", width)
        drop, source = (
            rng.choice((0.0, 0.0, 0.4)),
            rng.choice(("torch", "torch", "python", "numpy")),
        )
        text = f"residual({inner.text}" + (f", drop={drop} by {source})" if drop else ")")
        return Part(layers.Residual(inner.module, drop, source), text, width)
    inner = chain(rng, kind, width, rng.randint(1, 2))
    if choice == "checkpoint":
        reentrant = rng.random() < 0.5
        text = f"checkpoint[reentrant={reentrant}]({inner.text})"
        return Part(layers.Checkpointed(inner.module, reentrant), text, inner.width)
    if choice == "frozen":
        inner.module.requires_grad_(False)
    if choice == "spare":
        inner.module = layers.Spare(inner.module, nn.Linear(2, 2))
    if choice == "compiled":
        inner.module.compile(backend="eager")
    if choice == "mode":  # kept by `set_modes`
        inner.module.other_mode = True
    return Part(inner.module, f"{choice}({inner.text})", inner.width)


def parametrised(rng: random.Random, model: nn.Module, dtype: torch.dtype) -> str:
    """Reparametrise a weight of some layer; says which and how."""
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv1d))
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and module.weight.requires_grad
    ]
    if not candidates:
        return ""
    name, module = rng.choice(candidates)
    square = module.weight.ndim == 2 and len(set(module.weight.shape)) == 1
    how = rng.choice(
        ("weight_norm", "old weight_norm", "spectral_norm", "old spectral_norm")
        + square * ("symmetric", "matrix_exp", "cayley")
    )
    if how == "matrix_exp" and dtype == torch.bfloat16:
        how = "cayley"  # the gradient of the former is NaN (PyTorch 2.14)
    if how == "old weight_norm":
        old_weight_norm(module, dim=rng.choice((0, 1, None)))
    elif how == "old spectral_norm":
        old_spectral_norm(module)
    elif how == "symmetric":
        parametrize.register_parametrization(module, "weight", layers.Symmetric())
    elif how in ("matrix_exp", "cayley"):
        parametrizations.orthogonal(module, orthogonal_map=how)
    else:
        getattr(parametrizations, how)(module)
    return f"{how} of {name}"
