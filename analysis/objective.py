"""The function whose landscape is measured: a checkpoint's training objective, or a clean one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lossgeometry.errors import InputError, one_line
from lossgeometry.functional import functional_call
from lossgeometry.seeds import derive_seed, seeded
from models.checkpoint import Checkpoint
from models.data.augment import Augmentation
from models.data.datasets import ImageDataset

Kind = Literal["train", "clean"]


@dataclass(frozen=True)
class Objective:
    """A loss on fixed mini-batches plus weight_decay / 2 * (sum of squares of the parameters).

    Kind "train" is what the checkpoint's training minimised: NLL with its label smoothing and mixup
    on augmented images, the model in training mode (stochastic depth), plus the L2 penalty. Kind
    "clean" is the plain NLL of the images as they are, in evaluation mode, without a penalty.
    Networks are trained on the first, so its landscape is the one that matters (Park and Kim 2022).
    """

    model: nn.Module  # on the device and in the mode in which it is measured
    loss: Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> scalar, mean over the batch
    weight_decay: float
    batches: list[tuple[Tensor, Tensor]]  # every random choice is made: (inputs, targets)
    fingerprint: str = ""  # of the dataset that they were drawn from

    @property
    def metrics(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """What is evaluated on a landscape: the loss without the penalty, and the error."""
        return {"nll": self.loss, "error": error_rate}

    def double(self) -> Objective:
        """The same in float64; the model itself is converted."""
        return replace(
            self,
            model=self.model.double(),
            batches=[(x.double(), y.double() if y.ndim > 1 else y) for x, y in self.batches],
        )


def build_objective(
    checkpoint: Checkpoint,
    dataset: ImageDataset,
    *,
    kind: Kind = "train",
    batch_size: int = 16,
    batches: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Objective:
    """Draw mini-batches of `dataset` once and for all.

    Parameters
    ----------
    checkpoint : Checkpoint
    dataset : ImageDataset
        The split to measure on.
    kind : {"train", "clean"}
    batch_size : int
        Images in a mini-batch; the last one may hold fewer.
    batches : int, optional
        Mini-batches, of a random order of the images; more than one epoch's are drawn from further
        epochs. Default: one epoch.
    seed : int
        Decides the order of the images and their augmentation. Mini-batch i is the same whatever
        the number of batches.
    device : torch.device or str

    Raises
    ------
    InputError
        If `batch_size` or `batches` is not positive, or the images do not fit the model.
    """
    if kind not in get_args(Kind):
        raise InputError(f"objective: {kind!r} is unknown, expected one of {get_args(Kind)}")
    for name, value in {"batch-size": batch_size, "batches": batches}.items():
        if value is not None and value < 1:
            raise InputError(f"{name}: {value} found, expected at least 1")
    require_size(checkpoint, dataset)
    order = shuffled(len(dataset), batch_size, batches, seed)
    trains = kind == "train"
    drawn = [
        (x.to(device), y.to(device))
        for x, y in (
            augmented(checkpoint, dataset, enumerate(order), seed)
            if trains
            else (
                (dataset.normalise(dataset.images[i].permute(0, 3, 1, 2)), dataset.labels[i])
                for i in order
            )
        )
    ]
    model = checkpoint.model.to(device).train(trains)
    require_outputs(model, min((x for x, _ in drawn), key=len), len(dataset.classes))
    return Objective(
        model=model,
        loss=checkpoint.recipe.loss if trains else F.cross_entropy,
        weight_decay=checkpoint.recipe.weight_decay if trains else 0.0,
        batches=drawn,
        fingerprint=dataset.fingerprint,
    )


def require_size(checkpoint: Checkpoint, dataset: ImageDataset) -> None:
    """Raise `InputError` if a checkpoint was made for images of another size."""
    if "model" in checkpoint.architecture:  # not a CSAN: `require_outputs` will tell
        return
    size, channels = (checkpoint.architecture[key] for key in ("image_size", "channels"))
    if tuple(dataset.images.shape[1:]) != (size, size, channels):
        raise InputError(
            f"dataset: images of {dataset.name} are {tuple(dataset.images.shape[1:])}, "
            f"expected {(size, size, channels)} as the checkpoint's"
        )


def require_outputs(model: nn.Module, inputs: Tensor, classes: int) -> None:
    """Raise `InputError` if `model` does not make (B, classes) scores of `inputs` (B, ...).

    The model is as before, and so is the state of the random generators.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tensors = {**dict(model.named_parameters()), **buffers}
    shape = "x".join(map(str, inputs.shape))
    try:
        with torch.random.fork_rng(), torch.no_grad():
            outputs = functional_call(model, tensors, inputs)
    except Exception as error:  # a model fails in any way it likes
        raise InputError(
            f"model: it fails on images of shape {shape}: {one_line(error)}"
        ) from error
    found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if found != (len(inputs), classes):
        raise InputError(
            f"model: {found} comes out of images of shape {shape}, expected scores "
            f"{(len(inputs), classes)} of the dataset's classes"
        )


def augmented(
    checkpoint: Checkpoint,
    dataset: ImageDataset,
    numbered: Iterable[tuple[int, Tensor]],
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented mini-batches (inputs, soft targets) on the CPU, made one by one.

    Of each, `numbered` has the number, which together with `seed` decides how it is augmented, and
    the indices of its images.
    """
    augment = Augmentation(checkpoint.recipe, dataset)
    for i, indices in numbered:
        with seeded(torch.device("cpu"), derive_seed(seed, 1, i)):
            batch = augment(indices)
        yield batch


def shuffled(n: int, batch_size: int, batches: int | None, seed: int) -> list[Tensor]:
    """Indices of each mini-batch, from as many shuffled epochs as it takes."""
    per_epoch = -(-n // batch_size)
    drawn: list[Tensor] = []
    while len(drawn) < (batches or per_epoch):
        order = torch.Generator().manual_seed(derive_seed(seed, 0, len(drawn) // per_epoch))
        drawn.extend(torch.randperm(n, generator=order).split(batch_size))
    return drawn[:batches]


def error_rate(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of (B, classes) outputs whose largest is not the label, or the largest soft target."""
    labels = targets.argmax(1) if targets.ndim > 1 else targets
    return (outputs.argmax(1) != labels).double().mean()
