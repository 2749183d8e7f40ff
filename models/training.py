"""The training loop: resumable to the bit."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from models.augment import Augmentation
from models.checkpoint import Checkpoint, load_checkpoint, save
from models.csan import part_of_batch
from models.datasets import ImageDataset
from models.description import require, require_history, require_integer
from models.devices import full_precision
from models.distributed import ALONE, Team
from models.errors import InputError
from models.memory import Halving
from models.seeds import derive_seed, seeded
from models.weights import read_pickle

EVALUATION_BATCH = 256
CACHED_BATCH = 32  # images whose activations stay in the cache of a CPU, a tenth faster than 96
evaluating = Halving(EVALUATION_BATCH, "evaluation")  # for all evaluations of this process


def train(
    start: Checkpoint,
    out: Path,
    train_set: ImageDataset,
    test_set: ImageDataset,
    *,
    snapshots: Collection[int] = (),
    evaluate_every: int = 1,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    compile: bool = False,
    team: Team = ALONE,
) -> Checkpoint:
    """Train the model of `start` by its recipe and save it as `out`.

    Beside `out`, in a folder of the same name, snapshots are kept of the initialisation, of the end
    of warm-up, and of the epochs in `snapshots`; until the training ends, that folder also holds
    the state to go on from after an interruption. Every epoch draws from its own random stream, so
    that an interrupted training ends with the same weights as an uninterrupted one.

    Parameters
    ----------
    start : Checkpoint
        Untrained model (epoch 0), its recipe and seed.
    out : Path
        File of the trained checkpoint.
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
    team : Team
        Processes that all make this call, each of which takes its share of every batch. The result
        is that of one process, to rounding, whatever their number, which may change at an
        interruption. The first one saves.

    Raises
    ------
    InputError
        If the folder of `out` holds the state of a different training, or of one on other images.
    """
    recipe, model = start.recipe, start.model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    snapshots = {0, recipe.warmup_epochs, *snapshots}
    evaluated = {*range(0, recipe.epochs, evaluate_every), *snapshots, recipe.epochs}
    folder, state = out.with_suffix(""), out.with_suffix("") / "resume.pt"
    data = [train_set.fingerprint, test_set.fingerprint]
    saved = team.first(lambda: _saved_state(state, start, data))

    def snapshot(epoch: int) -> Path:
        return folder / f"epoch{epoch:03d}.pt"

    if saved is not None:
        current = _restored(saved, state, start, optimizer)
        if current.epoch in snapshots:  # what is saved after the state
            team.first(lambda: _keep_unless_there(current, snapshot(current.epoch)))
    else:
        scores = evaluate(model, train_set, test_set, team)
        history = {"epoch": [0.0], "objective": [float("nan")], "learning_rate": [0.0]}
        history |= {"seconds": [0.0], **{name: [score] for name, score in scores.items()}}
        current = replace(start, history=history)
        if team.rank == 0:
            current.save(snapshot(0))

    augment = Augmentation(recipe, train_set, device)
    run = torch.compile(model) if compile else model
    precision = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)
    size = min(recipe.batch_size, len(train_set))  # of all batches
    share = team.shard(size)
    fast = CACHED_BATCH if torch.device(device).type == "cpu" else size
    at_once = Halving(min(share.stop - share.start, fast), "training")

    def gradient(inputs: Tensor, targets: Tensor, drawn: list[Tensor], most: int) -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for part in parts(share, most):
            _go_back_to(drawn, device)  # every part draws the random numbers of the whole batch
            with part_of_batch(model, size, part), precision:
                outputs = run(inputs[part])
                weight = len(outputs) / size
                loss = weight * recipe.loss(outputs, targets[part]) if weight else outputs.sum()
            loss.backward()
            total += loss.detach()
        return total

    bar = tqdm(total=recipe.epochs, initial=current.epoch, desc=out.stem, unit="epoch")
    for epoch in range(current.epoch, recipe.epochs):
        began, losses = time.perf_counter(), []
        with seeded(torch.device(device), derive_seed(start.seed, epoch)):
            model.train()
            batches = torch.randperm(len(train_set)).split(recipe.batch_size)
            batches = batches[: max(len(train_set) // recipe.batch_size, 1)]  # full ones
            for step, indices in enumerate(batches, start=1):
                rate = recipe.learning_rate_at(epoch + step / len(batches))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                # Everyone draws the whole batch, so that what is random is the same in any team.
                inputs, targets = augment(indices)
                work = partial(gradient, inputs, targets, _random_states(device))
                loss = _summed(model, at_once(work), team)
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
                optimizer.step()
                losses.append(loss)
        current = replace(current, epoch=epoch + 1)
        if epoch + 1 in evaluated:
            penalty = sum(p.square().sum().item() for p in model.parameters())
            row = {
                "epoch": epoch + 1.0,
                # The mean NLL during the epoch, and the penalty at its end.
                "objective": torch.stack(losses).mean().item() + recipe.weight_decay / 2 * penalty,
                "learning_rate": rate,
                "seconds": time.perf_counter() - began,
                **evaluate(model, train_set, test_set, team),
            }
            history = {name: [*current.history[name], value] for name, value in row.items()}
            current = replace(current, history=history)
            bar.set_postfix(nll=f"{row['train_nll']:.3f}", error=f"{row['test_error']:.1%}")
        if team.rank == 0:
            _save_state(state, current, optimizer, data)
        if epoch + 1 in snapshots and team.rank == 0:
            current.save(snapshot(epoch + 1))
        bar.update()
    bar.close()

    def finish() -> Checkpoint:
        current.save(out)
        state.unlink()
        return load_checkpoint(out)

    return team.first(finish)


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
    for batch in shares(len(inputs), team, at_once):
        outputs[batch] = model(inputs[batch].to(outputs.device))


def shares(n: int, team: Team, at_once: int) -> Iterator[slice]:
    """Which of `n` images this process of a team evaluates, at most so many at once."""
    own = team.shard(-(-n // EVALUATION_BATCH))
    start, stop = own.start * EVALUATION_BATCH, min(own.stop * EVALUATION_BATCH, n)
    if start < stop:
        yield from parts(slice(start, stop), at_once)


def parts(whole: slice, most: int) -> Iterator[slice]:
    """Cut a range into parts of at most so many; of an empty one there is one."""
    for start in range(whole.start, max(whole.stop, whole.start + 1), max(most, 1)):
        yield slice(start, min(start + most, whole.stop))


def _random_states(device: torch.device | str) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if "cuda" in str(device) else states


def _go_back_to(states: list[Tensor], device: torch.device | str) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def _summed(model: nn.Module, loss: Tensor, team: Team) -> Tensor:
    """Replace gradients by their sums over a team, and return that of the loss: one message."""
    if team.size == 1:
        return loss
    parameters = list(model.parameters())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([loss.reshape(1), *(gradient.flatten() for gradient in gradients)])
    total, *sums = team.sum_(flat).split([1, *(p.numel() for p in parameters)])
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return total.squeeze()


def _save_state(
    path: Path, current: Checkpoint, optimizer: torch.optim.Optimizer, data: list[str]
) -> None:
    state: dict[str, object] = {
        "run": _identity(current),
        "data": data,
        "epoch": current.epoch,
        "history": current.history,
        "model": current.model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    save(state, path)


def _saved_state(path: Path, start: Checkpoint, data: list[str]) -> dict[str, Any] | None:
    """What `_save_state` has saved of the training that begins with `start`, if it has."""
    if not path.exists():
        return None
    try:
        state = read_pickle(path)
    except InputError as error:
        raise _damaged(path) from error
    if not isinstance(state, dict) or not isinstance(state.get("run"), str):
        raise _damaged(path)
    if state["run"] != _identity(start):
        raise InputError(
            f"{path}: saved by a training with other options; give those again, or start anew "
            "with --force"
        )
    if state.get("data", data) != data:  # older states do not have it
        raise InputError(
            f"{path}: saved by a training on other images, {start.dataset} has changed since; put "
            "those back, or start anew with --force"
        )
    return state


def _restored(
    saved: dict[str, Any], path: Path, start: Checkpoint, optimizer: torch.optim.Optimizer
) -> Checkpoint:
    try:
        require_integer("epoch", saved["epoch"], 1, start.recipe.epochs)
        require_history(saved["history"])
        # Settings are those of the recipe, whatever the file says; the rate is set at every step.
        own, parameters = optimizer.state_dict(), list(start.model.parameters())
        moments = saved["optimizer"]["state"]
        for i, moment in moments.items():
            for name in ("exp_avg", "exp_avg_sq"):
                require(moment[name].shape == parameters[i].shape, name, i, "a parameter's shape")
            require(moment["step"].numel() == 1 and len(moment) == 3, "step", i, "one number")
        require(len(moments) == len(parameters), "optimizer", len(moments), "all parameters")
        start.model.load_state_dict(saved["model"])
        optimizer.load_state_dict(own | {"state": moments})
        return replace(start, epoch=saved["epoch"], history=saved["history"])
    except Exception as error:  # a damaged file fails in any way it likes
        raise _damaged(path) from error


def _damaged(path: Path) -> InputError:
    return InputError(f"{path}: damaged; delete it, or start again with --force")


def _keep_unless_there(current: Checkpoint, path: Path) -> None:
    """Save a snapshot, unless it is there: what was measured of it names its hash."""
    if path.exists():
        found = load_checkpoint(path)
        if same_training(found, current) and found.epoch == current.epoch:
            return
    current.save(path)


def same_training(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints belong to trainings that could go on one where the other stopped."""
    return _identity(one) == _identity(other)


def _identity(checkpoint: Checkpoint) -> str:
    return repr(
        [
            checkpoint.architecture,
            checkpoint.dataset,
            checkpoint.images,
            checkpoint.recipe,
            checkpoint.seed,
        ]
    )
