"""What the trainings of a study cost: weights, operations and time."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from analysis.plan import Plan, Training, blank_dataset, dataset_form, stacks
from analysis.tables import print_table, working
from models.data.augment import Augmentation
from models.description import token_range
from models.stack import Stack
from models.train import untrained
from models.training import CACHED_BATCH


@dataclass(frozen=True)
class Cost:
    """Of one training."""

    images: int  # of an epoch
    parameters: int
    image_steps: int  # images that pass through the network
    flops: float  # floating-point operations: three forward passes an image-step


def cost_of(training: Training) -> Cost:
    """Count what a training takes; a dataset that is known is not needed."""
    recipe, model = training.start.recipe, copy.deepcopy(training.start.model).eval()
    model.requires_grad_(False)  # or the counter stumbles over a PiT's class token
    everything, size, channels, _ = dataset_form(training.start.dataset)
    images = training.options.images or everything
    steps = recipe.epochs * max(images // recipe.batch_size, 1)
    image_steps = steps * min(recipe.batch_size, images)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, channels, size, size, device="meta"))
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(images, parameters, image_steps, 3 * counter.get_total_flops() / 2 * image_steps)


def measure_rate(stack: Sequence[Training], device: str) -> float:
    """Image-steps a second of all networks, of two steps on random images after one to warm up."""
    options, recipe = stack[0].options, stack[0].start.recipe
    dataset = blank_dataset(options)
    networks = Stack([untrained(t.options, dataset).model for t in stack], device)
    batch = min(recipe.batch_size, CACHED_BATCH) if device == "cpu" else recipe.batch_size
    dataset = replace(
        dataset,
        images=torch.randint(256, (batch, *dataset.images.shape[1:]), dtype=torch.uint8),
        labels=torch.arange(batch) % len(dataset.classes),
    )
    augment, began = Augmentation(recipe, dataset, device), 0.0
    for step in range(3):
        everything = torch.arange(batch)
        made = augment.apply([augment.draw(everything) for _ in stack])
        inputs, targets = (t.unflatten(0, (len(stack), batch)) for t in made)
        kept = torch.stack([networks.draw(batch) for _ in stack]).to(device)
        with torch.autocast(device, torch.bfloat16, options.bf16):
            losses = networks.losses(recipe.loss, inputs, targets, kept)
        losses.sum().backward()
        losses.sum().item()  # waits for a GPU
        began = time.perf_counter() if step == 0 else began
    return 2 * batch * len(stack) / (time.perf_counter() - began)


def print_plan(
    plan: Plan, device: str, rate: float | None, *, together: bool, minutes: float | None
) -> None:
    """What is to be trained and measured, what the trainings cost, and how it can be cut.

    Without a `rate`, in image-steps a second, that of each kind of training is measured. With
    `minutes`, so is what a command of that length does.
    """
    rates: dict[str, float] = {}
    rows, pieces, count, work, left = [], [], 0, 0.0, 0.0
    for stack in stacks(plan.trainings) if together else [[t] for t in plan.trainings]:
        kind = repr([(t.start.architecture, t.start.recipe) for t in stack])
        with working(f"{stack[0].options.out}: a few steps"):
            if kind not in rates:
                rates[kind] = rate or measure_rate(stack, device)
        to_do, length = 0, 0.0  # epochs, and seconds of one of them
        for training in stack:
            state, start, cost = training.state(), training.start, cost_of(training)
            seconds = cost.image_steps / rates[kind]
            if state in ("to do", "begun"):
                epochs = start.recipe.epochs
                share = (epochs - training.epochs_done()) / epochs
                count, work, left = count + 1, work + share * cost.flops, left + share * seconds
                to_do, length = max(to_do, round(share * epochs)), length + seconds / epochs
            rows.append(
                [
                    str(training.options.out),
                    start.architecture.get("network", "csan"),
                    str(token_range(start.architecture) or "–"),
                    str(start.architecture.get("head_window", "–")),
                    str(start.seed),
                    f"{cost.images:,}",
                    str(start.recipe.epochs),
                    f"{cost.parameters:,}",
                    f"{cost.image_steps:,}",
                    f"{cost.flops:.1e}",
                    _duration(seconds),
                    state,
                ]
            )
        if to_do and minutes is not None:
            fit = max(int(60 * minutes / length), 1)
            names = str(stack[0].options.out) + f" and {len(stack) - 1} more" * (len(stack) > 1)
            commands = math.ceil(to_do / fit)
            pieces.append([names, str(to_do), _duration(length), str(fit), str(commands)])
    print_table(
        f"Plan of {plan.path}",
        [
            *("checkpoint", "network", "range", "head window", "seed", "images", "epochs"),
            *("parameters", "image-steps", "FLOPs", "time", "state"),
        ],
        rows,
    )
    how = "together" if together else "one after another"
    how = "as given" if rate else f"as measured in a few steps here, {how}"
    slowest, fastest = min(rates.values()), max(rates.values())
    print(
        f"{count} of {len(rows)} trainings left: {work:.1e} FLOPs, about "
        f"{_duration(left)} at "
        + (f"{slowest:.0f}" if slowest == fastest else f"{slowest:.0f} to {fastest:.0f}")
        + f" images/s ({how}); evaluations and measurements come on top"
    )
    if pieces:
        columns = ["trainings", "epochs left", "an epoch", f"epochs in {minutes:g} min", "commands"]
        print_table(f"Pieces of {minutes:g} minutes", columns, pieces)
    for measure in plan.measures:
        own = [t for t in plan.trainings if measure in t.measures]
        missing = sum(len(measure.missing(t)) for t in own)
        total = sum(len(measure.checkpoints(t)) for t in own)
        words = " ".join([f"python -m analysis.{measure.command}", *measure.arguments])
        print(f"{missing} of {total} checkpoints left to measure: {words}")


def _duration(seconds: float) -> str:
    """In the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
