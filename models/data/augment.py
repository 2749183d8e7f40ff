"""Random augmentation of mini-batches, as a recipe says, made on the device of the images.

What is random is drawn on the CPU, from one generator, and is the same on every device; what is
then made of the images, of several mini-batches at once if need be, is the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from models.data import randaugment
from models.data.datasets import ImageDataset
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
        *self.size, channels = dataset.images.shape[1:]
        fits = not recipe.randaugment_ops or channels in (1, 3)
        require(fits, "dataset", dataset.name, f"1 or 3 channels for RandAugment, not {channels}")
        self.recipe = recipe
        self.dataset = dataset
        self.device = torch.device(device)
        self.images = dataset.images.to(device)
        self.labels = dataset.labels.to(device)
        levels = torch.arange(256).expand(1, channels, 1, 256)
        self.normalised = dataset.normalise(levels)[:, :, 0].to(device)  # of each channel
        self.fill = (255 * dataset.mean).round().to(torch.uint8).to(device)
        old = recipe.randaugment_ops and recipe.randaugment == "torchvision"
        self.one_by_one = _as_torchvision(recipe, self.size) if old else None

    def __call__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Augment the images at `indices` (n,): `draw`, then `apply`."""
        return self.apply([self.draw(indices)])

    def draw(self, indices: Tensor) -> Choices:
        """Choose how to augment the images at `indices` (n,), a tensor on the CPU."""
        recipe, n = self.recipe, len(indices)
        corners = torch.full((n, 2), recipe.crop_padding)
        flipped = torch.zeros(n, dtype=torch.bool)
        images = operations = None
        if self.one_by_one is not None:
            chosen = self.dataset.images[indices].permute(0, 3, 1, 2)
            images = torch.stack([self.one_by_one(image) for image in chosen])
        else:
            if recipe.crop_padding:
                corners = torch.randint(2 * recipe.crop_padding + 1, (n, 2))
            if recipe.flip:
                flipped = torch.rand(n) < 0.5
            if recipe.randaugment_ops:
                operations = randaugment.draw(
                    n, recipe.randaugment_ops, recipe.randaugment_magnitude
                )
        return Choices(indices, images, corners, flipped, operations, *self._draw_mixture())

    def _draw_mixture(self) -> tuple[Tensor, float]:
        recipe, (height, width) = self.recipe, self.size
        own = torch.ones(height, width)
        kinds = [kind for kind in ("mixup", "cutmix") if getattr(recipe, kind)]
        if not kinds:
            return own, 1.0
        kind = kinds[int(torch.multinomial(torch.ones(len(kinds)), 1))]
        alpha = getattr(recipe, kind)
        share = torch.distributions.Beta(alpha, alpha).sample().item()
        if kind == "mixup":
            return own * share, share
        # Of the area of the box, as of the label, 1 - share, but for what is beyond the border.
        x, y = int(torch.randint(width, ())), int(torch.randint(height, ()))
        half_width, half_height = (
            int(0.5 * math.sqrt(1 - share) * side) for side in (width, height)
        )
        own[max(y - half_height, 0) : y + half_height, max(x - half_width, 0) : x + half_width] = 0
        return own, own.double().mean().item()

    def apply(self, batches: Sequence[Choices]) -> tuple[Tensor, Tensor]:
        """Make one or several mini-batches of n images each, at once.

        Returns normalised inputs, float32 (batches * n, channels, height, width), and soft targets,
        float32 (batches * n, classes), on the device, mini-batch after mini-batch: the same as one
        by one. The host does not wait for the device.
        """
        send = partial(torch.Tensor.to, device=self.device, non_blocking=True)
        indices = send(torch.cat([choices.indices for choices in batches]))
        if self.one_by_one is not None:
            made = [choices.images for choices in batches if choices.images is not None]
            images = send(torch.cat(made))
        else:
            images = self.images.index_select(0, indices).permute(0, 3, 1, 2)
            if self.recipe.crop_padding or self.recipe.flip:
                images = self._crop(images, batches)
            drawn = [choices.operations for choices in batches if choices.operations is not None]
            if drawn:
                images = randaugment.apply(images, randaugment.joined(drawn), self.fill)
        table = self.normalised.expand(len(images), -1, -1)
        inputs = table.gather(2, images.flatten(2).long()).unflatten(2, self.size)
        labels = self.labels.index_select(0, indices)
        targets = F.one_hot(labels, len(self.dataset.classes)).float()
        if self.recipe.mixup or self.recipe.cutmix:
            own = torch.stack([choices.own for choices in batches])[:, None, None]
            share = torch.tensor([choices.share for choices in batches])[:, None, None]
            inputs = _mixed(inputs, send(own))
            targets = _mixed(targets, send(share))
        return inputs, targets

    def _crop(self, images: Tensor, batches: Sequence[Choices]) -> Tensor:
        """Crop padded images (n, channels, height, width) to their size, and flip some."""
        height, width = self.size
        padding = self.recipe.crop_padding
        top, left = torch.cat([choices.corners for choices in batches]).unbind(1)
        flipped = torch.cat([choices.flipped for choices in batches])[:, None]
        columns = torch.arange(width)
        columns = left[:, None] + torch.where(flipped, columns.flip(0), columns)
        rows = top[:, None] + torch.arange(height)
        rows, columns = (t.to(self.device, non_blocking=True) for t in (rows, columns))
        index = rows[:, :, None] * (width + 2 * padding) + columns[:, None]
        index = index.flatten(1)[:, None].expand(-1, images.shape[1], -1)
        padded = F.pad(images, [padding] * 4).flatten(2)
        return padded.gather(2, index).unflatten(2, self.size)


def _mixed(batches: Tensor, own: Tensor) -> Tensor:
    """Mix every item with the one before it in its mini-batch, of which `own` has the weights."""
    items = batches.unflatten(0, (len(own), -1))
    return (items.roll(1, 1) * (1 - own) + items * own).flatten(0, 1)


def _as_torchvision(recipe: Recipe, size: list[int]) -> Callable[[Tensor], Tensor]:
    """Crop, flip, and torchvision's RandAugment of a single image, always done.

    Its magnitude, of 0 to 10, is drawn for each image.
    """
    from scipy.stats import norm
    from torchvision.transforms import v2

    levels = range(int(randaugment.TOP_LEVEL) + 1)
    weights = norm.pdf(levels, loc=recipe.randaugment_magnitude)
    operations = [
        v2.RandAugment(recipe.randaugment_ops, level, num_magnitude_bins=len(levels))
        for level in levels
    ]
    return v2.Compose(
        [
            *([v2.RandomCrop(size, recipe.crop_padding)] if recipe.crop_padding else []),
            *([v2.RandomHorizontalFlip()] if recipe.flip else []),
            v2.RandomChoice(operations, p=list(weights / weights.sum())),
        ]
    )
