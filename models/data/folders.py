"""Folders of images, ``SPLIT/CLASS/NAME.png``, as arrays in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from lossgeometry.errors import InputError, one_line

_NAMES = {"train": ("train",), "test": ("test", "val")}
_FORMAT = "expected train/CLASS/IMAGE and test/CLASS/IMAGE or val/CLASS/IMAGE"
_GREY, _COLOUR = ("1", "L"), ("P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "PA")


def read_folder(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images uint8 (N, height, width, channels), labels (N,) and classes of a split.

    The classes are the folders in ``train``, in the order of their names, as in torchvision's
    ``ImageFolder``; the images are in a fixed random order, so that the first so many are of all
    classes. There is one channel if all images are grey, otherwise there are three.

    Raises
    ------
    InputError
        If a folder is missing or holds no images, an image cannot be read, or images differ in
        size.
    """
    try:
        classes, indices = find_classes(str(_place(folder, "train")))
        place = _place(folder, split)
        unknown = {p.name for p in place.iterdir() if p.is_dir()} - set(classes)
        if unknown:
            raise InputError(
                f"{place}: the class {min(unknown)} is not in {folder / 'train'}, {_FORMAT}"
            )
        found = make_dataset(str(place), indices, IMG_EXTENSIONS, allow_empty=True)
    except FileNotFoundError as error:  # no class at all
        raise InputError(f"{folder / 'train'}: there are no folders in it, {_FORMAT}") from error
    if not found:
        raise InputError(f"{place}: there are no images in it, {_FORMAT}")
    found = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    images = [_read_image(Path(path)) for path, _ in found]
    for image, (path, _) in zip(images, found, strict=True):
        if image.shape[:2] != images[0].shape[:2]:
            raise InputError(
                f"{path}: {image.shape[1]} x {image.shape[0]} pixels, expected "
                f"{images[0].shape[1]} x {images[0].shape[0]} as in {found[0][0]}"
            )
    channels = max(image.shape[2] for image in images)
    arrays = np.stack([np.broadcast_to(i, (*i.shape[:2], channels)) for i in images])
    return arrays, np.array([label for _, label in found]), tuple(classes)


def _place(folder: Path, split: str) -> Path:
    for name in _NAMES[split]:
        if (folder / name).is_dir():
            return folder / name
    raise InputError(f"{folder}: there is no folder {' or '.join(_NAMES[split])}, {_FORMAT}")


def _read_image(path: Path) -> np.ndarray:
    """One image, uint8 (height, width, 1 or 3)."""
    try:
        with Image.open(path) as image:
            if image.mode not in _GREY + _COLOUR:
                raise InputError(f"{path}: pixels of kind {image.mode}, expected 8 bits a channel")
            grey = image.mode in _GREY
            array = np.asarray(image.convert("L" if grey else "RGB"))
    except InputError:
        raise
    except Exception as error:  # a damaged file fails in any way it likes
        raise InputError(f"{path}: not a readable image ({one_line(error)})") from error
    return array[..., None] if grey else array
