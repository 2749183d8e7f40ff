"""Random augmentation of mini-batches, as a recipe says, made on the device of the images.

What is random is drawn on the CPU, from one generator, and is the same on every device; what is
then made of the images, of several mini-batches at once if need be, is the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import norm
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from models import randaugment
from models.datasets import ImageDataset
from models.description import require
from models.recipes import Recipe


@dataclass(frozen=True)
class Choices:
    """All that is random of one mini-batch of n images; tensors on the CPU."""

    indices: Tensor  # int64 (n,), of the images in the dataset
    images: Tensor | None  # uint8 (n, channels, height, width), where these are made already
    corners: Tensor  # int64 (n, 2): row and column of the padded image where the crop begins
    flipped: Tensor  # bool (n,)
    operations: randaugment.Operations | None
    own: Tensor  # float32 (height, width): weight of an image's own pixels, the others are mixed in
    share: float  # of an image's own label


class Augmentation:
    """Turns chosen images of a dataset into what a recipe trains on.

    Crops and flips, RandAugment, normalisation, then mixup or cutmix of each image with the one
    before it. Draws from PyTorch's global generator on the CPU: seed that to draw the same again.

    Parameters
    ----------
    recipe : Recipe
    dataset : ImageDataset
    device : torch.device or str
        Where the images are kept, as uint8, and augmented.

    Raises
    ------
    InputError
        If the recipe has RandAugment, and the images are neither grey nor red, green and blue.
    """

    def __init__(
        self, recipe: Recipe, dataset: ImageDataset, device: torch.device | str = "cpu"
    ) -> None:
        channels = dataset.images.shape[3]
        fits = not recipe.randaugment_ops or channels in (1, 3)
        require(fits, "dataset", dataset.name, f"1 or 3 channels for RandAugment, not {channels}")
        self.recipe = recipe
        self.device = torch.device(device)
        self.classes = len(dataset.classes)
        self.images = dataset.images.to(device)
        self.labels = dataset.labels.to(device)
        levels = torch.arange(256, dtype=torch.uint8).expand(1, channels, 1, 256)
        self.normalised = dataset.normalise(levels)[0].to(device).view(1, channels, 256)
        self.fill = (255 * dataset.mean).round().to(torch.uint8).to(device)
        self.one_by_one = _as_torchvision(recipe, dataset) if recipe.randaugment_ops else None

    def __call__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Augment the images at `indices` (n,): `draw`, then `apply`."""
        return self.apply([self.draw(indices)])

    def draw(self, indices: Tensor) -> Choices:
        """Choose how to augment the images at `indices` (n,), a tensor on the CPU."""
        recipe, n = self.recipe, len(indices)
        ...

    def apply(self, batches: Sequence[Choices]) -> tuple[Tensor, Tensor]:
        """Make one or several mini-batches of n images each, at once.

        Returns normalised inputs, float32 (batches * n, channels, height, width), and soft targets,
        float32 (batches * n, classes), on the device, mini-batch after mini-batch: the same as one
        by one. The host does not wait for the device.
        """
        ...
