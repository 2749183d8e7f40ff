"""Training against other ways to do it: ``python -m tests.benchmarks.bench_training``.

On a GPU if there is one: augmentation by the paper's recipe, and three ViT-Ti that are trained at
once by it. On the CPU: a CSAN of dim 96, depth 6 on CIFAR-100, by the recipe of its preset, and
what it costs to watch its curvature. All sides take turns, and ratios are medians over the turns.
Printed and written to ``training.md``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import trange

from lossgeometry import CurvatureTracker
from lossgeometry.running.devices import choose_device
from models.checkpoint import Checkpoint
from models.csan import CSAN, WindowAttention
from models.data.augment import Augmentation
from models.data.datasets import ImageDataset, load_dataset
from models.recipes import PRESETS, RandAugment, Recipe
from models.train import Options, untrained
from models.training import train, train_together
from tests.benchmarks.images import Images
from tests.benchmarks.table import Row, write_table

OUTPUT = Path(__file__).with_name("training.md")
PACKAGES = ("torch", "torchvision", "timm")
ROWS = ("augmentation", "together", "peers", "tracking")
PRESET, PAPER = PRESETS["cifar100"], PRESETS["paper-cifar100"]
RECIPE = replace(PRESET.recipe, epochs=1, warmup_epochs=0)
WINDOW = 5
ARCHITECTURE = {**PRESET.architecture, **dict(image_size=32, channels=3, classes=100)}


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1920, help="of an epoch")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dataset", default="cifar100", help="or an HDF5 file of such images")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="these alone")
    parser.add_argument("--dim", type=int, default=192, help="of the three networks")
    parser.add_argument("--depth", type=int, default=12, help="of the three networks")
    options = parser.parse_args()
    sizes = dict(dim=options.dim, depth=options.depth)
    parts = dict(augmentation=augmentation, together=partial(together, sizes=sizes))
    parts |= dict(peers=against_peers, tracking=tracking)
    train_set = load_dataset(options.dataset).first(options.images)
    rows = chain.from_iterable(parts[name](train_set, options.turns) for name in options.rows)
    write_table(OUTPUT, rows, packages=PACKAGES, threads=torch.get_num_threads())


def augmentation(train_set: ImageDataset, turns: int) -> Iterator[Row]:
    """The paper's, of whole mini-batches on a device, against that of one image after the other."""
    device = choose_device("auto")
    recipe = PRESETS["paper-cifar100"].recipe
    batches = torch.arange(len(train_set)).split(recipe.batch_size)
    batches = batches[: len(train_set) // recipe.batch_size]  # full ones
    ours = Augmentation(recipe, train_set, device)
    old = Augmentation(replace(recipe, randaugment="torchvision"), train_set)
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: [ours(indices) for indices in batches],
        "ours, eight at once": lambda: [
            ours.apply([ours.draw(indices) for indices in batches[i : i + 8]])
            for i in range(0, len(batches), 8)
        ],
        "torchvision": lambda: [old(indices) for indices in batches],
        "timm": partial(timm_augmentation, recipe, train_set),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in trange(1 + turns, desc="turns", leave=False):
        for name, augment in sides.items():
            began = time.perf_counter()
            augment()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    seconds = {name: s[1:] for name, s in seconds.items()}  # the first is to warm up
    images = recipe.batch_size * len(batches)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    for own, how in (("ours", "by 96"), ("ours, eight at once", "by 8 x 96")):
        rate = images / np.median(seconds[own])
        work = f"augmentation by the paper's recipe, {how}, on {where}: {rate:,.0f} images a second"
        for peer, against in (
            ("timm", "timm and Pillow, one image after the other"),
            ("torchvision", "torchvision's RandAugment, one image after the other"),
        ):
            ratio = float(np.median(np.divide(seconds[peer], seconds[own])))
            yield work, against, ratio, 50 if device.type == "cuda" else 1


def timm_augmentation(recipe: Recipe, train_set: ImageDataset) -> None:
    """Augment all images with timm's parts, put together as its training script does."""
    loader = DataLoader(
        Images(train_set.images, train_set.labels, "rand-m9-n2-mstd1.0"),
        batch_size=recipe.batch_size,
        drop_last=True,
    )
    mix = Mixup(recipe.mixup, recipe.cutmix, num_classes=100)
    for batch in loader:
        mix(*batch)


def together(train_set: ImageDataset, turns: int, sizes: dict[str, int]) -> Iterator[Row]:
    """Windows 3, 5 and 8 as one program, compiled on a GPU, against one after another, eagerly."""
    device, windows = choose_device("auto"), (3, 5, 8)
    of = partial(seconds_of, train_set, device, sizes)
    sides: dict[str, Callable[[], float]] = {
        "at once": lambda: of(windows, compile=device.type == "cuda"),
        "one after another": lambda: sum(of([window]) for window in windows),
        "one after another, torchvision augments one image after the other": lambda: sum(
            of([window], randaugment="torchvision") for window in windows
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in trange(turns, desc="turns", leave=False):
        for name, side in sides.items():
            seconds[name].append(side())
    batch = PAPER.recipe.batch_size
    images = len(windows) * (len(train_set) // batch) * batch
    rates = {name: f"{images / np.median(s):,.0f} images a second" for name, s in seconds.items()}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    work = f"three ViT at once (dim {sizes['dim']}, depth {sizes['depth']}) on {where}: "
    for name, goal in zip(list(sides)[1:], (1, 10), strict=True):
        ratio = float(np.median(np.divide(seconds[name], seconds["at once"])))
        yield work + rates["at once"], f"{name}: {rates[name]}", ratio, goal


def seconds_of(
    train_set: ImageDataset,
    device: torch.device,
    sizes: dict[str, int],
    windows: Sequence[int],
    *,
    compile: bool = False,
    randaugment: RandAugment = "timm",
) -> float:
    """Seconds of the second epoch by the paper's recipe, evaluations apart."""
    recipe = replace(PAPER.recipe, epochs=2, warmup_epochs=0, randaugment=randaugment)
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder, f"csan{window}.pt") for window in windows]
        starts = []
        for window, out in zip(windows, outs, strict=True):
            options = Options(out=out, window=window, preset="paper-cifar100", **sizes)
            starts.append(replace(untrained(options, train_set), recipe=recipe))
        trained = train_together(
            starts,
            outs,
            train_set,
            train_set.first(1),
            device=device,
            bf16=device.type == "cuda",
            compile=compile,
        )
    return trained[0].history["seconds"][-1]


def against_peers(train_set: ImageDataset, turns: int) -> Iterator[Row]:
    """An epoch against another training loop, and against another attention."""
    require_agreement()
    sides: dict[str, Callable[[], float]] = {
        "ours": partial(ours, csan, train_set),
        "timm": partial(as_timm, csan, train_set, workers=0),
        "timm, workers": partial(as_timm, csan, train_set, workers=2),
        "unfold": partial(ours, with_unfold, train_set),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in trange(turns, desc="turns", leave=False):
        for name, epoch in sides.items():
            seconds[name].append(epoch())
    ratios = {name: np.median(np.divide(s, seconds["ours"])) for name, s in seconds.items()}
    work = f"an epoch of {len(train_set)} images, window {WINDOW}"
    yield work, "the same network in a loop as timm's, no workers", ratios["timm"], 1
    yield work, "the same, two workers prepare the images", ratios["timm, workers"], 1
    yield work, "attention made with unfold, in this project's loop", ratios["unfold"], 3


def require_agreement() -> None:
    """Unfolded keys and values make the same network as the mask of border "zero"."""
    unfolded, masked = with_unfold().eval(), csan(border="zero").eval()
    masked.load_state_dict(unfolded.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(masked(images), unfolded(images))


def tracking(train_set: ImageDataset, turns: int) -> Iterator[Row]:
    """Fifty steps alone, and with the largest eigenvalue after them."""
    device, every = choose_device("auto"), 50
    augment = Augmentation(RECIPE, train_set)
    batches = [augment(i) for i in torch.arange(len(train_set)).split(RECIPE.batch_size)]
    batches = [(x.to(device), y.to(device)) for x, y in batches]
    for images in (16, 32, RECIPE.batch_size):
        torch.manual_seed(0)
        model = csan().to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), RECIPE.learning_rate)
        probe = tuple(t[:images] for t in batches[0])
        tracker = CurvatureTracker(model, RECIPE.loss, probe, every=every)
        shares = []
        for turn in trange(1, 2 + turns, desc="turns", leave=False):
            began = time.perf_counter()
            for step in range(every):
                x, y = batches[(turn * every + step) % len(batches)]
                optimizer.zero_grad()
                RECIPE.loss(model(x), y).backward()
                optimizer.step()
            float(next(model.parameters()).sum())  # a GPU is done
            alone = time.perf_counter() - began
            tracker.step(turn * every)
            shares.append(alone / (time.perf_counter() - began))
        products = tracker.result().matvecs[1:].mean()
        work = f"training watched every {every} steps, {products:.1f} products on {images} images"
        yield work, "the same steps alone", float(np.median(shares[1:])), 0.87  # 15 %


def csan(border: str = "clamp") -> CSAN:
    """The network that is trained."""
    return CSAN(**ARCHITECTURE, window=WINDOW, border=border)


def with_unfold() -> CSAN:
    """The same with keys and values gathered for every query."""
    model = csan()
    for block in model.blocks:
        block.attention.__class__ = UnfoldAttention
    return model


class UnfoldAttention(WindowAttention):
    """Keys and values gathered for every query, zeros beyond the border, as Park and Kim do."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend: (B, N, dim) -> (B, N, dim)."""
        grid = int(x.shape[1] ** 0.5)
        q, k, v = self.qkv(x).chunk(3, -1)
        k, v = (
            F.unfold(t.mT.unflatten(2, (grid, grid)), WINDOW, padding=WINDOW // 2)
            .unflatten(1, (self.heads, -1, WINDOW**2))
            .permute(0, 1, 4, 3, 2)  # (B, heads, N, keys, d)
            for t in (k, v)
        )
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)[..., None, :]
        out = ((q * self.scale @ k.mT).softmax(-1) @ v).squeeze(-2)
        return self.proj(out.transpose(1, 2).flatten(2))


def ours(build: Callable[[], CSAN], train_set: ImageDataset) -> float:
    """Seconds of an epoch of this project's training, evaluations apart."""
    start = Checkpoint(
        model=build(),
        architecture={**ARCHITECTURE, "window": WINDOW},
        dataset="cifar100",
        images=len(train_set),
        recipe=RECIPE,
        epoch=0,
        seed=0,
        history={},
    )
    with tempfile.TemporaryDirectory() as folder:
        trained = train(start, Path(folder, "csan.pt"), train_set, train_set.first(1))
    return trained.history["seconds"][-1]


def as_timm(build: Callable[[], CSAN], train_set: ImageDataset, *, workers: int) -> float:
    """Seconds of an epoch with timm's parts, put together as its training script does."""
    model: nn.Module = build().train()
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=RECIPE.learning_rate, weight_decay=RECIPE.weight_decay
    )
    augmentation = f"rand-m{RECIPE.randaugment_magnitude:g}-n{RECIPE.randaugment_ops}-mstd1-inc1"
    loader = DataLoader(
        Images(train_set.images, train_set.labels, augmentation),
        batch_size=RECIPE.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
    )
    mix = Mixup(mixup_alpha=RECIPE.mixup, label_smoothing=RECIPE.label_smoothing, num_classes=100)
    loss_fn = SoftTargetCrossEntropy()
    batches = iter(loader)
    first = next(batches)  # the workers have started
    start = time.perf_counter()
    for batch in chain([first], batches):
        inputs, targets = mix(*batch)
        loss = loss_fn(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), value=RECIPE.clip_norm)
        optimizer.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
