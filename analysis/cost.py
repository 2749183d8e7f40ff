"""What the trainings of a study cost: weights, operations and time."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from analysis.plan import Plan, Training, blank_dataset, dataset_form
from analysis.tables import print_table, working
from models.augment import Augmentation
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
    recipe, model = training.start.recipe, training.start.model.eval()
    everything, size, channels, _ = dataset_form(training.start.dataset)
    images = training.options.images or everything
    steps = recipe.epochs * max(images // recipe.batch_size, 1)
    image_steps = steps * min(recipe.batch_size, images)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, channels, size, size, device="meta"))
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(images, parameters, image_steps, 3 * counter.get_total_flops() / 2 * image_steps)


def measure_rate(training: Training, device: str) -> float:
    """Image-steps a second, of two steps on random images after one to warm up."""
    dataset, recipe = blank_dataset(training.options), training.start.recipe
    model = untrained(training.options, dataset).model.to(device).train()
    batch = min(recipe.batch_size, CACHED_BATCH) if device == "cpu" else recipe.batch_size
    dataset = replace(
        dataset,
        images=torch.randint(256, (batch, *dataset.images.shape[1:]), dtype=torch.uint8),
        labels=torch.arange(batch) % len(dataset.classes),
    )
    augment, began = Augmentation(recipe, dataset, device), 0.0
    for step in range(3):
        inputs, targets = augment(torch.arange(batch))
        with torch.autocast(torch.device(device).type, torch.bfloat16, training.options.bf16):
            loss = recipe.loss(model(inputs), targets)
        loss.backward()
        loss.item()  # waits for a GPU
        began = time.perf_counter() if step == 0 else began
    return 2 * batch / (time.perf_counter() - began)


def print_plan(plan: Plan, device: str, rate: float | None) -> None:
    """What is to be trained and measured, and what the trainings cost.

    Without a `rate`, in image-steps a second, that of each kind of training is measured.
    """
    rates: dict[str, float] = {}
    rows, left, work = [], 0.0, 0.0
    for training in plan.trainings:
        state, start, cost = training.state(), training.start, cost_of(training)
        kind = repr((start.architecture, start.recipe))
        with working(f"{training.options.out}: a few steps"):
            if kind not in rates:
                rates[kind] = rate or measure_rate(training, device)
        seconds = cost.image_steps / rates[kind]
        if state in ("to do", "begun"):
            left, work = left + seconds, work + cost.flops
        rows.append(
            [
                str(training.options.out),
                *(str(start.architecture[name]) for name in ("window", "head_window")),
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
    print_table(
        f"Plan of {plan.path}",
        [
            *("checkpoint", "window", "head window", "seed", "images", "epochs"),
            *("parameters", "image-steps", "FLOPs", "time", "state"),
        ],
        rows,
    )
    todo = [row for row in rows if row[-1] in ("to do", "begun")]
    how = "as given" if rate else "as measured in a few steps here, one after another"
    slowest, fastest = min(rates.values()), max(rates.values())
    print(
        f"{len(todo)} of {len(rows)} trainings left: {work:.1e} FLOPs, about {_duration(left)} at "
        + (f"{slowest:.0f}" if slowest == fastest else f"{slowest:.0f} to {fastest:.0f}")
        + f" images/s ({how}); evaluations and measurements come on top"
    )
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
