"""Training recipes: what is minimised, and how."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

from models.description import require, require_integer, require_number

RandAugment = Literal["torchvision", "timm"]


@dataclass(frozen=True)
class Recipe:
    """A training objective and the schedule that minimises it with AdamW.

    The objective is NLL + weight_decay / 2 * (sum of squares of all parameters), the NLL being
    that of augmented, mixed images against smoothed labels. AdamW decays every parameter; its decay
    is decoupled from the gradient, so that it follows this objective, as Park and Kim write it,
    without quite minimising it.
    """

    epochs: int
    warmup_epochs: int
    learning_rate: float
    weight_decay: float = 0.05
    batch_size: int = 96
    label_smoothing: float = 0.1
    mixup: float = 0.0  # alpha of the Beta distribution; 0 is off
    cutmix: float = 0.0  # likewise; where both are on, each batch takes one of them
    randaugment_ops: int = 0  # operations on each image; 0 is off
    randaugment_magnitude: float = 9.0  # of 10; varies by image with a standard deviation of 1
    crop_padding: int = 0
    flip: bool = False
    clip_norm: float = 5.0
    # "timm" takes one of fifteen operations and does it with probability 1/2; its Posterize and
    # Solarize are weaker at a higher magnitude. "torchvision" always does one of fourteen.
    randaugment: RandAugment = "torchvision"

    def __post_init__(self) -> None:
        """Raise `InputError` if an option is out of range."""
        require_integer("epochs", self.epochs, 1, 10**6)
        require_integer("warmup_epochs", self.warmup_epochs, 0, self.epochs)
        require_integer("batch_size", self.batch_size, 1, 2**24)
        require_integer("randaugment_ops", self.randaugment_ops, 0, 100)
        require_integer("crop_padding", self.crop_padding, 0, 1024)
        for name, high in (
            *(("learning_rate", 1e6), ("weight_decay", 1e6), ("label_smoothing", 1)),
            *(("mixup", 1e6), ("cutmix", 1e6), ("randaugment_magnitude", 10), ("clip_norm", 1e9)),
        ):
            require_number(name, getattr(self, name), 0, high)
        require(type(self.flip) is bool, "flip", self.flip, "true or false")
        known = get_args(RandAugment)
        require(self.randaugment in known, "randaugment", self.randaugment, f"one of {known}")

    def options(self) -> dict[str, Any]:
        """Describe it as checkpoints and measurements do, without what those before it lack."""
        options = asdict(self)
        if self.randaugment == "torchvision":
            del options["randaugment"]
        return options

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """NLL with label smoothing, ``(outputs, targets) -> scalar``, mean over the batch."""
        from torch.nn import functional as F

        return partial(F.cross_entropy, label_smoothing=self.label_smoothing)

    def learning_rate_at(self, epoch: float) -> float:
        """Learning rate after `epoch` epochs: linear warm-up from 0, then a cosine to 0."""
        if epoch < self.warmup_epochs:
            return self.learning_rate * epoch / self.warmup_epochs
        done = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1)
        return self.learning_rate * (1 + math.cos(math.pi * min(done, 1.0))) / 2


# Nothing but NLL on the images as they are, of a training that is not known.
PLAIN = Recipe(epochs=1, warmup_epochs=0, learning_rate=1.0, weight_decay=0.0, label_smoothing=0.0)


@dataclass(frozen=True)
class Preset:
    """A recipe, and the dataset and the architecture that it is meant for."""

    dataset: str
    recipe: Recipe
    architecture: dict[str, Any]  # options of `models.csan.CSAN`; the dataset gives the others


_CIFAR100 = Preset(
    "cifar100",
    Recipe(
        epochs=25,
        warmup_epochs=2,
        learning_rate=1e-3,
        label_smoothing=0.1,
        mixup=0.2,
        randaugment_ops=1,
        randaugment_magnitude=5,
        crop_padding=4,
        flip=True,
    ),
    dict(patch_size=4, dim=96, depth=6, heads=3, stochastic_depth=0.05),
)

PRESETS = {
    "digits": Preset(
        "digits",
        Recipe(
            epochs=60,
            warmup_epochs=5,
            learning_rate=2e-3,
            batch_size=32,
            label_smoothing=0.1,
            mixup=0.2,
            crop_padding=1,
        ),
        dict(patch_size=1, dim=48, depth=4, heads=3, mlp_ratio=2.0, stochastic_depth=0.05),
    ),
    "cifar10": replace(_CIFAR100, dataset="cifar10"),
    "cifar100": _CIFAR100,
    # Park and Kim's own, ViT-Ti size, for a machine with a GPU: the configuration that they have
    # published for CIFAR-100, the border and the position embedding of their code. Its patches are
    # 2 x 2; but a window of 8 x 8 is all of the image in their Figure 7: patches of 4 x 4.
    "paper-cifar100": Preset(
        "cifar100",
        Recipe(
            epochs=305,
            warmup_epochs=5,
            learning_rate=1.25e-4,
            label_smoothing=0.1,
            mixup=1.0,
            cutmix=0.8,
            randaugment_ops=2,
            randaugment_magnitude=9,
            crop_padding=4,
            flip=True,
            randaugment="timm",
        ),
        dict(
            **dict(patch_size=4, dim=192, depth=12, heads=3, stochastic_depth=0.1),
            **dict(border="zero", position_std=0.02),
        ),
    ),
}
