"""A random network with a loss and data, and the same written down plainly, from a seed."""

from __future__ import annotations

import contextlib
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import weight_norm
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

from lossgeometry.seeds import seed_everything, untouched_rng
from tests.networks import layers, parts

MOST_PARAMETERS = 300
CLASSES = 3
IGNORED = -100
CPU = torch.device("cpu")


@dataclass
class Loss:
    """``function(scores, targets)``, and whether it is a sum over examples."""

    text: str
    function: Callable[[Tensor, Tensor], Tensor]
    is_sum: bool = False


@dataclass
class Problem:
    """What ``Hessian(model, loss, data(), **how, **options)`` is of, and what that comes to.

    ``loss_of(batch)`` is the loss of one of the `batches`, which counts with its weight.
    """

    seed: str
    precise: bool  # numbers are those of `dtype`, but calculated with in double precision
    dtype: torch.dtype
    text: str
    given: nn.Module  # in some wrapper, or not
    model: nn.Module
    loss: Callable[[Any, Any], Tensor] | None
    data: Callable[[], Any]
    batches: list[Any]
    weights: list[float]
    loss_of: Callable[[Any], Tensor]
    outputs_of: Callable[[Any], Any]
    loss_at: Callable[[Any, Any], Tensor]  # of outputs, and a batch
    how: dict[str, Any]
    options: dict[str, Any]

    def twin(self, *, precise: bool) -> Problem:
        """The same with a model of its own."""
        return _drawn(self.seed, precise)


def _weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    dims = [d for d in range(v.ndim) if d != dim]  # of dim -1, all
    return g * v / v.square().sum(dims, keepdim=dim >= 0).sqrt()


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Models as they are written: nothing fused, compiled, computed anew or without derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            layers.Checkpointed.off(),
            sdpa_kernel(SDPBackend.MATH),
            torch.compiler.set_stance("force_eager"),
            mock.patch.object(torch, "_weight_norm", _weight_norm),
            mock.patch.object(sys.modules[weight_norm.__module__], "_weight_norm", _weight_norm),
            mock.patch.object(F, "hardsigmoid", lambda x, inplace: (x / 6 + 0.5).clamp(0, 1)),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


# -- losses ----------------------------------------------------------------------------------------


def classification(rng: random.Random, dtype: torch.dtype) -> Loss:
    weight = torch.tensor([1.0, 5.0, 0.5]).to(dtype)

    def focal(z: Tensor, y: Tensor) -> Tensor:
        nll = F.cross_entropy(z, y, reduction="none")
        return ((1 - (-nll).exp()) ** 2 * nll).mean()

    def contrast(z: Tensor, y: Tensor) -> Tensor:
        z = F.normalize(z + 0.1, dim=1)
        return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)).roll(1))

    def noisy(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z + torch.randn(z.shape, dtype=torch.float64).to(z), y)

    return rng.choice(
        [
            Loss("cross-entropy", F.cross_entropy),
            Loss("weighted classes", nn.CrossEntropyLoss(weight)),
            Loss("one class ignored", nn.CrossEntropyLoss(ignore_index=1)),
            Loss("label smoothing", nn.CrossEntropyLoss(label_smoothing=0.1)),
            Loss("sum", nn.CrossEntropyLoss(reduction="sum"), True),
            Loss("weighted sum", nn.CrossEntropyLoss(weight, reduction="sum"), True),
            Loss("soft", lambda z, y: F.cross_entropy(z, 0.8 * F.one_hot(y, CLASSES).to(z) + 0.05)),
            Loss("focal", focal),
            Loss("multi-margin", lambda z, y: F.multi_margin_loss(z, y, p=2)),
            Loss("nll", lambda z, y: F.nll_loss(z.log_softmax(1), y)),
            Loss("contrast", contrast),
            Loss("noisy", noisy),
        ]
    )


def regression(rng: random.Random, dtype: torch.dtype) -> Loss:
    positive = torch.tensor([1.0, 3.0, 2.0]).to(dtype)

    def triplet(z: Tensor, y: Tensor) -> Tensor:
        return F.softplus((z - y).norm(dim=1) - (z - y.roll(1, 0)).norm(dim=1)).mean()

    return rng.choice(
        [
            Loss("MSE", F.mse_loss),
            Loss("MSE sum", nn.MSELoss(reduction="sum"), True),
            Loss("half the squares, by example", lambda z, y: (z - y).square().sum(1).mean() / 2),
            Loss("Huber", F.huber_loss),
            Loss("smooth L1 sum", nn.SmoothL1Loss(reduction="sum"), True),
            Loss("L1", F.l1_loss),
            Loss("BCE", lambda z, y: F.binary_cross_entropy_with_logits(z, y.sigmoid())),
            Loss(
                "BCE of positive weight",
                lambda z, y: F.binary_cross_entropy_with_logits(
                    z, (y > 0).to(z), pos_weight=positive
                ),
            ),
            Loss("BCE sum", nn.BCEWithLogitsLoss(reduction="sum"), True),
            Loss(
                "KL", lambda z, y: F.kl_div(z.log_softmax(1), y.softmax(1), reduction="batchmean")
            ),
            Loss("Poisson", lambda z, y: F.poisson_nll_loss(z, y.abs())),
            Loss("cosine", lambda z, y: 1 - F.cosine_similarity(z + 0.1, y).mean()),
            Loss(
                "Gaussian", lambda z, y: F.gaussian_nll_loss(z, y, F.softplus(z.roll(1, 1)) + 0.1)
            ),
            Loss("triplet", triplet),
        ]
    )


def over_tokens(rng: random.Random) -> Loss:
    def mean(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=IGNORED)

    def total(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.mT, y, reduction="sum", ignore_index=IGNORED)

    return Loss("sum over tokens", total, True) if rng.random() < 0.3 else Loss("tokens", mean)


# -- networks --------------------------------------------------------------------------------------


@dataclass
class Built:
    model: nn.Module
    text: str
    inputs: Callable[[int, int], tuple[Tensor, ...]]  # of so many examples, of a length
    tokens: bool = False  # a score for each position
    physics: bool = False


def network(rng: random.Random) -> Built:
    """Some network of at most `MOST_PARAMETERS`."""
    kind = rng.choice("vector vector sequence image image tokens tokens two physics".split())
    if kind == "physics":
        return _physics(rng)
    width = rng.randint(2, 4)
    body_kind = {"two": "vector", "tokens": "sequence"}.get(kind, kind)
    stem: nn.Module
    if kind == "tokens":
        padding = rng.choice((None, 0))
        stem, text = nn.Embedding(5, width, padding_idx=padding), f"Embedding(5,{width},{padding})"
    else:
        given = {"two": 4, "image": 1}.get(kind, 3)
        part = parts.mixing(rng, body_kind, given, width)
        stem, text, width = part.module, part.text, part.width
    body = parts.chain(rng, body_kind, width, rng.randint(1, 3))
    by_token = kind == "tokens" and rng.random() < 0.6
    if by_token:
        tied = body.width == width and rng.random() < 0.6
        head = layers.Tied(stem) if tied else nn.Linear(body.width, 5)
        text += f" > {body.text} > {'tied head' if tied else 'head'}"
    else:
        pools = (
            []
            if body_kind == "vector"
            else [layers.Pool(rng.choice(("mean", "last", "max", "logsumexp")))]
        )
        head = nn.Sequential(*pools, nn.Linear(body.width, CLASSES))
        text += f" > {body.text} > {pools[0].how if pools else ''} head"
    outputs = "scores" if rng.random() < 0.6 else rng.choice(("dictionary", "tuple"))
    model = layers.Network(stem, body.module, head, outputs)

    def inputs(n: int, length: int) -> tuple[Tensor, ...]:
        if kind == "tokens":
            return (torch.randint(5, (n, length)),)
        shape = {"sequence": (n, length, 3), "image": (n, 1, 4, 4), "two": (n, 2)}.get(kind, (n, 3))
        return tuple(torch.randn(shape) for _ in range(2 if kind == "two" else 1))

    return Built(model, f"{kind}: {text}, outputs {outputs}", inputs, by_token)


def _physics(rng: random.Random) -> Built:
    how = rng.choice(("detached", "in place", "twice", "functorch"))
    act = parts.activation(rng, parts.SMOOTH)
    inner = nn.Sequential(nn.Linear(1, 4), act.module, nn.Linear(4, 4), act.module, nn.Linear(4, 1))
    text = f"physics: {how}, Linear(1,4) > {act.text} > Linear(4,4) > {act.text} > Linear(4,1)"
    return Built(layers.Physics(inner, how), text, lambda n, _: (torch.rand(n, 1),), physics=True)


def set_modes(rng: random.Random, model: nn.Module) -> str:
    """Training or evaluation, of some parts the other."""
    trains = rng.random() < 0.45
    model.train(trains)
    for module in model.modules():
        if getattr(module, "other_mode", False):
            module.train(not trains)
    return "training" if trains else "evaluation"


# -- data ------------------------------------------------------------------------------------------


def in_batches(
    rng: random.Random, built: Built, loss: Loss, regresses: bool
) -> tuple[list[tuple[tuple[Tensor, ...], Tensor]], str]:
    """Batches of inputs and targets."""
    sizes = rng.choice(([5], [4, 3], [2, 5, 3], [3, 3, 3], [40], [34, 6], [2]))
    if sizes == [40] and built.tokens:
        sizes = [6]
    ragged = built.tokens and rng.random() < 0.4
    length = rng.randint(2, 4)
    batches = []
    for size in sizes:
        x = built.inputs(size, length)
        if built.tokens:
            y = torch.randint(5, x[0].shape)
            y[torch.rand(y.shape) < 0.3] = IGNORED
            y[:, 0] = torch.randint(5, (size,))
        elif built.physics:
            y = torch.zeros(size, 1)
        else:
            y = torch.randn(size, CLASSES) if regresses else torch.randint(CLASSES, (size,))
            if not regresses:
                y[0] = 0  # not all are of the class that may be ignored
        batches.append((x, y))
        length += ragged
    return batches, f"batches of {sizes}" + (", ragged" if ragged else "")


def _cast(tree: Any, *dtypes: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            for dtype in dtypes:
                leaf = leaf.to(dtype)
        return leaf

    return pytree.tree_map(cast, tree)


# -- all together ----------------------------------------------------------------------------------


class Impossible(Exception):
    """The network itself does not run."""


def make_problem(seed: int) -> Problem:
    """The problem of this seed."""
    for attempt in range(100):
        with contextlib.suppress(Impossible):
            return _problem(f"{seed} {attempt}")
    raise AssertionError(f"seed {seed}: no network that runs")


def _problem(seed: str) -> Problem:
    """One whose model is small and runs, once each precision has been tried."""
    for precise in (True, False):
        tried = _drawn(seed, precise)
        parameters = [p for p in tried.model.parameters() if p.requires_grad]
        if not 0 < sum(p.numel() for p in tried.model.parameters()) <= MOST_PARAMETERS:
            raise Impossible
        try:
            with plainly(), untouched_rng(CPU):
                losses = torch.stack([tried.loss_of(batch) for batch in tried.batches])
                torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        except (RuntimeError, ValueError, IndexError) as error:
            raise Impossible from error
        if not losses.isfinite().all():
            raise Impossible
    return _drawn(seed, False)


def _drawn(seed: str, precise: bool) -> Problem:
    rng = random.Random(seed)
    with untouched_rng(CPU):
        seed_everything(CPU, rng.getrandbits(40))
        return _composed(rng, seed, precise)


def _composed(rng: random.Random, seed: str, precise: bool) -> Problem:
    dtype = rng.choices((torch.float64, torch.float32, torch.bfloat16), (6, 3, 1))[0]
    dtypes = (dtype, torch.float64) if precise else (dtype,)
    built = network(rng)
    regresses = rng.random() < 0.4
    if built.tokens:
        loss = over_tokens(rng)
    elif built.physics:
        loss = Loss("MSE", F.mse_loss)
        loss = rng.choice((loss, Loss("MSE sum", nn.MSELoss(reduction="sum"), True)))
    else:
        loss = (regression if regresses else classification)(rng, dtypes[-1])
    batches, data_text = in_batches(rng, built, loss, regresses)
    with torch.no_grad():
        for parameter in built.model.parameters():
            if parameter.ndim < 2:  # no zeros and ones, which hide mistakes
                parameter.add_(0.3 * torch.randn(parameter.shape))
    zeroed = rng.random() < 0.1 and not isinstance(built.model, layers.Physics)
    if zeroed:
        for parameter in built.model.head.parameters():
            nn.init.zeros_(parameter)
    changes = ["zeros in the head"] * zeroed
    changes += [parts.parametrised(rng, built.model, dtype)] if rng.random() < 0.25 else []
    names = [name for name, p in built.model.named_parameters() if p.requires_grad]
    if rng.random() < 0.15 and len(names) > 2:
        built.model.get_parameter(names[0]).requires_grad_(False)
        changes.append("first parameter frozen")
    changes.append(set_modes(rng, built.model))
    for cast in dtypes:
        built.model.to(cast)
    delivery = _delivered(rng, built, loss, _cast(batches, *dtypes))

    given: nn.Module = built.model
    wrapped = rng.choice((*(None,) * 8, "DataParallel", "compiled"))
    if wrapped == "DataParallel":
        given = nn.DataParallel(given)
    elif wrapped == "compiled":
        given = torch.compile(given, backend="eager")  # type: ignore[assignment]
    if rng.random() < 0.1 and len(names) > 1:
        delivery["how"]["params"] = "^" + re.escape(rng.choice(names[1:]).rsplit(".", 1)[0])
    options: dict[str, Any] = {}
    for name, share, values in (
        ("weight_decay", 0.2, (0.3,)),
        ("memory", 0.1, (0,)),
        ("micro_batch", 0.1, (1, 2, 5)),
    ):
        if rng.random() < share:
            options[name] = rng.choice(values)
    said = [built.text, *changes, f"loss {loss.text}", f"{data_text} {delivery.pop('text')}"]
    how = [
        name if callable(value) else f"{name}={value}" for name, value in delivery["how"].items()
    ]
    said += [wrapped or "", *how, *(f"{name}={value}" for name, value in options.items())]
    text = "; ".join(part for part in (*said, str(dtype).removeprefix("torch.")) if part)
    return Problem(seed, precise, dtype, text, given, built.model, options=options, **delivery)


def _delivered(
    rng: random.Random,
    built: Built,
    loss: Loss,
    batches: list[tuple[tuple[Tensor, ...], Tensor]],
) -> dict[str, Any]:
    """The batches in some form, and the fields of a problem that depend on it."""
    model = built.model
    kinds = "pairs pairs mappings dictionaries own triples loader arrays generator".split()
    kind = rng.choice(kinds[:2] + kinds[5:] if built.physics else kinds)
    delivered: list[Any] = []
    for x, y in batches:
        named = dict(zip("xz", x, strict=False))
        if kind == "mappings":
            delivered.append((named, y))
        elif kind in ("dictionaries", "own"):
            delivered.append({**named, "labels": y})
        elif kind == "triples":
            delivered.append((x, y, torch.arange(len(y))))
        else:
            delivered.append((x if len(x) > 1 else x[0], y))
    features_count = rng.random() < 0.5 and not loss.is_sum

    def targets_in(targets: Any) -> Tensor:
        """Of what a loss is given besides the outputs."""
        if isinstance(targets, Tensor):
            return targets
        return targets["labels"] if isinstance(targets, dict) else targets[1]

    def loss_fn(outputs: Any, targets: Any) -> Tensor:
        several = isinstance(outputs, (dict, tuple))
        scores = (
            (outputs["scores"] if isinstance(outputs, dict) else outputs[0]) if several else outputs
        )
        found = loss.function(scores, targets_in(targets))
        if isinstance(outputs, dict) and features_count:
            found = found + 0.1 * outputs["features"].square().mean()
        return found

    if kind == "own":
        model.own_loss = loss.function
    counted = built.tokens and not loss.is_sum and not features_count and rng.random() < 0.6
    how: dict[str, Any] = {}
    if kind == "triples":
        how["forward"] = lambda model, batch: model(*batch[0])
    counts = [len(y) for _, y in batches]
    if counted:
        how["count"] = lambda batch: (targets_in(batch) != IGNORED).sum()
        counts = [int((y != IGNORED).sum()) for _, y in batches]

    def outputs_of(batch: Any) -> Any:
        if isinstance(batch, dict):
            return model(**batch)
        x = batch[0]
        if isinstance(x, dict):
            return model(**x)
        return model(*x) if isinstance(x, tuple) else model(x)

    def loss_at(outputs: Any, batch: Any) -> Tensor:
        return outputs["loss"] if kind == "own" else loss_fn(outputs, batch)

    def data() -> Any:
        if (
            kind == "loader"
            and isinstance(delivered[0][0], Tensor)
            and len({x.shape[1:] for x, _ in delivered}) == 1
        ):
            examples = TensorDataset(*map(torch.cat, zip(*delivered, strict=True)))
            cuts = np.cumsum([len(y) for _, y in batches])
            order = np.split(np.arange(cuts[-1]), cuts[:-1])
            return DataLoader(examples, batch_sampler=order, generator=torch.Generator())
        if kind == "arrays":
            return _arrays(delivered)
        if kind == "generator":
            return (batch for batch in delivered)
        alone = (
            len(delivered) == 1 and kind in ("pairs", "dictionaries") and len(batches[0][0]) == 1
        )
        return delivered[0] if alone else delivered

    return dict(
        text=f"as {kind}" + ", tokens counted" * counted,
        loss=None if kind == "own" else loss_fn,
        data=data,
        batches=delivered,
        weights=[1.0 if loss.is_sum else count / sum(counts) for count in counts],
        loss_of=lambda batch: loss_at(outputs_of(batch), batch),
        outputs_of=outputs_of,
        loss_at=loss_at,
        how=how,
    )


def _arrays(tree: Any) -> Any:
    def array(leaf: Any) -> Any:
        return leaf if leaf.dtype == torch.bfloat16 else leaf.numpy()

    return pytree.tree_map(array, tree)
