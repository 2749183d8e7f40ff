"""Metrics of a model, averaged over a data set, as a function of its weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from analysis.functional import functional_call
from analysis.parameters import select_parameters
from analysis.threads import MOST_THREADS, free_threads, parallel
from models.devices import full_precision
from models.errors import InputError
from models.memory import Halving
from models.seeds import derive_seed, seed_everything, untouched_rng

Batch: TypeAlias = tuple[Tensor, Tensor]
Data: TypeAlias = "Batch | Iterable[Batch]"
Sets: TypeAlias = "Data | Mapping[str, Data]"
Metric: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# Examples in one forward pass, chosen by measurement and fixed, for the last bits depend on it:
# more fall out of the cache of a CPU core, a GPU needs many to be busy.
MICRO_BATCH = {"cpu": 16, "cuda": 1024}


class Evaluator:
    """Mean of each metric over all examples, at any weights; the model itself never changes.

    Parameters
    ----------
    model : nn.Module
        Evaluated in the mode it is in. In training mode the batches of `data` are those that are
        fed, and what is random (stochastic depth, dropout) is drawn once per batch: it is the same
        at all weights. In evaluation mode the examples are regrouped for speed.
    metrics : mapping of str to callable
        ``fn(outputs, targets) -> scalar tensor``, the mean over the batch.
    data : (x, y), iterable of (x, y), or mapping of str to one of them
        First dimension: examples. A mapping is of several sets of examples, each with all metrics,
        which are called "SET/METRIC"; what is random is the same for all sets.
    seed : int
        Of whatever the model or a metric draws.
    recalibrate : (x, y), or iterable of (x, y), optional
        Data on which the running statistics of every BatchNorm are computed anew at each point.
        By default they stay those of `model`.
    bf16 : bool
        Compute in bfloat16 what `torch.autocast` deems safe.

    Raises
    ------
    InputError
        If there are no metrics or no examples.
    """

    def __init__(
        self,
        model: nn.Module,
        metrics: Mapping[str, Metric],
        data: Sets,
        *,
        seed: int = 0,
        recalibrate: Data | None = None,
        bf16: bool = False,
    ) -> None:
        if not metrics:
            raise InputError("metrics: none given, expected at least one")
        self.model = model
        self.metrics = dict(metrics)
        self.weights = {name: p.detach() for name, p in select_parameters(model).items()}
        first = next(iter(self.weights.values()))
        self.device, self._dtype = first.device, first.dtype
        named = data if isinstance(data, Mapping) else {"": data}
        self._sets = [batches_on(self.device, examples) for examples in named.values()]
        self._idle: SimpleQueue[tuple[nn.Module, dict[str, Metric]]] = SimpleQueue()
        self._idle.put((model, self.metrics))
        self._threads: int | None = None  # that may share the work, once known
        self._at_once: Halving | None = None
        if not _depends_on_batches(model):
            self._at_once = Halving(MICRO_BATCH.get(self.device.type, 256), "landscape")
            self._sets = [_regroup(batches, self._at_once.size) for batches in self._sets]
        self.names = [f"{name}/{metric}".lstrip("/") for name in named for metric in metrics]
        self._calibration = None if recalibrate is None else batches_on(self.device, recalibrate)
        self._seed = seed
        self._bf16 = bf16

    def attributes(self) -> dict[str, str | int]:
        """How the numbers come about, by names that make sense beside them in a file."""
        batches = [batch for examples in self._sets for batch in examples]
        kept = "kept" if batch_norms(self.model) else "none"
        return {
            "mode": "train" if any(m.training for m in self.model.modules()) else "eval",
            "batchnorm": kept if self._calibration is None else "recalibrated",
            "examples": sum(len(x) for x, _ in batches),
            "precision": "bfloat16" if self._bf16 else str(self._dtype).removeprefix("torch."),
            "forward_passes": len(batches),
            "seed": self._seed,
            "fingerprint": fingerprint(
                [*self.weights.values(), *(t for batch in batches for t in batch)]
            ),
        }

    def __call__(self, weights: Mapping[str, Tensor]) -> np.ndarray:
        """Metrics at `weights`, float64 in the order of `names`.

        Where memory does not suffice, the batches are halved in evaluation mode: in training mode
        they are what is measured.
        """
        if self._at_once is None:
            return self._values(weights)
        return self._at_once(partial(self._values, weights))

    @full_precision()
    def _values(self, weights: Mapping[str, Tensor], at_most: int | None = None) -> np.ndarray:
        with untouched_rng(self.device), torch.inference_mode():
            tensors = {**weights, **cloned_buffers(self.model)}
            if self._calibration is not None:
                _recalibrate(self.model, tensors, self._calibration)
            sets = [_cut(batches, at_most) for batches in self._sets]
            return torch.cat([self._means(tensors, each) for each in sets]).cpu().numpy()

    def _means(self, tensors: dict[str, Tensor], batches: Sequence[Batch]) -> Tensor:
        sums = dict(
            parallel(
                partial(self._sums, tensors),
                list(enumerate(batches)),
                self._workers(tensors, batches),
            )
        )
        # In one order, which the last bits depend on.
        total = torch.stack([sums[i] for i in range(len(batches))]).sum(0)
        return total / sum(len(x) for x, _ in batches)

    def _sums(self, tensors: dict[str, Tensor], numbered: tuple[int, Batch]) -> Tensor:
        """Metrics of one batch, times its examples."""
        i, (x, y) = numbered
        model, metrics = self._idle.get()
        try:
            with (
                torch.inference_mode(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16),
            ):
                seed_everything(self.device, derive_seed(self._seed, i))
                outputs = functional_call(model, tensors, x)
                means = [torch.as_tensor(fn(outputs, y)) for fn in metrics.values()]
                return len(x) * torch.stack([mean.to(x.device, torch.float64) for mean in means])
        finally:
            self._idle.put((model, metrics))

    def _workers(self, tensors: dict[str, Tensor], batches: Sequence[Batch]) -> int:
        """Threads among which so many batches are divided; one where memory was short."""
        if self.device.type != "cpu" or self._at_once is None:
            return 1
        at_most = min(free_threads(), len(batches), MOST_THREADS)
        if at_most == 1 or self._at_once.size < MICRO_BATCH["cpu"]:
            return 1
        if self._threads is None:
            self._threads = self._make_ready(tensors, batches[0])
        return min(at_most, self._threads)

    def _make_ready(self, tensors: dict[str, Tensor], batch: Batch) -> int:
        """A copy of model and metrics for each thread, which share the weights; how many there are.

        There is but one where threads would meet: random numbers come from one generator, and a
        hook may keep what it sees.
        """
        self._sums(tensors, (0, batch))
        drawn = torch.get_rng_state()
        seed_everything(self.device, derive_seed(self._seed, 0))
        hooks = any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())
        if hooks or not torch.equal(drawn, torch.get_rng_state()):
            return 1
        threads = min(free_threads(), MOST_THREADS)
        shared = (*self.model.parameters(), *self.model.buffers())
        try:
            for _ in range(threads - 1):
                memo = {id(tensor): tensor for tensor in shared}
                self._idle.put(copy.deepcopy((self.model, self.metrics), memo))
        except (TypeError, RuntimeError):
            return 1  # it cannot be copied
        return threads

    @full_precision()
    def value_and_gradient(self, weights: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The first metric of the first set at `weights`, and its gradient."""
        batches = self._sets[0]
        examples = sum(len(x) for x, _ in batches)
        loss = next(iter(self.metrics.values()))
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        value = torch.zeros((), dtype=torch.float64, device=self.device)
        with untouched_rng(self.device), torch.enable_grad():
            for i, (x, y) in enumerate(batches):
                seed_everything(self.device, derive_seed(self._seed, i))
                tensors = {**leaves, **cloned_buffers(self.model)}
                share = loss(functional_call(self.model, tensors, x), y) * len(x) / examples
                value += share.detach()
                gradients = torch.autograd.grad(share, list(leaves.values()), allow_unused=True)
                for name, gradient in zip(leaves, gradients, strict=True):
                    if gradient is not None:
                        total[name] += gradient
        return value.item(), total


@torch.no_grad()
def displaced(
    weights: Mapping[str, Tensor],
    directions: Sequence[Mapping[str, Tensor]],
    steps: Sequence[float],
) -> dict[str, Tensor]:
    """The point ``weights + sum(steps[i] * directions[i])``."""
    moved = dict(weights)
    for direction, step in zip(directions, steps, strict=True):
        if direction:  # one kernel for all tensors
            starts = [moved[name] for name in direction]
            sums = torch._foreach_add(starts, list(direction.values()), alpha=step)
            moved.update(zip(direction, sums, strict=True))
    return moved


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Hash of the entries of `tensors`, to tell whether two calls are about the same."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def batches_on(device: torch.device, data: Data) -> list[Batch]:
    """The batches of `data` as a list on `device`; raises `InputError` if there are no examples."""
    pairs = [data] if isinstance(data, tuple) and isinstance(data[0], Tensor) else data
    batches = [(x.to(device), y.to(device)) for x, y in pairs]
    if not sum(len(x) for x, _ in batches):
        raise InputError("data: no examples, expected at least one")
    return batches


def cloned_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a forward pass may write to."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Modules that keep running statistics of their input."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _depends_on_batches(model: nn.Module) -> bool:
    return any(m.training for m in model.modules()) or any(
        norm.running_mean is None for norm in batch_norms(model)
    )


def _regroup(batches: list[Batch], size: int) -> list[Batch]:
    """Batches of `size` examples, where the given ones have examples of one shape."""
    kinds = {(x.shape[1:], x.dtype, y.shape[1:], y.dtype) for x, y in batches}
    if len(kinds) > 1:
        return batches
    xs, ys = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    return list(zip(xs.split(size), ys.split(size), strict=True))


def _cut(batches: list[Batch], at_most: int | None) -> list[Batch]:
    """The same examples, so many at once."""
    if at_most is None:
        return batches
    return [
        part for x, y in batches for part in zip(x.split(at_most), y.split(at_most), strict=True)
    ]


def _recalibrate(model: nn.Module, tensors: dict[str, Tensor], batches: list[Batch]) -> None:
    """Set the running statistics in `tensors` to the averages over `batches`.

    Every batch counts by its number of examples, as in Izmailov et al., *Averaging Weights Leads to
    Wider Optima and Better Generalization*, UAI 2018, section 3.2.
    """
    norms = batch_norms(model)
    before = [(norm.training, norm.momentum) for norm in norms]
    seen = 0
    try:
        for x, _ in batches:
            seen += len(x)
            for norm in norms:
                norm.training, norm.momentum = True, len(x) / seen
            functional_call(model, tensors, x)
    finally:
        for norm, (training, momentum) in zip(norms, before, strict=True):
            norm.training, norm.momentum = training, momentum
