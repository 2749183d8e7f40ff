"""Small models of every architecture, and the dense matrices that operators have to equal."""

from time import sleep

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lossgeometry import GGN, Fisher, Hessian, line
from models.csan import CSAN

OPERATORS = {"hessian": Hessian, "ggn": GGN, "fisher": Fisher}
CLASSES = 3


class ResidualNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = F.relu(self.norm1(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv(x)))
        return self.head(x.mean((2, 3)))


def residual_network():
    """In evaluation mode, with statistics that are not those of a fresh network."""
    model = ResidualNetwork()
    for norm in (model.norm1, model.norm2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model.eval()


def csan(border="clamp", head_window=1, blocks=1, **options):
    return CSAN(
        image_size=4,
        channels=1,
        classes=CLASSES,
        patch_size=1,
        dim=3,
        depth=blocks,
        heads=3,
        mlp_ratio=1,
        window=3,
        head_window=head_window,
        border=border,
        **options,
    )


def vit():
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=4,
        patch_size=2,
        in_chans=1,
        embed_dim=4,
        depth=1,
        num_heads=2,
        num_classes=CLASSES,
    )


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5), nn.ELU(), nn.Linear(5, 3)
    )


class AlwaysDropout(nn.Linear):
    """Random numbers in the forward pass, in evaluation mode, too."""

    def forward(self, x):
        sleep(1e-3)  # time enough for another thread to seed the generator
        return super().forward(F.dropout(x.flatten(1), 0.5, training=True))


class Checkpointed(nn.Sequential):
    """Its forward pass runs again for every product."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def mini_batches(n=6, dtype=torch.float32, size=8):
    x, y = torch.randn(size * n, 1, 4, 4, dtype=dtype), torch.randint(0, CLASSES, (size * n,))
    return list(zip(x.split(size), y.split(size), strict=True))


MODELS = {
    **{
        f"csan-{border}-{m}": lambda border=border, m=m: csan(border, m)
        for border in ("clamp", "mask", "zero")
        for m in (1, 3)
    },
    "csan-cls": lambda: csan(pooling="cls"),
    "resnet": residual_network,
    "conv": conv_net,
    "vit": vit,  # its attention calls F.scaled_dot_product_attention
}
LOSSES = {"cross-entropy": F.cross_entropy, "soft": F.cross_entropy, "mse": F.mse_loss}


def targets_for(loss, n):
    if loss == "cross-entropy":
        return torch.randint(0, CLASSES, (n,))
    targets = torch.randn(n, CLASSES, dtype=torch.float64)
    return targets.softmax(1) if loss == "soft" else targets


def make(name, loss="cross-entropy", n=5):
    torch.manual_seed(0)
    return (
        MODELS[name]().double(),
        LOSSES[loss],
        torch.randn(n, 1, 4, 4, dtype=torch.float64),
        targets_for(loss, n),
    )


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def rows(outputs, parameters):
    """Gradients of all entries of `outputs`, as a dense matrix.

    Some at once where `torch.vmap` knows how, and checked by a combination of them without it.
    """
    entries, parameters = outputs.reshape(-1), list(parameters)
    eye = torch.eye(len(entries), dtype=entries.dtype)

    def gradients(weights, *shape, **how):
        found = torch.autograd.grad(
            entries, parameters, weights, retain_graph=True, allow_unused=True, **how
        )
        pieces = zip(found, parameters, strict=True)
        pieces = [p.new_zeros(*shape, *p.shape) if g is None else g for g, p in pieces]
        return torch.cat([piece.reshape(*shape, -1) for piece in pieces], -1)

    try:
        matrix = torch.cat(
            [gradients(some, len(some), is_grads_batched=True) for some in eye.split(16)]
        )
    except RuntimeError:
        return torch.stack([gradients(weights) for weights in eye])
    weights = torch.arange(len(entries), dtype=entries.dtype).cos()
    assert_same(weights @ matrix, gradients(weights), 1e4 * torch.finfo(entries.dtype).eps)
    return matrix


def dense(operator, model, loss_fn, x, y, parameters=None):
    parameters = list(model.parameters()) if parameters is None else parameters
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs = model(x)
        if operator == "hessian":
            gradient = torch.autograd.grad(loss_fn(outputs, y), parameters, create_graph=True)
            return rows(flat(gradient), parameters)
        if operator == "ggn":
            z = outputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(loss_fn(z, y), z, create_graph=True)
            J = rows(outputs, parameters)
            return J.T @ rows(slope, [z]) @ J
        losses = torch.stack([loss_fn(outputs[i : i + 1], y[i : i + 1]) for i in range(len(x))])
        gradients = rows(losses, parameters)
        return gradients.T @ gradients / len(x)


def assert_same(actual, expected, tolerance=1e-10):
    assert (actual - expected).norm() <= tolerance * expected.norm()


def identity(operator):
    return torch.eye(operator.shape[0], dtype=operator.dtype)


def some_vectors(operator):
    """Random ones: a matrix whose products with them are right is right."""
    return torch.randn(operator.shape[0], 20, dtype=operator.dtype)


def dense_hessian(loss, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return rows(flat(torch.autograd.grad(loss, parameters, create_graph=True)), parameters)


def assert_right(model, loss_fn, data, value, **how):
    """Products, gradients and the centre of a line are those of `value`, and nothing moved."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    H = Hessian(model, loss_fn, data, **how)
    assert_same(H @ identity(H), dense_hessian(value(), model), 1e-9)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert_same(H.gradient(), flat(torch.autograd.grad(value(), list(parameters.values()))), 1e-9)
    losses = {"loss": loss_fn}
    how.pop("micro_batch", None)
    still = {name: torch.zeros_like(p) for name, p in parameters.items()}
    found = line(model, losses, data, still, [0.0], **how)["loss"][0]
    assert found == pytest.approx(value().item(), rel=1e-9)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
