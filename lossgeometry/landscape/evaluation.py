"""Metrics of a model, averaged over a data set, as a function of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from lossgeometry.batches import Batch, Chunk, Count, Data, Forward, as_batches, examples_in
from lossgeometry.errors import InputError
from lossgeometry.objective import FrozenLoss, LossFunction
from lossgeometry.plainly import computing_plainly
from lossgeometry.running.devices import full_precision
from lossgeometry.running.memory import is_out_of_memory, make_room
from lossgeometry.running.threads import MOST_THREADS, free_threads, parallel
from lossgeometry.seeds import drawn_since_seeded, seed_everything, untouched_rng

Sets: TypeAlias = "Data | Mapping[str, Data]"
Metric: TypeAlias = LossFunction | None  # None: the model itself computes it


class Evaluator:
    """Each metric over all examples, at any weights; the model itself never changes.

    Parameters
    ----------
    model : nn.Module
        Evaluated in the mode it is in. In training mode the batches of `data` are those that are
        fed, and what is random (stochastic depth, dropout) is drawn once per batch: it is the same
        at all weights. In evaluation mode the examples are regrouped for speed, as far as that
        does not change the result; see `FrozenLoss`.
    metrics : mapping of str to callable
        ``fn(outputs, targets) -> scalar tensor``.
    data : batch, iterable of batches, or mapping of str to one of them
        Batches as for `Hessian`. A mapping without a tensor in it is of several sets of examples,
        each with all metrics, which are called "SET/METRIC"; what is random is the same for all
        sets.
    seed : int
        Of whatever the model or a metric draws.
    recalibrate : batch, or iterable of batches, optional
        Data on which the running statistics of every BatchNorm are computed anew at each point.
        By default they stay those of `model`.
    bf16 : bool
        Compute in bfloat16 what `torch.autocast` deems safe.
    forward, count
        As of `Hessian`.

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
        forward: Forward | None = None,
        count: Count | None = None,
    ) -> None:
        if not metrics:
            raise InputError("metrics: none given, expected at least one")
        named: Mapping[str, Data] = data if _are_sets(data) else {"": data}
        how: dict[str, Any] = dict(forward=forward, count=count, seed=seed, regroup=True)
        self._losses = [FrozenLoss(model, metrics, each, **how) for each in named.values()]
        self.model = self._losses[0].model
        self.weights = {name: p.detach() for name, p in self._losses[0].parameters.items()}
        self.device, self._dtype = self._losses[0].device, self._losses[0].dtype
        self.names = [f"{name}/{metric}".lstrip("/") for name in named for metric in metrics]
        self._calibration = None if recalibrate is None else as_batches(recalibrate)
        self._seed = seed
        self._bf16 = bf16
        self._memory_was_short = False
        self._differentiates = False  # whether the model does, in its forward pass
        self._called = False  # without an exception
        self._draws = False  # whether the first call has drawn random numbers
        self._idle: SimpleQueue[list[FrozenLoss]] = SimpleQueue()
        self._idle.put(self._losses)
        self._threads: int | None = None  # that may share the work, once known

    def attributes(self) -> dict[str, str | int]:
        """How the numbers come about, by names that make sense beside them in a file."""
        chunks = [chunk for loss in self._losses for chunk in loss.chunks]
        kept = "kept" if batch_norms(self.model) else "none"
        sums = [name for name, is_sum in self._losses[0].sums.items() if is_sum]
        return {
            "mode": "train" if any(m.training for m in self.model.modules()) else "eval",
            "batchnorm": kept if self._calibration is None else "recalibrated",
            "examples": sum(chunk.size for chunk in chunks),
            "precision": "bfloat16" if self._bf16 else str(self._dtype).removeprefix("torch."),
            "forward_passes": len(chunks),
            "seed": self._seed,
            "fingerprint": fingerprint(
                [*self.weights.values(), *(t for chunk in chunks for t in chunk.tensors)]
            ),
            **({"sums": ", ".join(sums)} if sums else {}),  # the others are means
        }

    def __call__(self, weights: Mapping[str, Tensor]) -> np.ndarray:
        """Metrics at `weights`, float64 in the order of `names`.

        Where memory does not suffice, fewer examples pass at once, if that is the same.
        """
        while True:
            try:
                values = self._values(weights)
                self._called = True
                return values
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    smaller = [loss.halved() or loss for loss in self._losses]
                    if all(a is b for a, b in zip(smaller, self._losses, strict=True)):
                        raise
                elif self._differentiates or isinstance(error, InputError):
                    raise
                else:
                    self._differentiates = True
                    continue
            make_room("landscape", max(c.size for loss in self._losses for c in loss.chunks))
            self._losses, self._memory_was_short = smaller, True
            self._idle = SimpleQueue()
            self._idle.put(smaller)

    def _mode(self) -> Any:
        """Without graphs, but those of a model that differentiates in its forward pass.

        What a model keeps of its first call is no tensor of inference mode, of which no training
        could go on, and a loss shows what it depends on besides the outputs.
        """
        if self._differentiates:
            return torch.enable_grad()
        return torch.inference_mode() if self._called else torch.no_grad()

    @property
    def _quiet(self) -> bool:
        """Whether nothing was drawn: seeds of Python and NumPy take as long as a small network."""
        return self._called and not self._draws

    @full_precision()
    def _values(self, weights: Mapping[str, Tensor]) -> np.ndarray:
        with (
            untouched_rng(self.device, torch_alone=self._quiet),
            self._mode(),
            computing_plainly(self._losses[0].compiled),
        ):
            buffers = dict(self.model.named_buffers())
            if self._calibration is not None:
                buffers = _recalibrated(self._losses[0], weights, self._calibration)
            means = [self._means(i, weights, buffers) for i in range(len(self._losses))]
            return torch.cat(means).cpu().numpy()

    def _means(
        self, which: int, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> Tensor:
        loss = self._losses[which]
        work = partial(self._values_of, which, weights, buffers)
        workers = self._workers(which, buffers, loss.chunks)
        found = dict(parallel(work, loss.chunks, workers))
        # In one order, which the last bits depend on.
        values = torch.stack([found[i] for i in range(len(loss.chunks))])
        is_sum = torch.tensor(list(loss.sums.values()), device=self.device)
        counts = torch.tensor([[chunk.count] for chunk in loss.chunks], device=self.device)
        counts = torch.where(is_sum, 1, counts)
        total = torch.where(is_sum, 1, counts.sum(0))
        return (counts * values).sum(0) / total

    def _values_of(
        self,
        which: int,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        chunk: Chunk,
    ) -> Tensor:
        """Metrics of a chunk."""
        own = self._idle.get()
        try:
            return self._values_by(own[which], weights, buffers, chunk)
        finally:
            self._idle.put(own)

    def _values_by(
        self,
        loss: FrozenLoss,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        chunk: Chunk,
    ) -> Tensor:
        with self._mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            seed_everything(self.device, chunk.seed, torch_alone=self._quiet)
            values = loss.losses(loss.outputs(chunk, weights, buffers), chunk.targets).detach()
            if not self._called:
                self._draws |= drawn_since_seeded(self.device, chunk.seed)
            return values

    def _workers(self, which: int, buffers: Mapping[str, Tensor], chunks: Sequence[Chunk]) -> int:
        """Threads among which so many chunks are divided; one where memory was short."""
        trains = any(m.training for m in self.model.modules())
        at_most = min(free_threads(), len(chunks), MOST_THREADS)
        if self.device.type != "cpu" or trains or self._memory_was_short or at_most == 1:
            return 1
        if self._threads is None:
            self._threads = self._make_ready(which, buffers, chunks[0])
        return min(at_most, self._threads)

    def _make_ready(self, which: int, buffers: Mapping[str, Tensor], chunk: Chunk) -> int:
        """A copy of model and metrics for each thread, which share the weights; how many there are.

        There is but one where threads would meet: random numbers come from one generator, and a
        hook may keep what it sees. Nor does a copy serve that has other values elsewhere than here,
        as where a function in it still calls the model that it is a copy of.
        """
        elsewhere = {name: weight + 0.01 for name, weight in self.weights.items()}
        value = partial(self._values_by, weights=elsewhere, buffers=buffers, chunk=chunk)
        expected = value(self._losses[which])
        hooks = any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())
        if hooks or drawn_since_seeded(self.device, chunk.seed):
            return 1
        threads = min(free_threads(), MOST_THREADS)
        try:
            twins = [[loss.twin() for loss in self._losses] for _ in range(threads - 1)]
        except (TypeError, RuntimeError):
            return 1  # it cannot be copied
        if not all(torch.allclose(value(t[which]), expected, equal_nan=True) for t in twins):
            return 1
        for twin in twins:
            self._idle.put(twin)
        return threads


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


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Modules that keep running statistics of their input."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _are_sets(data: Sets) -> TypeGuard[Mapping[str, Data]]:
    """Whether data are several sets by name: a mapping with a tensor in it is a batch."""
    return isinstance(data, Mapping) and not any(
        isinstance(value, (Tensor, np.ndarray)) for value in data.values()
    )


def _recalibrated(
    loss: FrozenLoss, weights: Mapping[str, Tensor], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Buffers whose running statistics are the averages over `batches`.

    Every batch counts by its number of examples, as in Izmailov et al., *Averaging Weights Leads to
    Wider Optima and Better Generalization*, UAI 2018, section 3.2.
    """
    buffers = {name: buffer.clone() for name, buffer in loss.model.named_buffers()}
    norms = batch_norms(loss.model)
    before = [(norm.training, norm.momentum) for norm in norms]
    seen = 0
    try:
        for batch in batches:
            n = examples_in(batch)
            seen += n
            for norm in norms:
                norm.training, norm.momentum = True, n / seen
            loss.outputs(Chunk(batch, n, n, 1.0, 0, 0), weights, buffers, in_place=True)
    finally:
        for norm, (training, momentum) in zip(norms, before, strict=True):
            norm.training, norm.momentum = training, momentum
    return buffers
