"""Models of other libraries and kinds: curvature and surface of each, against losses written anew.

Each loss is written down a second time, example by example and without padding, and differentiated
twice.
"""

import os
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # all of them are made of configurations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from lossgeometry import Hessian, eigenvector_directions, eigsh, surface
from tests.dense import assert_same, flat, identity, rows

CLASSES = 3
WORDS = {word: i for i, word in enumerate(["<pad>", *"abcdefghi"])}
SENTENCES = ["a b c d e", "f g", "h i a", "c"]


def case(model, loss_fn, data, value, *, tolerance=1e-9, **how):
    """`value()` is the loss that `loss_fn` is over all of `data`, in other words."""
    return SimpleNamespace(
        model=model, loss_fn=loss_fn, data=data, value=value, tolerance=tolerance, how=how
    )


def nll(logits, target):
    return logits.logsumexp(-1) - logits[target]


def tokenizer():
    words = Tokenizer(models.WordLevel(WORDS))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


def bert_classifier():
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        max_position_embeddings=6,
        num_labels=CLASSES,
    )
    return BertForSequenceClassification(config).double().eval()


def bert():
    """Batches as its data collator pads them, mappings that are no dicts; a loss of its own."""
    model, tokens = bert_classifier(), tokenizer()
    features = [{**tokens(s), "label": i % CLASSES} for i, s in enumerate(SENTENCES)]
    loader = DataLoader(features, batch_size=3, collate_fn=DataCollatorWithPadding(tokens))

    def value():
        losses = [
            nll(model(torch.tensor([f["input_ids"]])).logits[0], f["label"]) for f in features
        ]
        return torch.stack(losses).mean()

    return case(model, None, loader, value)


def gpt2(own_loss=False):
    """Weights tied, sentences padded, and the mean is over the words that there are to predict."""
    tokens = tokenizer()
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_positions=5,
        n_embd=4,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).double().eval()
    collator = DataCollatorForLanguageModeling(tokens, mlm=False)
    features = [tokens(sentence) for sentence in SENTENCES]
    loader = DataLoader(features, batch_size=3, collate_fn=collator)

    def loss_fn(outputs, batch):
        return F.cross_entropy(outputs.logits[:, :-1].mT, batch["labels"][:, 1:])

    def value():
        losses = []
        for feature in features:
            ids = torch.tensor([feature["input_ids"]])
            logits = model(ids).logits[0]
            losses += [nll(logits[i], ids[0, i + 1]) for i in range(ids.shape[1] - 1)]
        return torch.stack(losses).mean()

    def predicted(batch):
        return (batch["labels"][:, 1:] >= 0).sum()

    how = dict(tolerance=1e-6) if own_loss else {}  # its loss is float32, whatever the model is
    return case(model, None if own_loss else loss_fn, loader, value, count=predicted, **how)


def gpt2_with_its_own_loss():
    return gpt2(own_loss=True)


def vit():
    config = ViTConfig(
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        image_size=4,
        patch_size=2,
        num_channels=1,
        num_labels=CLASSES,
    )
    model = ViTForImageClassification(config).double().eval()
    images, labels = torch.randn(5, 1, 4, 4).double(), torch.arange(5) % CLASSES

    def value():
        logits = [model(image[None]).logits[0] for image in images]
        return torch.stack([nll(z, y) for z, y in zip(logits, labels, strict=True)]).mean()

    return case(model, None, {"pixel_values": images, "labels": labels}, value)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.numbers = nn.Conv2d(1, 3, 3), nn.Linear(2, 3)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, image, numbers):
        return self.head((self.image(image).mean((2, 3)) * self.numbers(numbers)).tanh())


def two_inputs():
    """From a DataLoader with workers."""
    model = Pair().double()
    examples = [
        ((torch.randn(1, 4, 4).double(), torch.randn(2).double()), i % CLASSES) for i in range(5)
    ]

    def value():
        losses = [nll(model(image[None], x[None])[0], y) for (image, x), y in examples]
        return torch.stack(losses).mean()

    return case(model, F.cross_entropy, DataLoader(examples, batch_size=2, num_workers=1), value)


def segmentation():
    """An OrderedDict of two maps, and pixels that do not count."""
    body = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.Tanh(), nn.Conv2d(4, 4, 3, 1, 1))
    backbone = IntermediateLayerGetter(body, {"1": "aux", "2": "out"})
    model = FCN(backbone, FCNHead(4, CLASSES), FCNHead(4, CLASSES)).double().eval()
    images, maps = torch.randn(4, 1, 6, 6).double(), torch.randint(CLASSES, (4, 6, 6))
    maps[maps.flatten().cumsum(0).reshape(maps.shape) % 5 == 0] = 255
    maps[0, :4] = 255

    def loss_fn(outputs, target):
        out, aux = (F.cross_entropy(outputs[k], target, ignore_index=255) for k in ("out", "aux"))
        return out + 0.4 * aux

    def value():
        counts = maps != 255
        outputs, chosen = model(images), maps.clamp(max=CLASSES - 1)[:, None]
        scores = [outputs[key].log_softmax(1).gather(1, chosen)[:, 0] for key in ("out", "aux")]
        return -((scores[0] + 0.4 * scores[1]) * counts).sum() / counts.sum()

    batches = [(images[:1], maps[:1]), (images[1:], maps[1:])]
    return case(model, loss_fn, batches, value, count=lambda batch: (batch[1] != 255).sum())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 2)
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 5)

    def forward(self, ids):
        return self.head(self.lstm(self.embed(ids))[0])


def lstm_language_model():
    model, text = Recurrent().double(), torch.randint(5, (3, 5))
    x, y = text[:, :-1], text[:, 1:]

    def value():
        losses = [nll(model(x[i : i + 1])[0, j], y[i, j]) for i in range(3) for j in range(4)]
        return torch.stack(losses).mean()

    return case(
        model, lambda z, t: F.cross_entropy(z.mT, t), [(x[:2], y[:2]), (x[2:], y[2:])], value
    )


def physics_informed():
    """The heat equation u_t = u_xx, from a sine on: outputs of different lengths."""
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    data = {"inside": torch.rand(7, 2).double(), "start": torch.rand(4, 1).double()}

    def forward(model, batch):
        x, t = (column.detach().requires_grad_() for column in batch["inside"].split(1, 1))
        u = model(torch.cat([x, t], 1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        start = model(torch.cat([batch["start"], torch.zeros_like(batch["start"])], 1))
        return {"residual": u_t - u_xx, "start": start}

    def loss_fn(outputs, batch):
        return (
            outputs["residual"].square().mean()
            + (outputs["start"] - (torch.pi * batch["start"]).sin()).square().mean()
        )

    def value():
        (w, b), (v, c) = ((layer.weight, layer.bias) for layer in (model[0], model[2]))
        h = (data["inside"] @ w.T + b).tanh()
        slope = 1 - h**2
        residual = slope @ (v[0] * w[:, 1]) + (2 * h * slope) @ (v[0] * w[:, 0] ** 2)
        start = (data["start"] @ w[:, :1].T + b).tanh() @ v.T + c
        return (residual**2).mean() + ((start - (torch.pi * data["start"]).sin()) ** 2).mean()

    return case(model, loss_fn, data, value, forward=forward)


def contrastive():
    """Two views of each image, no targets; an example's loss is nothing without the others."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    views = torch.randn(2, 7, 4).double()

    def loss_fn(outputs, _):
        z = F.normalize(torch.cat(outputs), dim=1)
        similar = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
        return F.cross_entropy(similar, torch.arange(len(z)).roll(len(z) // 2))

    def value():
        total = 0
        for batch in (views[:, :4], views[:, 4:]):
            z = model(batch.flatten(0, 1))
            z = z / z.norm(dim=1, keepdim=True)
            for i in range(len(z)):
                others = [j for j in range(len(z)) if j != i]
                twin = (i + len(z) // 2) % len(z)
                total += nll(z[others] @ z[i] / 0.5, others.index(twin)) / 2
        return total / 7

    return case(
        *(model, loss_fn, [tuple(views[:, :4]), tuple(views[:, 4:])], value),
        forward=lambda model, batch: (model(batch[0]), model(batch[1])),
    )


class LowRank(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def low_rank_adapters():
    """On a base that is frozen."""
    model = bert_classifier().requires_grad_(False)
    attention = model.bert.encoder.layer[0].attention.self
    attention.query, attention.value = LowRank(attention.query), LowRank(attention.value)
    for name, parameter in model.double().named_parameters():
        parameter.requires_grad_("down" in name or "up" in name)
    ids, labels = torch.randint(len(WORDS), (5, 4)), torch.arange(5) % CLASSES

    def value():
        losses = [nll(model(ids[i : i + 1]).logits[0], labels[i]) for i in range(5)]
        return torch.stack(losses).mean()

    return case(model, None, {"input_ids": ids, "labels": labels}, value)


CASES = [
    bert,
    gpt2,
    gpt2_with_its_own_loss,
    vit,
    two_inputs,
    segmentation,
    lstm_language_model,
    physics_informed,
    contrastive,
    low_rank_adapters,
]


@pytest.mark.parametrize("make", CASES)
def test_curvature_and_surface_are_of_the_loss(make):
    torch.manual_seed(0)
    its = make()
    before = {name: tensor.clone() for name, tensor in its.model.state_dict().items()}
    H = Hessian(its.model, its.loss_fn, its.data, **its.how)
    assert H.check().ok
    products = H @ identity(H)
    top = eigsh(H, 3, tol=its.tolerance)
    directions = eigenvector_directions(its.model, top.eigenvectors[:, :2])
    h, off = (2e-4, 1e-3) if its.tolerance < 1e-8 else (4e-3, 2e-2)
    found = surface(
        its.model, {"loss": its.loss_fn}, its.data, directions, [-h, 0, h], [-h, 0, h], **its.how
    )["loss"]
    torch.testing.assert_close(dict(its.model.state_dict()), before, rtol=0, atol=0)

    parameters = [p for p in its.model.parameters() if p.requires_grad]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = its.value()
        slopes = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
    dense = rows(flat(slopes), parameters)
    assert_same(products, dense, its.tolerance)
    eigenvalues = torch.linalg.eigvalsh(dense)
    largest = eigenvalues[eigenvalues.abs().argsort(descending=True)[:3]]
    torch.testing.assert_close(top.eigenvalues, largest, rtol=10 * its.tolerance, atol=0)
    assert found[1, 1] == pytest.approx(value.item(), rel=its.tolerance)
    for line, eigenvalue in zip((found[1], found[:, 1]), top.eigenvalues, strict=False):
        assert np.diff(line, 2)[0] / h**2 == pytest.approx(eigenvalue.item(), rel=off)
