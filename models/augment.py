"""Random augmentation of a batch, as a recipe says, with torchvision's transforms."""

from __future__ import annotations

import torch
from scipy.stats import norm
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from models.datasets import ImageDataset
from models.recipes import Recipe

LEVELS = 10  # RandAugment's magnitudes are 0 to 10, as in timm, whose naming the paper uses


class Augmentation:
    """Turns chosen images of a dataset into what a recipe trains on.

    Draws from PyTorch's global generator on the CPU: seed that to draw the same again.
    """

    def __init__(self, recipe: Recipe, dataset: ImageDataset) -> None:
        self.dataset = dataset
        size = tuple(dataset.images.shape[1:3])
        self.of_image = v2.Compose(
            [
                *([v2.RandomCrop(size, recipe.crop_padding)] if recipe.crop_padding else []),
                *([v2.RandomHorizontalFlip()] if recipe.flip else []),
                *([_randaugment(recipe)] if recipe.randaugment_ops else []),
                v2.Identity(),
            ]
        )
        self.of_batch = [
            mix(alpha=alpha, num_classes=len(dataset.classes))
            for mix, alpha in ((v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix))
            if alpha
        ]

    def __call__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Augment the images at `indices` (B,).

        Returns normalised inputs (B, channels, height, width) and soft targets (B, classes).
        """
        images = self.dataset.images[indices].permute(0, 3, 1, 2)
        inputs = self.dataset.normalise(torch.stack([self.of_image(image) for image in images]))
        labels = self.dataset.labels[indices]
        if self.of_batch:
            return v2.RandomChoice(self.of_batch)(inputs, labels)
        return inputs, F.one_hot(labels, len(self.dataset.classes)).float()


def _randaugment(recipe: Recipe) -> v2.Transform:
    """RandAugment whose magnitude varies from image to image (timm's ``rand-mM-nN-mstd1``)."""
    levels = range(LEVELS + 1)
    weights = norm.pdf(levels, loc=recipe.randaugment_magnitude)
    return v2.RandomChoice(
        [v2.RandAugment(recipe.randaugment_ops, m, num_magnitude_bins=LEVELS + 1) for m in levels],
        p=list(weights / weights.sum()),
    )
