"""Layers that research code has and PyTorch has not, each small."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Residual(nn.Module):
    """The identity and a branch, which is left out at random if `drop` is not zero."""

    def __init__(self, branch, drop=0.0, source="torch"):
        super().__init__()
        self.branch, self.drop, self.source = branch, drop, source

    def forward(self, x):
        if not (self.drop and self.training):
            return x + self.branch(x)
        if self.source == "python":  # a whole layer at a time
            return x if random.random() < self.drop else x + self.branch(x)
        if self.source == "numpy":
            draw = np.random.random()  # noqa: NPY002
            return x if draw < self.drop else x + self.branch(x)
        shape = (len(x), *(1 for _ in x.shape[1:]))
        kept = torch.rand(shape, dtype=torch.float64, device=x.device) >= self.drop
        return x + self.branch(x) * kept.to(x.dtype) / (1 - self.drop)


class Checkpointed(nn.Module):
    """A part that is computed anew in the backward pass, except where that is switched off."""

    on = True

    def __init__(self, part, reentrant):
        super().__init__()
        self.part, self.reentrant = part, reentrant

    def forward(self, x):
        if not self.on:
            return self.part(x)
        return checkpoint(self.part, x, use_reentrant=self.reentrant)

    @classmethod
    @contextlib.contextmanager
    def off(cls):
        cls.on = False
        try:
            yield
        finally:
            cls.on = True


class Gate(nn.Module):
    """Half of the features times a function of the other half."""

    def __init__(self, width, function, dim):
        super().__init__()
        self.widen = nn.Conv2d(width, 2 * width, 1) if dim == 1 else nn.Linear(width, 2 * width)
        self.function, self.dim = function, dim

    def forward(self, x):
        a, b = self.widen(x).chunk(2, self.dim)
        return a * self.function(b)


class Excite(nn.Module):
    """Squeeze and excitation, as MobileNetV3 has it."""

    def __init__(self, width, gate):
        super().__init__()
        self.scale, self.gate = nn.Conv2d(width, width, 1), gate

    def forward(self, x):
        return x * self.gate(self.scale(F.adaptive_avg_pool2d(x, 1)))


class Attention(nn.Module):
    """Multi-head self-attention, by the fused function or as written down."""

    def __init__(self, width, heads, fused, causal):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.fused, self.causal = heads, fused, causal

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            if self.causal:
                scores = scores.masked_fill(~torch.ones(t, t).tril().bool(), -torch.inf)
            mixed = scores.softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(n, t, d))


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence with itself."""

    def __init__(self, width, heads, weights):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.weights = weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.weights)[0]


class Encoder(nn.Module):
    """`nn.TransformerEncoder`, perhaps with padding."""

    def __init__(self, width, heads, padded, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, heads, 4, dropout=0.0, batch_first=True, **options
        )
        self.encoder, self.padded = nn.TransformerEncoder(layer, 1), padded

    def forward(self, x):
        if not self.padded:
            return self.encoder(x)
        length = 1 + (x[:, :1, 0] > 0) * (x.shape[1] - 2)
        padding = torch.arange(x.shape[1]) >= length
        return self.encoder(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)


class Recurrent(nn.Module):
    """The outputs of an RNN, LSTM or GRU."""

    def __init__(self, kind, width, out, **options):
        super().__init__()
        self.cells = getattr(nn, kind)(width, out, batch_first=True, **options)

    def forward(self, x):
        return self.cells(x)[0]


class Transposed(nn.Module):
    """A layer of (n, features, length) for sequences."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


class Pool(nn.Module):
    """Sequences and images to vectors."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        if self.how == "mean":
            return x.mean(1)
        if self.how == "max":
            return x.amax(1)
        if self.how == "logsumexp":
            return x.logsumexp(1)
        return x[:, -1]


class Twice(nn.Sequential):
    """The same weights a second time, with something in between."""

    def forward(self, x):
        return super().forward(super().forward(x).tanh())


class Running(nn.Module):
    """Division by a number that grows as it is used, in a buffer that is written or replaced."""

    def __init__(self, anew):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.anew = anew

    def forward(self, x):
        divided = x / self.scale.clone()
        if self.training and self.anew:
            self.scale = 1.1 * self.scale
        elif self.training:
            self.scale.mul_(1.1)
        return divided


class Spare(nn.Sequential):
    """Only the first of its layers is used."""

    def forward(self, x):
        return self[0](x)


class Symmetric(nn.Module):
    """A parametrization of square matrices."""

    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


class Network(nn.Module):
    """Stem, body and head, for one input or two; outputs of some kind."""

    def __init__(self, stem, body, head, outputs, own_loss=None):
        super().__init__()
        self.stem, self.body, self.head = stem, body, head
        self.outputs, self.own_loss = outputs, own_loss

    def forward(self, x, z=None, labels=None):
        features = self.body(self.stem(x if z is None else torch.cat([x, x * z.cos()], 1)))
        scores = self.head(features)
        if self.own_loss is not None:
            return {"logits": scores, "loss": self.own_loss(scores, labels)}
        if self.outputs == "dictionary":
            return {"scores": scores, "features": features, "name": None}
        return (scores, features) if self.outputs == "tuple" else scores


class Tied(nn.Module):
    """A head with the weights of an embedding."""

    def __init__(self, embedding):
        super().__init__()
        self.weight = embedding.weight

    def forward(self, x):
        return x @ self.weight.T


class Physics(nn.Module):
    """The residual of a differential equation for `inner`, which maps (n, 1) to (n, 1)."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, t):
        if self.how == "functorch":
            u = self.inner(t)

            def at(s):
                return self.inner(s[None, None])[0, 0]

            return torch.func.vmap(torch.func.grad(at))(t[:, 0])[:, None] + u.square()
        t = t.requires_grad_() if self.how == "in place" else t.detach().requires_grad_()
        with torch.enable_grad():
            u = self.inner(t)
            (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
            if self.how == "twice":
                (slope,) = torch.autograd.grad(slope.sum(), t, create_graph=True)
        return slope + u.square()
