"""What a model makes of every single image, and of an epoch of its training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from analysis.landscape.evaluation import seed_everything, untouched_rng
from analysis.objective import augmented, error_rate, require_outputs, require_size, shuffled
from models.devices import full_precision
from models.distributed import ALONE, Team
from models.seeds import derive_seed
from models.training import evaluating, shares

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint
    from models.datasets import ImageDataset


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
    require_size(checkpoint, dataset)
    model = checkpoint.model.to(device).eval()
    first = dataset.normalise(dataset.images[:1].permute(0, 3, 1, 2))
    require_outputs(model, first.to(device), len(dataset.classes))
    nll = torch.zeros(len(dataset), dtype=torch.float64, device=device)
    correct = torch.zeros_like(nll)

    def evaluate(at_once: int) -> None:
        for batch in shares(len(dataset), team, at_once):
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
) -> tuple[float, float]:
    """NLL and error that training sees at the weights of `checkpoint`: means over one epoch.

    Its mini-batches are `build_objective`'s of kind "train" and seed 0, of the size that the recipe
    trains on: augmented and mixed images, smoothed labels, the model in training mode (stochastic
    depth). The L2 penalty is left out. A `team` that makes this call together shares the
    mini-batches. Raises `InputError` if the images do not fit the model.
    """
    require_size(checkpoint, dataset)
    device = torch.device(device)
    recipe, model = checkpoint.recipe, checkpoint.model.to(device).train()
    order = shuffled(len(dataset), recipe.batch_size, None, seed=0)
    own = list(enumerate(order))[team.shard(len(order))]
    total = torch.zeros(2, dtype=torch.float64, device=device)
    bar = tqdm(own, desc="augmented images", unit="batch", disable=True if team.rank else None)
    with untouched_rng(device):
        for (i, _), (x, y) in zip(bar, augmented(checkpoint, dataset, own, seed=0), strict=True):
            seed_everything(device, derive_seed(0, i))
            scores, targets = model(x.to(device)), y.to(device)
            means = recipe.loss(scores, targets), error_rate(scores, targets)
            total += len(x) * torch.stack([mean.double() for mean in means])
    nll, error = (team.sum_(total) / len(dataset)).tolist()
    return nll, error
