"""What a model makes of every single image: the raw material of a bootstrap over images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from analysis.objective import require_outputs, require_size
from models.devices import full_precision
from models.distributed import ALONE, Team
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
