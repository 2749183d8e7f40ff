"""What a training saves on its way, to go on from after an interruption."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossgeometry.errors import InputError
from models.checkpoint import Checkpoint, save
from models.description import require, require_history, require_integer
from models.reading.weights import read_pickle
from models.stack import persistent_buffers

State = dict[str, Any]
_ROWS = ("weights", "exp_avg", "exp_avg_sq")  # of every weight: itself, and AdamW's moments


def identity(checkpoint: Checkpoint) -> str:
    """What two checkpoints of one training have in common."""
    return repr(
        [
            checkpoint.architecture,
            checkpoint.dataset,
            checkpoint.images,
            checkpoint.recipe,
            checkpoint.seed,
        ]
    )


def same_training(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints belong to trainings that could go on one where the other stopped."""
    return identity(one) == identity(other)


def state_files(out: Path) -> tuple[Path, Path]:
    """Where the state of a training that will end as `out` is, and where the next one is at first.

    The next one takes the place of the former when those of all networks of a stack are written, so
    that at any moment there are states of all of them at one epoch.
    """
    return out.with_suffix("") / "resume.pt", out.with_suffix("") / "resume.new.pt"


def save_states(
    networks: Sequence[Checkpoint],
    outs: Sequence[Path],
    weights: Tensor,
    optimizer: torch.optim.Optimizer,
    data: list[str],
) -> None:
    """Save where the trainings of a stack are, whose `weights` are (n, P), on images `data`."""
    moments = optimizer.state[weights]
    rows = {"weights": weights.detach(), **{name: moments[name] for name in _ROWS[1:]}}
    for k, (network, out) in enumerate(zip(networks, outs, strict=True)):
        state = {
            "run": identity(network),
            "data": data,
            "epoch": network.epoch,
            "history": network.history,
            "step": moments["step"].cpu(),
            **{name: rows[name][k].to("cpu", copy=True) for name in _ROWS},
            "buffers": {
                name: buffer.to("cpu", copy=True)
                for name, buffer in persistent_buffers(network.model).items()
            },
        }
        save(state, state_files(out)[len(outs) > 1])
    if len(outs) > 1:
        for out in outs:
            current, new = state_files(out)
            os.rename(new, current)


def saved_states(
    outs: Sequence[Path], starts: Sequence[Checkpoint], data: list[str]
) -> list[State]:
    """The last states of trainings, all at one epoch; none if nothing has been saved of them.

    Raises `InputError` if they are not `equally_far`, or if a file is damaged, or is of another
    training than that which begins with the network in `starts`, or of one on other images.
    """
    found = [_states(out, start, data) for out, start in zip(outs, starts, strict=True)]
    epochs = set.intersection(*map(set, found))
    if not epochs:
        names = " ".join(map(str, outs))
        raise InputError(f"out: {names} were begun apart, expected trainings that are equally far")
    return [states[max(epochs)] for states in found if max(epochs) > 0]


def equally_far(
    outs: Sequence[Path], starts: Sequence[Checkpoint], data: list[str]
) -> list[list[int]]:
    """Which of several trainings can go on together: all of them, unless they were begun apart."""
    found = [_states(out, start, data) for out, start in zip(outs, starts, strict=True)]
    epochs = set.intersection(*map(set, found)) if found else set()
    reached = [max(epochs or states) for states in found]
    return [[i for i, r in enumerate(reached) if r == epoch] for epoch in sorted(set(reached))]


def epochs_done(out: Path, start: Checkpoint) -> int:
    """After how many epochs a training would go on; raises `InputError` as `saved_states` does."""
    return max(_states(out, start, None))


def restore(
    states: Sequence[State],
    starts: Sequence[Checkpoint],
    weights: Tensor,
    optimizer: torch.optim.Optimizer,
) -> list[Checkpoint]:
    """Put a stack, its weights (n, P) and its optimizer back to where trainings were."""
    rows = {name: torch.stack([state[name] for state in states]) for name in _ROWS}
    with torch.no_grad():
        weights.copy_(rows.pop("weights"))
        for start, state in zip(starts, states, strict=True):
            for name, buffer in persistent_buffers(start.model).items():
                buffer.copy_(state["buffers"][name])
    # Settings are those of the recipe, whatever the file says; the rate is set at every step.
    moments = {0: {"step": states[0]["step"], **rows}}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return [
        replace(start, epoch=state["epoch"], history=state["history"])
        for start, state in zip(starts, states, strict=True)
    ]


def _states(out: Path, start: Checkpoint, data: list[str] | None) -> dict[int, State]:
    """What has been saved of a training, by epoch; nothing is needed to begin."""
    files = [path for path in state_files(out) if path.exists()]
    states = [read_state(path, start, data) for path in files]
    beginning: dict[int, State] = {} if state_files(out)[0] in files else {0: {}}
    return beginning | {state["epoch"]: state for state in states}


def read_state(path: Path, start: Checkpoint, data: list[str] | None) -> State:
    """What `save_states` wrote, of any images if they are None.

    Raises `InputError` as `saved_states` does.
    """
    try:
        state: Any = read_pickle(path)
    except InputError as error:
        raise _damaged(path) from error
    if not isinstance(state, dict) or not isinstance(state.get("run"), str):
        raise _damaged(path)
    if state["run"] != identity(start):
        raise InputError(
            f"{path}: saved by a training with other options; give those again, or start anew "
            "with --force"
        )
    if data is not None and state.get("data") != data:
        raise InputError(
            f"{path}: saved by a training on other images, {start.dataset} has changed since; put "
            "those back, or start anew with --force"
        )
    try:
        require_integer("epoch", state["epoch"], 1, start.recipe.epochs)
        require_history(state["history"])
        count = sum(p.numel() for p in start.model.parameters())
        for name in _ROWS:
            fits = state[name].shape == (count,) and state[name].dtype == torch.float32
            require(fits, name, state[name].shape, "a number for every weight")
        require(state["step"].numel() == 1, "step", state["step"].shape, "one number")
        for name, buffer in persistent_buffers(start.model).items():
            found = state["buffers"][name]
            fits = found.shape == buffer.shape and found.dtype == buffer.dtype
            require(fits, name, found.shape, f"a {buffer.dtype} of {tuple(buffer.shape)}")
    except Exception as error:  # a damaged file fails in any way it likes
        raise _damaged(path) from error
    return state


def _damaged(path: Path) -> InputError:
    return InputError(f"{path}: damaged; delete it, or start again with --force")
