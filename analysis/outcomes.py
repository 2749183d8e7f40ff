"""What a model makes of every single image: the raw material of a bootstrap over images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from models.errors import InputError
from models.training import EVALUATION_BATCH

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint
    from models.datasets import ImageDataset


@torch.inference_mode()
def outcomes(
    checkpoint: Checkpoint, dataset: ImageDataset, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """NLL of each image, float32 (n,), and whether it is classified correctly, bool (n,).

    In evaluation mode, on the images as they are, without label smoothing. Raises `InputError` if
    the images do not fit the model.
    """
    size, channels = (checkpoint.architecture[key] for key in ("image_size", "channels"))
    if tuple(dataset.images.shape[1:]) != (size, size, channels):
        raise InputError(
            f"dataset: images of {dataset.name} are {tuple(dataset.images.shape[1:])}, "
            f"expected {(size, size, channels)} as the checkpoint's"
        )
    model = checkpoint.model.to(device).eval()
    nll, correct = [], []
    for i in range(0, len(dataset), EVALUATION_BATCH):
        images = dataset.images[i : i + EVALUATION_BATCH].permute(0, 3, 1, 2)
        labels = dataset.labels[i : i + EVALUATION_BATCH].to(device)
        scores = model(dataset.normalise(images).to(device))
        nll.append(F.cross_entropy(scores.double(), labels, reduction="none").cpu())
        correct.append((scores.argmax(1) == labels).cpu())
    return torch.cat(nll).float().numpy(), torch.cat(correct).numpy()
