"""What a model makes of every single image, and of an epoch of its training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from tqdm import tqdm

from analysis.measurements.recording import Recording
from analysis.objective import augmented, error_rate, require_outputs, require_size, shuffled
from analysis.tables import working
from lossgeometry.running.devices import choose_device, full_precision
from lossgeometry.running.distributed import ALONE, Team
from lossgeometry.seeds import derive_seed, seed_everything, untouched_rng
from models.checkpoint import Checkpoint
from models.data.arrays import Split
from models.data.datasets import ImageDataset, load_dataset
from models.isotropic import random_branches
from models.training import evaluating, parts, shares


def measure_outcomes(
    recording: Recording, checkpoint: Checkpoint, *, data_root: Path | None, device: str
) -> dict[str, np.ndarray]:
    """What a checkpoint makes of every image, clean."""
    arrays: dict[str, np.ndarray] = {}
    splits: dict[Split, int | None] = {"train": checkpoint.images, "test": None}
    for split, images in splits.items():
        dataset = load_dataset(checkpoint.dataset, split, data_root=data_root).first(images)
        with working(f"{checkpoint.path}: NLL of every {split} image"):
            nll, correct = outcomes(checkpoint, dataset, choose_device(device), recording.team)
        arrays |= {f"{split}/nll": nll, f"{split}/correct": correct}
        recording.data[split] = dataset.fingerprint
    return arrays


def measure_objective(
    recording: Recording, checkpoint: Checkpoint, *, data_root: Path | None, device: str
) -> dict[str, float]:
    """NLL and error of the augmented images that training sees."""
    dataset = load_dataset(checkpoint.dataset, data_root=data_root).first(checkpoint.images)
    recording.data["train"] = dataset.fingerprint
    nll, error = objective_outcomes(
        checkpoint, dataset, choose_device(device), recording.team, seed=0
    )
    return {"nll": nll, "error": error}


@torch.inference_mode()
@full_precision()
def outcomes(
    checkpoint: Checkpoint,
    dataset: ImageDataset,
    device: torch.device | str = "cpu",
    team: Team = ALONE,
) -> tuple[np.ndarray, np.ndarray]:
    """NLL of each image, float32 (n,), and whether it is classified correctly, bool (n,).

    In evaluation mode, on the images as they are, without label smoothing. A `team` that makes this
    call together shares the images. Raises `InputError` if the images do not fit the model.
    """
    model = _fitting(checkpoint, dataset, device).eval()
    nll = torch.zeros(len(dataset), dtype=torch.float64, device=device)
    correct = torch.zeros_like(nll)

    def evaluate(at_once: int) -> None:
        for batch in shares(len(dataset), team, at_once, nll.device):
            labels = dataset.labels[batch].to(device)
            images = dataset.normalise(dataset.images[batch].permute(0, 3, 1, 2))
            scores = model(images.to(device))
            nll[batch] = F.cross_entropy(scores.double(), labels, reduction="none")
            correct[batch] = scores.argmax(1) == labels

    evaluating(evaluate)
    team.sum_(nll)
    team.sum_(correct)
    return nll.cpu().float().numpy(), correct.cpu().bool().numpy()


@torch.inference_mode()
@full_precision()
def objective_outcomes(
    checkpoint: Checkpoint,
    dataset: ImageDataset,
    device: torch.device | str = "cpu",
    team: Team = ALONE,
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """NLL and error that training sees at the weights of a CSAN: means over one epoch.

    Its mini-batches are `build_objective`'s of kind "train", of the size that the recipe trains on:
    augmented and mixed images, smoothed labels, the model in training mode (stochastic depth). An
    image is classified wrongly if the largest score is not that of its largest soft target. The L2
    penalty is left out. A `team` that makes this call together shares the mini-batches. Raises
    `InputError` if the images do not fit the model.
    """
    device, recipe = torch.device(device), checkpoint.recipe
    model = _fitting(checkpoint, dataset, device).train()
    order = shuffled(len(dataset), recipe.batch_size, None, seed)
    own = list(enumerate(order))[team.shard(len(order))]
    batches = augmented(checkpoint, dataset, own, seed)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    bar = tqdm(
        own,
        desc=f"{checkpoint.path}: augmented images",
        unit="batch",
        leave=False,
        disable=True if team.rank else None,
    )
    with untouched_rng(device):
        for (i, _), (x, y) in zip(bar, batches, strict=True):
            batch = x.to(device), y.to(device), derive_seed(seed, i)
            total += evaluating(partial(_sums, model, recipe.loss, *batch))
    nll, error = (team.sum_(total) / len(dataset)).tolist()
    return nll, error


def _fitting(
    checkpoint: Checkpoint, dataset: ImageDataset, device: torch.device | str
) -> nn.Module:
    """The model, on `device`; `InputError` if the images do not fit it."""
    require_size(checkpoint, dataset)
    model = checkpoint.model.to(device)
    first = dataset.normalise(dataset.images[:1].permute(0, 3, 1, 2))
    require_outputs(model, first.to(device), len(dataset.classes))
    return model


def _sums(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    seed: int,
    at_most: int,
) -> Tensor:
    """NLL and error summed over a mini-batch, (2,) float64, evaluating so many images at once.

    What is random is drawn for the whole, however it is cut.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=x.device)
    seed_everything(x.device, seed)
    kept = {name: branch.draw(len(x)) for name, branch in random_branches(model).items()}
    for part in parts(slice(0, len(x)), at_most):
        own = {name: images[part] for name, images in kept.items()}
        scores = functional_call(model, own, (x[part],))
        means = loss(scores, y[part]), error_rate(scores, y[part])
        sums += len(scores) * torch.stack([mean.double() for mean in means])
    return sums
