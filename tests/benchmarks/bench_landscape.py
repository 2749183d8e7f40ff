"""Surfaces against other ways to compute them: ``python -m tests.benchmarks.bench_landscape``.

Same model, images, directions and grid for all; values have to agree, too. Printed and written to
``landscape.md``.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from analysis.objective import build_objective, error_rate
from lossgeometry import random_directions, surface
from lossgeometry.landscape.evaluation import Evaluator
from lossgeometry.landscape.slices import Slice
from models.checkpoint import load_checkpoint
from models.csan import CSAN
from models.data.datasets import load_dataset
from tests.benchmarks.images import MEAN, STD, Images
from tests.benchmarks.products import Products
from tests.benchmarks.table import Row, write_table

METRICS = {"nll": F.cross_entropy, "error": error_rate}
CHECKPOINT = Path("checkpoints/csan8.pt")

POINTS, TILE = 21, 7  # along each axis
OUTPUT = Path(__file__).with_name("landscape.md")
PACKAGES = ("torch", "numpy", "scipy", "loss-landscapes", "timm")


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument(
        "--tiles", type=int, default=9, help="of 7 x 7 points, 9 are the whole surface"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    model = CSAN(
        image_size=32, channels=3, classes=100, patch_size=4, dim=96, depth=6, heads=3, window=5
    ).eval()
    train_set = load_dataset("cifar100").first(options.images)
    pixels, labels = train_set.images, train_set.labels
    rows = chain(
        against_peers(model, pixels, labels, options.tiles),
        sgemm(model, pixels),
        adaptive(),
    )
    write_table(OUTPUT, rows, packages=PACKAGES, threads=torch.get_num_threads())


def against_peers(model: nn.Module, pixels: Tensor, labels: Tensor, tiles: int) -> Iterator[Row]:
    """The surface against loss-landscapes and against the paper's procedure.

    Tile by tile, so that all sides take turns; ratios are medians over the tiles. All are of the
    same augmented images, which only the paper's procedure makes anew at every point.
    """
    inputs, targets = (
        torch.cat(tensors) for tensors in zip(*pipeline(pixels, labels), strict=True)
    )
    directions = random_directions(model, seed=0)
    axis = np.linspace(-1, 1, POINTS)
    starts = list(product(range(0, POINTS, TILE), repeat=2))[:tiles]
    separate, together, procedure = [], [], []
    for i, j in tqdm(starts, desc="tiles", leave=False):
        xs, ys = axis[j : j + TILE], axis[i : i + TILE]
        data = (inputs, targets)
        seconds, ours = timed(lambda d=data, x=xs, y=ys: cut(model, d, directions, x, y))
        # loss-landscapes shifts every other column by one step: it visits one more y.
        wide = cut(model, data, directions, xs, np.append(ys, 2 * ys[-1] - ys[-2]))
        spent = 0.0
        columns = [slice(1, None) if c % 2 == 0 else slice(None, -1) for c in range(TILE)]
        for name, metric in METRICS.items():  # a run computes one of the package's metrics
            more, theirs = timed(
                lambda m=metric, x=xs, y=ys: loss_landscapes(
                    model, m, inputs, targets, directions, x, y
                )
            )
            spent += more
            visited = np.stack([wide[name][column, c] for c, column in enumerate(columns)])
            np.testing.assert_allclose(visited, theirs, rtol=1e-5, atol=1e-5)
        separate.append(spent / seconds)
        spent, _ = timed(
            lambda x=xs, y=ys: loss_landscapes(model, both, inputs, targets, directions, x, y)
        )
        together.append(spent / seconds)
        spent, theirs = timed(
            lambda x=xs, y=ys: papers_procedure(model, pixels, labels, directions, x, y)
        )
        for name in METRICS:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
        procedure.append(spent / seconds)
    work = f"21 x 21 surface ({len(starts)} of 9 tiles), {len(labels)} images, NLL + error"
    yield work, "loss-landscapes, a run for each metric", np.median(separate), 2
    yield work, "loss-landscapes, one metric that is both", np.median(together), 2
    yield work, "the paper's procedure", np.median(procedure), 4


def both(outputs: Tensor, targets: Tensor) -> Tensor:
    """All metrics at once, (2,), which loss-landscapes passes through."""
    return torch.stack([fn(outputs, targets) for fn in METRICS.values()])


def sgemm(model: nn.Module, pixels: Tensor) -> Iterator[Row]:
    """Rate of the matrix products within a forward pass against the same products alone."""
    inputs = normalised(pixels[:128])
    evaluator = Evaluator(model, METRICS, (inputs, torch.zeros(len(inputs), dtype=torch.long)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad(), Products() as record:
        for batch, _ in evaluator._sets[0]:
            model(batch)
    products = record.alone()
    alone = min(timed(products)[0] for _ in range(5))
    within = min(timed(lambda: evaluator(evaluator.weights))[0] for _ in range(5))
    torch.set_num_threads(threads)
    yield "GEMM rate in the forward pass", "plain sgemm of the same shapes", alone / within, 0.7


def adaptive(points: int = 51, tolerance: float = 0.01) -> Iterator[Row]:
    """Evaluations of an adaptive surface of a trained network against its full grid."""
    checkpoint = load_checkpoint(CHECKPOINT)
    objective = build_objective(
        checkpoint, load_dataset(checkpoint.dataset), batch_size=16, batches=8
    )
    directions = random_directions(objective.model, seed=0)
    xs = np.linspace(-1, 1, points)
    arguments = (objective.model, {"nll": objective.loss}, objective.batches, directions, xs, xs)
    whole = surface(*arguments, weight_decay=objective.weight_decay)
    for weight_decay, what in ((objective.weight_decay, "NLL + L2"), (0.0, "NLL alone")):
        found = surface(*arguments, weight_decay=weight_decay, adaptive=tolerance)
        penalty = found["l2"]
        error = np.abs(found["nll"] - whole["nll"]) / (whole["nll"] + penalty)
        work = f"{what} to {tolerance:.0%}: {error.max():.2%} off at most"
        ratio = found.evaluated.size / found.evaluated.sum()
        yield f"{work}, stated {found.settings['objective_error']:.2%}", "full grid", ratio, 25


def cut(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    directions: list[dict[str, Tensor]],
    xs: np.ndarray,
    ys: np.ndarray,
) -> Slice:
    """This project's surface."""
    return surface(model, METRICS, data, directions, xs, ys)


def loss_landscapes(
    model: nn.Module,
    metric: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    directions: list[dict[str, Tensor]],
    xs: np.ndarray,
    ys: np.ndarray,
) -> np.ndarray:
    """The peer's plane from the corner of a square grid, (len(xs), len(ys))."""
    from loss_landscapes import planar_interpolation
    from loss_landscapes.metrics import Metric

    class OfOutputs(Metric):
        def __call__(self, wrapper):
            return metric(wrapper.forward(inputs), labels).cpu().numpy()

    start = shifted(model, directions, (xs[0], ys[0]))
    reach = len(xs) * (xs[1] - xs[0])  # the peer's last step stays one short of the end
    ends = [shifted(start, [direction], (reach,)) for direction in directions]
    return planar_interpolation(start, *ends, OfOutputs(), steps=len(xs))


def papers_procedure(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    directions: list[dict[str, Tensor]],
    xs: np.ndarray,
    ys: np.ndarray,
) -> dict[str, np.ndarray]:
    """Copy the state, move it, load it and run the data pipeline, at every grid point.

    With the augmentation of the paper's recipe, whose randomness is the same at every point here.
    """
    model = copy.deepcopy(model)
    state = copy.deepcopy(model.state_dict())
    bases = [
        {name: d.get(name, torch.zeros_like(w)) for name, w in state.items()} for d in directions
    ]
    values = {name: np.empty((len(ys), len(xs))) for name in METRICS}
    for (i, y), (j, x) in product(enumerate(ys), enumerate(xs)):
        moved = copy.deepcopy(state)
        for name in moved:
            moved[name] = moved[name] + x * bases[0][name] + y * bases[1][name]
        model.load_state_dict(moved)
        totals = dict.fromkeys(METRICS, 0.0)
        with torch.no_grad():
            for inputs, targets in pipeline(pixels, labels):
                outputs = model(inputs)
                for name, fn in METRICS.items():
                    totals[name] += len(targets) * fn(outputs, targets).item()
        for name, total in totals.items():
            values[name][i, j] = total / len(labels)
    return values


def pipeline(pixels: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of augmented and mixed images as timm's loader makes them, always the same."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what timm draws from
    torch.manual_seed(0)
    mix = Mixup(mixup_alpha=1.0, cutmix_alpha=0.8, num_classes=100, label_smoothing=0.1)
    for inputs, targets in DataLoader(Images(pixels, labels, "rand-m9-n2-mstd1"), batch_size=256):
        yield mix(inputs, targets)


def normalised(pixels: Tensor) -> Tensor:
    """As `Images` does, all at once."""
    scaled = pixels.permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def shifted(
    model: nn.Module, directions: list[dict[str, Tensor]], steps: tuple[float, ...]
) -> nn.Module:
    """A copy of the model, displaced."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for direction, step in zip(directions, steps, strict=True):
            for name, delta in direction.items():
                model.get_parameter(name).add_(delta, alpha=step)
    return model


def timed(function: Callable) -> tuple[float, object]:
    """Seconds it takes, and what it returns."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
