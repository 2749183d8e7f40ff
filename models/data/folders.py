"""Folders of images, ``SPLIT/CLASS/NAME.png``, as arrays in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from lossgeometry.errors import InputError, one_line
from models.data.preparation import Preparation

_NAMES = {"train": ("train",), "test": ("test", "val")}
_FORMAT = "expected train/CLASS/IMAGE and test/CLASS/IMAGE or val/CLASS/IMAGE"
_GREY, _COLOUR = ("1", "L"), ("P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "PA")


def read_folder(
    folder: Path, split: str, preparation: Preparation
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images uint8 (N, height, width, channels), labels (N,) and classes of a split.

    The classes are the folders in ``train``, in the order of their names, as in torchvision's
    ``ImageFolder``; the images are in a fixed random order, so that the first so many are of all
    classes. There is one channel if all images are grey, otherwise there are three. What has a
    name that begins with a dot is not looked at.

    Raises
    ------
    InputError
        If a folder is missing or holds no images, an image cannot be read, or images differ in
        size and `preparation` has no image size.
    """
    classes, found = _find(folder, split)
    found = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    images = [_read_image(Path(path), preparation) for path, _ in found]
    for image, (path, _) in zip(images, found, strict=True):
        if image.shape[:2] != images[0].shape[:2]:
            raise InputError(
                f"{path}: {image.shape[1]} x {image.shape[0]} pixels, expected "
                f"{images[0].shape[1]} x {images[0].shape[0]} as in {found[0][0]}; --image-size "
                "brings all images to one size"
            )
    channels = max(image.shape[2] for image in images)
    arrays = np.stack([np.broadcast_to(i, (*i.shape[:2], channels)) for i in images])
    return arrays, np.array([label for _, label in found]), classes


def classes_and_channels(folder: Path) -> tuple[tuple[str, ...], int]:
    """The classes, and how many channels the training images have, which are not decoded."""
    classes, found = _find(folder, "train")
    grey = all(_mode(Path(path)) in _GREY for path, _ in found)
    return classes, 1 if grey else 3


def _find(folder: Path, split: str) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """The classes, and the images of a split with their labels."""
    train, place = _place(folder, "train"), _place(folder, split)
    classes = _folders(train)
    if not classes:
        raise InputError(f"{train}: there are no folders in it, {_FORMAT}")
    if unknown := set(_folders(place)) - set(classes):
        raise InputError(f"{place}: the class {min(unknown)} is not in {train}, {_FORMAT}")

    def is_image(path: str) -> bool:
        hidden = any(part.startswith(".") for part in Path(path).relative_to(place).parts)
        return not hidden and path.lower().endswith(IMG_EXTENSIONS)

    indices = {name: i for i, name in enumerate(classes)}
    found = make_dataset(place, indices, is_valid_file=is_image, allow_empty=True)
    if not found:
        raise InputError(f"{place}: there are no images in it, {_FORMAT}")
    return classes, found


def _folders(place: Path) -> tuple[str, ...]:
    return tuple(
        sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
    )


def _place(folder: Path, split: str) -> Path:
    for name in _NAMES[split]:
        if (folder / name).is_dir():
            return folder / name
    raise InputError(f"{folder}: there is no folder {' or '.join(_NAMES[split])}, {_FORMAT}")


def _read_image(path: Path, preparation: Preparation) -> np.ndarray:
    """One image, uint8 (height, width, 1 or 3)."""
    with _opened(path) as image:
        grey = image.mode in _GREY
        array = np.asarray(preparation.fit(image.convert("L" if grey else "RGB")))
    return array[..., None] if grey else array


def _mode(path: Path) -> str:
    with _opened(path) as image:
        return image.mode


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.mode not in _GREY + _COLOUR:
                raise InputError(f"{path}: pixels of kind {image.mode}, expected 8 bits a channel")
            yield image
    except InputError:
        raise
    except Exception as error:  # a damaged file fails in any way it likes
        raise InputError(f"{path}: not a readable image ({one_line(error)})") from error
