"""CIFAR images as torchvision's datasets and timm's RandAugment deliver them: one by one."""

import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class Images(Dataset):
    """Images that are decoded, augmented and normalised one by one.

    `randaugment` is in timm's notation, such as "rand-m9-n2-mstd1".
    """

    def __init__(self, pixels: Tensor, labels: Tensor, randaugment: str) -> None:
        self.pixels, self.labels = pixels.numpy(), labels
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                rand_augment_transform(randaugment, {}),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]
