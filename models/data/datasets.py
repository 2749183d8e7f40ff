"""Image classification datasets as tensors in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from models.data.arrays import Images, Split, read_images


@dataclass(frozen=True)
class ImageDataset(Images[Tensor]):
    """One split of a labelled image dataset, with the statistics of its training split."""

    @cached_property
    def inputs(self) -> Tensor:
        """Normalised images, float32 (N, channels, height, width)."""
        with torch.inference_mode(False):  # it is kept, and may be differentiated through later
            return self.normalise(self.images.permute(0, 3, 1, 2))

    def normalise(self, images: Tensor) -> Tensor:
        """Uint8 (N, channels, height, width) to float32 with the training split's mean and std."""
        mean, std = (statistic[:, None, None] for statistic in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


def load_dataset(
    spec: str | Path, split: Split = "train", *, data_root: str | Path | None = None
) -> ImageDataset:
    """Load one split of a dataset.

    Parameters
    ----------
    spec : str or path
        "digits" (scikit-learn's 1,797 handwritten digits, 8 x 8 x 1, in a fixed stratified split
        into 1,437 and 360; they are in ``digits.h5`` beside this file), "cifar10" or "cifar100"
        (downloaded by torchvision on first use and kept as HDF5), or the path of an HDF5 file in
        the format described in `models.data.arrays`, or of a folder with ``train/CLASS/IMAGE`` and
        ``test/CLASS/IMAGE`` or ``val/CLASS/IMAGE``. Options may follow, as in
        ``pets?image_size=224&mean=0.5&std=0.5``: see `models.data.preparation.Preparation`.
    split : {"train", "test"}
    data_root : path, optional
        Folder of the downloaded datasets. Default: the environment variable ``LOCALITY_DATA``, then
        ``data`` in the current folder.

    Raises
    ------
    InputError
        If the dataset is unknown, cannot be downloaded, or is malformed.
    """
    read = read_images(spec, split, data_root=data_root)
    images, labels, mean, std = map(
        torch.from_numpy, (read.images, read.labels, read.mean, read.std)
    )
    return ImageDataset(read.name, images, labels, read.classes, mean, std)
