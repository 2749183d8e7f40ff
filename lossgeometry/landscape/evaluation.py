"""Metrics of a model, averaged over a data set, as a function of its weights."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing
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
from lossgeometry.running.devices import default_memory, full_precision
from lossgeometry.running.memory import is_out_of_memory, make_room
from lossgeometry.running.threads import MOST_THREADS, free_threads, give_way, parallel
from lossgeometry.seeds import (
    Stream,
    derive_seed,
    drawn_since_seeded,
    seed_everything,
    untouched_rng,
)

Sets: TypeAlias = "Data | Mapping[str, Data]"
Metric: TypeAlias = LossFunction | None  # None: the model itself computes it
Weights: TypeAlias = Mapping[str, Tensor]
Point: TypeAlias = Callable[[], Weights]  # called where they are needed

_turn = threading.RLock()  # for the threads that draw from PyTorch's generator


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
        self._idle = _queue([_Own(self._losses, self.device)])
        self._threads: int | None = None  # that may share the work, once known

    def settings(self) -> dict[str, str | int]:
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

    def __call__(self, weights: Weights) -> np.ndarray:
        """Metrics at `weights`, float64 in the order of `names`."""
        [(_, values)] = self.at([lambda: weights])
        return values

    def at(self, points: Sequence[Point]) -> Generator[tuple[int, np.ndarray], None, None]:
        """Yield ``(i, metrics)`` at ``points[i]()`` as soon as they are there.

        On a CPU each thread has points to itself, in no particular order. Where memory does not
        suffice, fewer examples pass at once, if that is the same. Whoever may leave before the end
        closes the iterator.
        """
        left = dict(enumerate(points))
        with (
            full_precision(),
            untouched_rng(self.device, torch_alone=self._quiet),
            computing_plainly(self._losses[0].compiled),
        ):
            while left:
                try:
                    with closing(parallel(self._point, [*left.items()], self._workers())) as found:
                        for _, (i, values) in found:
                            self._called = True
                            del left[i]
                            yield i, values
                    return
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
                self._idle = _queue([_Own(smaller, self.device)])

    def _workers(self) -> int:
        """Threads among which points are divided; one where memory was short.

        All copies of the weights that are moved have to fit in memory.
        """
        at_most = min(free_threads(), MOST_THREADS)
        if self.device.type != "cpu" or self._memory_was_short or at_most == 1:
            return 1
        if self._threads is None:
            taken = sum(weight.nbytes for weight in self.weights.values())
            fitting = default_memory(self.device) // max(taken, 1)
            self._threads = self._make_ready(min(at_most, fitting))
        return min(at_most, self._threads)

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

    def _point(self, piece: tuple[int, Point]) -> tuple[int, np.ndarray]:
        """Which point it is, and the metrics there."""
        i, point = piece
        own = self._idle.get()
        try:
            return i, self._values(own, point())
        finally:
            self._idle.put(own)

    def _values(self, own: _Own, weights: Weights) -> np.ndarray:
        with self._mode():
            buffers = dict(self.model.named_buffers())
            if self._calibration is not None:
                buffers = _recalibrated(own, weights, self._calibration, self._seed)
            means = []
            for loss in own.losses:
                values = torch.stack(
                    [self._of(own, loss, weights, buffers, c) for c in loss.chunks]
                )
                is_sum = torch.tensor(list(loss.sums.values()), device=self.device)
                counts = torch.tensor([[chunk.count] for chunk in loss.chunks], device=self.device)
                counts = torch.where(is_sum, 1, counts)
                total = torch.where(is_sum, 1, counts.sum(0))
                means.append((counts * values).sum(0) / total)
            return torch.cat(means).cpu().numpy()

    def _of(
        self,
        own: _Own,
        loss: FrozenLoss,
        weights: Weights,
        buffers: Mapping[str, Tensor],
        chunk: Chunk,
    ) -> Tensor:
        """Metrics of a chunk."""
        give_way()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            own.seed(chunk.seed, self._quiet)
            values = loss.losses(loss.outputs(chunk, weights, buffers), chunk.targets).detach()
            if not self._called and own.alone:
                self._draws |= drawn_since_seeded(self.device, chunk.seed)
            return values

    def _make_ready(self, threads: int) -> int:
        """A copy of model and metrics for each thread, which share the weights; how many there are.

        Random numbers come from one generator, which threads take in turns in the layers that do
        nothing else. There is but one thread where they would meet: where other layers draw, or a
        hook may keep what it sees. Nor does a copy serve that has other values elsewhere than here,
        as where a function in it still calls the model that it is a copy of.
        """
        if threads <= 1 or any(
            m._forward_hooks or m._forward_pre_hooks for m in self.model.modules()
        ):
            return 1
        chunk, buffers = self._losses[0].chunks[0], dict(self.model.named_buffers())
        elsewhere = {name: weight + 0.01 for name, weight in self.weights.items()}

        def value(own: _Own) -> Tensor:
            with self._mode():
                return self._of(own, own.losses[0], elsewhere, buffers, chunk)

        expected = value(_Own(self._losses, self.device))
        try:
            twins = [[loss.twin() for loss in self._losses] for _ in range(threads)]
        except (TypeError, RuntimeError):
            return 1  # it cannot be copied
        drawing = _that_draw(twins[0][0].model, lambda: value(_Own(twins[0], self.device)))
        copies = [_Copy(losses, self.device, drawing) for losses in twins]
        seed_everything(self.device, chunk.seed)
        same = all(torch.allclose(value(own), expected, equal_nan=True) for own in copies)
        if not same or drawn_since_seeded(self.device, chunk.seed):
            return 1
        self._idle = _queue(copies)
        return threads


class _Own:
    """What one thread evaluates with at a time."""

    alone = True  # whether no other thread draws from the global generators meanwhile

    def __init__(self, losses: list[FrozenLoss], device: torch.device) -> None:
        self.losses = losses
        self._device = device

    def seed(self, seed: int, torch_alone: bool = False) -> None:
        """Draw from this seed from now on."""
        seed_everything(self._device, seed, torch_alone=torch_alone)


class _Copy(_Own):
    """Copies for one of several threads, of which layers by these names draw random numbers.

    These layers draw in turns from the one generator, and each thread goes on where it has ended.
    """

    alone = False

    def __init__(
        self, losses: list[FrozenLoss], device: torch.device, drawing: Collection[str]
    ) -> None:
        super().__init__(losses, device)
        for loss in losses:
            for name in drawing:
                module = loss.model.get_submodule(name)
                module.forward = partial(self._in_turn, module.forward)

    def seed(self, seed: int, torch_alone: bool = False) -> None:
        self._stream = Stream(seed)

    def _in_turn(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _turn, self._stream:
            return forward(*args, **kwargs)


def _queue(owns: Iterable[_Own]) -> SimpleQueue[_Own]:
    queue: SimpleQueue[_Own] = SimpleQueue()
    for own in owns:
        queue.put(own)
    return queue


def _that_draw(model: nn.Module, run: Callable[[], object]) -> set[str]:
    """Names of the layers that draw random numbers on the CPU, and do little else, in `run`."""
    states, found = {}, set()

    def before(module: nn.Module, *_: object) -> None:
        states[module] = torch.get_rng_state()

    def after(module: nn.Module, *_: object) -> None:
        if not torch.equal(states[module], torch.get_rng_state()):
            found.add(names[module])

    names = {
        module: name
        for name, module in model.named_modules()
        if not [*module.children(), *module.parameters()]
    }
    handles = [
        handle
        for module in names
        for handle in (
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
        )
    ]
    run()
    for handle in handles:
        handle.remove()
    return found


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
    own: _Own, weights: Weights, batches: Sequence[Batch], seed: int
) -> dict[str, Tensor]:
    """Buffers whose running statistics are the averages over `batches`.

    Every batch counts by its number of examples, as in Izmailov et al., *Averaging Weights Leads to
    Wider Optima and Better Generalization*, UAI 2018, section 3.2.
    """
    loss = own.losses[0]
    buffers = {name: buffer.clone() for name, buffer in loss.model.named_buffers()}
    norms = batch_norms(loss.model)
    before = [(norm.training, norm.momentum) for norm in norms]
    seen = 0
    try:
        for i, batch in enumerate(batches):
            n = examples_in(batch)
            own.seed(derive_seed(seed, i))
            seen += n
            for norm in norms:
                norm.training, norm.momentum = True, n / seen
            loss.outputs(Chunk(batch, n, n, 1.0, 0, 0), weights, buffers, in_place=True)
    finally:
        for norm, (training, momentum) in zip(norms, before, strict=True):
            norm.training, norm.momentum = training, momentum
    return buffers
