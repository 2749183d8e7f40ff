"""The training loop: resumable to the bit."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lossgeometry.errors import InputError
from lossgeometry.landscape.evaluation import batch_norms
from lossgeometry.running.devices import full_precision
from lossgeometry.running.distributed import ALONE, Team
from lossgeometry.running.memory import Halving
from lossgeometry.seeds import Stream, derive_seed
from models.checkpoint import Checkpoint, load_checkpoint
from models.data.augment import Augmentation
from models.data.datasets import ImageDataset
from models.resuming import restore, same_training, save_states, saved_states, state_files
from models.stack import Stack

EVALUATION_BATCH = 256
CACHED_BATCH = 32  # images whose activations stay in the cache of a CPU, a tenth faster than 96
CACHED_EVALUATION = 64  # the same without a backward pass, 1.3 times as fast as 256
AHEAD = 8  # mini-batches that are augmented at once on a GPU, in as many kernels as one
SAVE_EVERY = 30.0  # seconds, of a training that is seldom evaluated
evaluating = Halving(EVALUATION_BATCH, "evaluation")  # for all evaluations of this process


def train(
    start: Checkpoint, out: Path, train_set: ImageDataset, test_set: ImageDataset, **options: Any
) -> Checkpoint:
    """Train the model of `start` by its recipe and save it as `out`: see `train_together`."""
    return train_together([start], [out], train_set, test_set, **options)[0]


def train_together(
    starts: Sequence[Checkpoint],
    outs: Sequence[Path],
    train_set: ImageDataset,
    test_set: ImageDataset,
    *,
    snapshots: Collection[int] = (),
    evaluate_every: int = 1,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    compile: bool = False,
    deadline: float = math.inf,
    team: Team = ALONE,
) -> list[Checkpoint]:
    """Train models of one shape by their recipe, as one program, and save each in a file.

    Every network sees the mini-batches that its own seed draws, and ends with the weights that it
    would have alone, to rounding. The seconds in its history are those of all of them. A network
    with BatchNorm normalises over its whole mini-batch; of others, parts of a mini-batch pass
    through the model one after another where that is faster, or memory does not suffice for all.

    Beside each file, in a folder of the same name, snapshots are kept of the initialisation, of the
    end of warm-up, and of the epochs in `snapshots`; until the training ends, that folder also
    holds the state to go on from after an interruption. Every epoch draws from its own random
    stream, so that an interrupted training ends with the same weights as an uninterrupted one.

    Parameters
    ----------
    starts : sequence of Checkpoint
        Untrained models (epoch 0) that a `Stack` can hold, with seeds of their own and one recipe.
    outs : sequence of Path
        Files of the trained checkpoints.
    train_set, test_set : ImageDataset
    snapshots : collection of int
        Further epochs to keep.
    evaluate_every : int
        Epochs between two rows of the history. The first and the last epoch, the end of warm-up and
        the snapshots have one in any case.
    device : torch.device or str
    bf16 : bool
        Train under bfloat16 autocast; weights and evaluation stay float32.
    compile : bool
        Train with ``torch.compile``.
    deadline : float
        When to stop, as `time.monotonic` counts: after an epoch, if another of the same length
        would end later. The same call goes on from there.
    team : Team
        Processes that all make this call, each of which takes its share of every batch. The result
        is that of one process, to rounding, whatever their number, which may change at an
        interruption. The first one saves.

    Returns
    -------
    list of Checkpoint
        The trained networks, or, at the deadline, how far they are.

    Raises
    ------
    InputError
        If a folder holds the state of a different training, or of one on other images, if a team
        is to share the mini-batches of a BatchNorm, or if after an epoch a loss or weights are not
        finite. Nothing of that epoch is saved.
    """
    recipe, device = starts[0].recipe, torch.device(device)
    snapshots = {0, recipe.warmup_epochs, *snapshots}
    evaluated = {*range(0, recipe.epochs, evaluate_every), *snapshots, recipe.epochs}
    whole = bool(batch_norms(starts[0].model))
    if whole and team.size > 1:
        raise InputError(
            f"torchrun: {team.size} processes found for a network with BatchNorm, which normalises "
            "over whole mini-batches, expected one"
        )
    data = [train_set.fingerprint, test_set.fingerprint]
    states = team.first(lambda: saved_states(outs, starts, data))
    stack = Stack([start.model for start in starts], device)
    optimizer = torch.optim.AdamW(
        [stack.weights],
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        fused=True,
    )

    def snapshot(out: Path, epoch: int) -> Path:
        return out.with_suffix("") / f"epoch{epoch:03d}.pt"

    if states:
        networks = restore(states, starts, stack.weights, optimizer)
        if networks[0].epoch in snapshots:  # what is saved after the states
            for network, out in zip(networks, outs, strict=True):
                team.first(partial(_keep_unless_there, network, snapshot(out, network.epoch)))
    else:
        networks = []
        for start, out in zip(starts, outs, strict=True):
            scores = evaluate(start.model, train_set, test_set, team)
            history = {"epoch": [0.0], "objective": [float("nan")], "learning_rate": [0.0]}
            history |= {"seconds": [0.0], **{name: [score] for name, score in scores.items()}}
            networks.append(replace(start, history=history))
            if team.rank == 0:
                networks[-1].save(snapshot(out, 0))

    augment = Augmentation(recipe, train_set, device)
    loss_fn, run = recipe.loss, stack.losses
    if compile:
        torch.compiler.reset()  # or the programs of former stacks would count against its limit
        run = torch.compile(run)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    size = min(recipe.batch_size, len(train_set))  # of all batches
    share = team.shard(size)
    fast = CACHED_BATCH if device.type == "cpu" else size
    at_once: Callable[[Callable[[int], Tensor]], Tensor] = (
        (lambda work: work(size))
        if whole
        else Halving(min(share.stop - share.start, fast), "training")
    )
    weights = stack.weights
    gradient = weights.grad = torch.zeros_like(weights)

    def losses_and_gradient(batch: Sequence[Tensor], most: int) -> Tensor:
        """Mean losses (n,) of a mini-batch; their gradients are left in `gradient`."""
        gradient.zero_()
        total = torch.zeros(len(starts), device=device)
        for part in parts(share, most):
            inputs, targets, kept = (t[:, part] for t in batch)
            with precision:
                losses = (part.stop - part.start) / size * run(loss_fn, inputs, targets, kept)
            losses.sum().backward()
            total += losses.detach()
        return total

    names = outs[0].stem + f" and {len(outs) - 1} more" * (len(outs) > 1)
    bar = tqdm(total=recipe.epochs, initial=networks[0].epoch, desc=names, unit="epoch")
    saved_at = time.monotonic()
    cold = compile
    for epoch in range(networks[0].epoch, recipe.epochs):
        began, losses = time.monotonic(), []
        for start in starts:
            start.model.train()
        steps = max(len(train_set) // size, 1)
        for step, batch in enumerate(
            _batches(starts, epoch, len(train_set), augment, stack), start=1
        ):
            rate = recipe.learning_rate_at(epoch + step / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            if cold:  # the first call also tries variants of its kernels: it is not to train
                before = [buffer.clone() for buffer in stack.buffers.values()]
                at_once(partial(losses_and_gradient, [t.clone() for t in batch]))
                for buffer, own in zip(stack.buffers.values(), before, strict=True):
                    buffer.copy_(own)
                cold = False
            # Everyone draws the whole batch, so that what is random is the same in any team.
            losses.append(_summed(at_once(partial(losses_and_gradient, batch)), gradient, team))
            _clip(gradient, recipe.clip_norm)
            optimizer.step()
        networks = [replace(network, epoch=epoch + 1) for network in networks]
        means = torch.stack(losses).mean(0)
        team.first(partial(_require_finite, means, weights, networks, outs))
        if epoch + 1 in evaluated:
            # The mean NLL during the epoch, and the penalty at its end.
            nlls = means.tolist()
            seconds = time.monotonic() - began
            for k, network in enumerate(networks):
                penalty = weights[k].detach().double().square().sum().item()
                row = {
                    "epoch": epoch + 1.0,
                    "objective": nlls[k] + recipe.weight_decay / 2 * penalty,
                    "learning_rate": rate,
                    "seconds": seconds,
                    **evaluate(network.model, train_set, test_set, team),
                }
                history = {name: [*network.history[name], value] for name, value in row.items()}
                networks[k] = replace(network, history=history)
            bar.set_postfix(nll=f"{row['train_nll']:.3f}", error=f"{row['test_error']:.1%}")
        now = time.monotonic()
        late = deadline < math.inf and epoch + 1 < recipe.epochs
        late = late and team.first(partial(operator.gt, now + (now - began), deadline))
        if team.rank == 0 and (late or epoch + 1 in evaluated or now > saved_at + SAVE_EVERY):
            save_states(networks, outs, weights, optimizer, data)
            saved_at = now
        if epoch + 1 in snapshots and team.rank == 0:
            for network, out in zip(networks, outs, strict=True):
                network.save(snapshot(out, epoch + 1))
        bar.update()
        if late:
            break
    bar.close()

    def finish(network: Checkpoint, out: Path) -> Checkpoint:
        network.save(out)
        for path in state_files(out):
            path.unlink(missing_ok=True)
        return load_checkpoint(out)

    if networks[0].epoch < recipe.epochs:
        return networks
    return [team.first(partial(finish, *pair)) for pair in zip(networks, outs, strict=True)]


def _batches(
    starts: Sequence[Checkpoint], epoch: int, images: int, augment: Augmentation, stack: Stack
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The mini-batches of an epoch of so many images, each network's drawn by its own seed.

    Yields inputs (n, B, channels, height, width), targets (n, B, classes) and what `Stack.draw`
    chose (n, B, branches), on the device of the stack, for which nothing here waits.
    """
    most, device = starts[0].recipe.batch_size, stack.weights.device
    ahead = AHEAD if device.type == "cuda" else 1
    streams = [Stream(derive_seed(start.seed, epoch)) for start in starts]
    orders = []
    for stream in streams:
        with stream:
            order = torch.randperm(images).split(most)
        orders.append(order[: max(images // most, 1)])  # full ones
    for first in range(0, len(orders[0]), ahead):
        drawn = []  # by network, then by mini-batch
        for stream, order in zip(streams, orders, strict=True):
            with stream:
                some = order[first : first + ahead]
                drawn.append([(augment.draw(i), stack.draw(len(i))) for i in some])
        in_turn = [pair for pairs in zip(*drawn, strict=True) for pair in pairs]
        choices, branches = zip(*in_turn, strict=True)
        kept = torch.cat(branches)
        if device.type == "cuda":
            kept = kept.pin_memory()
        made = (*augment.apply(choices), kept.to(device, non_blocking=True))
        by_step = [t.unflatten(0, (-1, len(starts), len(order[0]))) for t in made]
        yield from zip(*by_step, strict=True)


def _summed(losses: Tensor, gradient: Tensor, team: Team) -> Tensor:
    """Replace gradients (n, P) by their sum over a team, and return that of the losses (n,)."""
    if team.size == 1:
        return losses
    total = team.sum_(torch.cat([losses, gradient.flatten()]))  # one message
    gradient.copy_(total[len(losses) :].view_as(gradient))
    return total[: len(losses)]


def _require_finite(
    losses: Tensor, weights: Tensor, networks: Sequence[Checkpoint], outs: Sequence[Path]
) -> None:
    """Raise `InputError` if a loss (n,) or a row of weights (n, P) is not finite."""
    finite = (losses.isfinite() & weights.isfinite().all(1)).tolist()
    lost = " ".join(str(out) for out, fine in zip(outs, finite, strict=True) if not fine)
    if lost:
        raise InputError(
            f"out: {lost} diverged, loss or weights found that are not finite after epoch "
            f"{networks[0].epoch}, expected numbers; what was saved before is still there"
        )


def _clip(gradient: Tensor, norm: float) -> None:
    """Scale each row of a gradient down to so large a norm, if it is larger."""
    norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    gradient.mul_((norm / (norms + 1e-6)).clamp(max=1))


@torch.inference_mode()
@full_precision()
def evaluate(
    model: nn.Module, train_set: ImageDataset, test_set: ImageDataset, team: Team = ALONE
) -> dict[str, float]:
    """NLL and error of `model`, in evaluation mode, on the clean images of both splits.

    A `team` that makes this call together shares the images; everyone gets the same result.
    """
    model.eval()
    device = next(model.parameters()).device
    scores = {}
    for split, dataset in (("train", train_set), ("test", test_set)):
        outputs = torch.zeros(len(dataset), len(dataset.classes), device=device)
        evaluating(partial(_fill, outputs, model, dataset.inputs, team))
        team.sum_(outputs)
        labels = dataset.labels.to(device)
        scores[f"{split}_nll"] = F.cross_entropy(outputs.double(), labels).item()
        scores[f"{split}_error"] = (outputs.argmax(1) != labels).double().mean().item()
    return scores


def _fill(outputs: Tensor, model: nn.Module, inputs: Tensor, team: Team, at_once: int) -> None:
    for batch in shares(len(inputs), team, at_once, outputs.device):
        outputs[batch] = model(inputs[batch].to(outputs.device))


def shares(n: int, team: Team, at_once: int, device: torch.device) -> Iterator[slice]:
    """Which of `n` images this process of a team evaluates, at most so many at once."""
    if device.type == "cpu":
        at_once = min(at_once, CACHED_EVALUATION)
    own = team.shard(-(-n // EVALUATION_BATCH))
    start, stop = own.start * EVALUATION_BATCH, min(own.stop * EVALUATION_BATCH, n)
    if start < stop:
        yield from parts(slice(start, stop), at_once)


def parts(whole: slice, most: int) -> Iterator[slice]:
    """Cut a range into parts of at most so many."""
    for start in range(whole.start, whole.stop, max(most, 1)):
        yield slice(start, min(start + most, whole.stop))


def _keep_unless_there(current: Checkpoint, path: Path) -> None:
    """Save a snapshot, unless it is there: what was measured of it names its hash."""
    if path.exists():
        found = load_checkpoint(path)
        if same_training(found, current) and found.epoch == current.epoch:
            return
    current.save(path)
