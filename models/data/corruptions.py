"""The common corruptions of Hendrycks and Dietterich (ICLR 2019), for images as small as CIFAR's.

Fifteen corruptions, each at five severities. The severities are those that made CIFAR-10-C and
CIFAR-100-C (``make_cifar_c.py`` of https://github.com/hendrycks/robustness); Python packages of
corruptions carry those of ImageNet-C, which are far too strong for 32 x 32 pixels. Who has the
official arrays puts them into ``CIFAR-100-C/`` (or ``CIFAR-10-C/``) of the data folder, and they
are used. What is made here differs from them in one corruption and in details: frost is a generated
texture instead of crops of photographs, and values are not rounded to 8 bits halfway. Zooms crop
whole pixels, of which 8 x 8 images have so few that zoom_blur of severity 1 changes nothing.

Lengths are in pixels, except for elastic_transform and zoom_blur, which are relative to the image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from scipy import ndimage

from lossgeometry.errors import InputError
from lossgeometry.seeds import derive_seed

if TYPE_CHECKING:
    from models.data.datasets import ImageDataset

SEVERITIES = 5
Generator = np.random.Generator

# Every function takes an image, float64 (height, width, channels) in [0, 1], the parameters of a
# severity, and a generator; what it returns is clipped to [0, 1].


def gaussian_noise(x: np.ndarray, scale: float, rng: Generator) -> np.ndarray:
    """Add noise of the sensor."""
    return x + rng.normal(0, scale, x.shape)


def shot_noise(x: np.ndarray, photons: float, rng: Generator) -> np.ndarray:
    """Count photons, so many for white."""
    return rng.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Set a share of all values to 0 or 1."""
    hit, salt = rng.random((2, *x.shape))
    return np.where(hit < share, salt < 0.5, x)


def defocus_blur(x: np.ndarray, shape: tuple[float, float], rng: Generator) -> np.ndarray:
    """Convolve with a disc, whose edge is softened."""
    radius, softness = shape
    axis = np.arange(-3, 4)
    disc = (axis**2 + axis[:, None] ** 2 <= radius**2).astype(float)
    kernel = ndimage.gaussian_filter(disc / disc.sum(), softness, radius=1, mode="constant")
    return ndimage.convolve(x, (kernel / kernel.sum())[..., None], mode="mirror")


def glass_blur(x: np.ndarray, shape: tuple[float, int], rng: Generator) -> np.ndarray:
    """Blur, take every pixel from itself or a neighbour above or to the left, blur.

    The official code means to swap the two, but copies, and leaves the first two rows and columns
    where they are; so does this.
    """
    sigma, rounds = shape
    x = _blur(x, sigma)
    for _ in range(rounds):
        steps = rng.integers(0, 2, (2, *x.shape[:2]))
        steps[:, :2] = steps[:, :, :2] = 0
        rows, columns = np.indices(x.shape[:2]) - steps
        x = x[rows, columns]
    return _blur(x, sigma)


def motion_blur(x: np.ndarray, shape: tuple[int, float], rng: Generator) -> np.ndarray:
    """Smear along a line within 45 degrees of the horizontal."""
    return _smear(x, *shape, angle=rng.uniform(-45, 45))


def zoom_blur(x: np.ndarray, largest: float, rng: Generator) -> np.ndarray:
    """Average over zooms from 1 to the largest, in steps of 1 %, and the image itself."""
    zooms = 1 + np.arange(round((largest - 1) * 100) + 1) / 100
    return (x + sum(_zoom(x, zoom) for zoom in zooms)) / (len(zooms) + 1)


def snow(x: np.ndarray, shape: tuple[float, ...], rng: Generator) -> np.ndarray:
    """Whiten, and add flakes that fall in two directions."""
    mean, spread, zoom, least, radius, sigma, kept = shape
    flakes = _zoom(rng.normal(mean, spread, (*x.shape[:2], 1)), zoom)
    flakes = np.clip(np.where(flakes < least, 0, flakes), 0, 1)
    flakes = _smear(flakes, int(radius), sigma, angle=rng.uniform(-135, -45))
    white = np.maximum(x, 1.5 * _grey(x) + 0.5)
    return kept * x + (1 - kept) * white + flakes + np.rot90(flakes, 2)


def frost(x: np.ndarray, shares: tuple[float, float], rng: Generator) -> np.ndarray:
    """Overlay ice: pale needles in three directions 60 degrees apart, in a cloud."""
    of_image, of_ice = shares
    height, width, channels = x.shape
    crystals = (rng.random((3, height, width, 1)) < 0.02).astype(float)
    first = rng.uniform(0, 360)
    needles = [_smear(c, 6, 6, angle=first + 60 * i) for i, c in enumerate(crystals)]
    cloud = _plasma(max(height, width), 1.5, rng)[:height, :width, None]
    ice = np.minimum(0.25 + 0.5 * cloud + 3 * np.max(needles, axis=0), 1)
    tint = np.array([0.85, 0.93, 1]) if channels == 3 else 1
    return of_image * x + of_ice * ice * tint


def fog(x: np.ndarray, shape: tuple[float, float], rng: Generator) -> np.ndarray:
    """Add a cloud, and keep the brightness of the brightest point."""
    density, decay = shape
    height, width = x.shape[:2]
    cloud = _plasma(max(height, width), decay, rng)[:height, :width, None]
    return (x + density * cloud) * x.max() / max(x.max() + density, 1e-12)


def brightness(x: np.ndarray, step: float, rng: Generator) -> np.ndarray:
    """Raise the value of HSV; hue and saturation stay."""
    value = x.max(axis=2, keepdims=True)
    raised = np.minimum(value + step, 1)
    return np.where(value > 0, x * raised / np.maximum(value, 1e-12), raised)


def contrast(x: np.ndarray, kept: float, rng: Generator) -> np.ndarray:
    """Shrink the distances from the mean of each channel."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return mean + kept * (x - mean)


def elastic_transform(x: np.ndarray, shape: tuple[float, ...], rng: Generator) -> np.ndarray:
    """Move three points at random, and then every pixel along a smooth random field.

    Each interpolates, as in the official code.
    """
    height, width = x.shape[:2]
    strength, sigma, jitter = (length * min(height, width) for length in shape)
    centre, reach = np.array([height, width]) // 2, min(height, width) // 3
    corners = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + rng.uniform(-jitter, jitter, (3, 2))
    ones = np.ones((3, 1))
    back = np.linalg.solve(np.hstack([moved, ones]), corners)  # (3, 2), where a pixel comes from
    field = ndimage.gaussian_filter(
        rng.uniform(-1, 1, (2, height, width)), (0, sigma, sigma), truncate=3
    )
    pixels = np.mgrid[:height, :width]
    rows_and_columns = np.stack([*pixels, np.ones((height, width))], axis=2) @ back
    for sources, border in (
        (rows_and_columns.transpose(2, 0, 1), "mirror"),
        (pixels + strength * field, "reflect"),
    ):
        channels = [
            ndimage.map_coordinates(c, sources, order=1, mode=border) for c in x.transpose(2, 0, 1)
        ]
        x = np.stack(channels, axis=2)
    return x


def pixelate(x: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    """Shrink, and magnify again."""
    height, width = x.shape[:2]
    small = (max(int(width * share), 1), max(int(height * share), 1))
    image = _to_pillow(x).resize(small, Image.Resampling.BOX)
    return _from_pillow(image.resize((width, height), Image.Resampling.BOX), x.shape)


def jpeg_compression(x: np.ndarray, quality: int, rng: Generator) -> np.ndarray:
    """Compress as JPEG."""
    with io.BytesIO() as file:
        _to_pillow(x).save(file, "JPEG", quality=quality)
        return _from_pillow(Image.open(file), x.shape)


_TABLE: dict[Callable[..., np.ndarray], tuple[Any, ...]] = {
    gaussian_noise: (0.04, 0.06, 0.08, 0.09, 0.10),
    shot_noise: (500, 250, 100, 75, 50),
    impulse_noise: (0.01, 0.02, 0.03, 0.05, 0.07),
    defocus_blur: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    glass_blur: ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)),
    motion_blur: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    zoom_blur: (1.06, 1.11, 1.15, 1.20, 1.25),  # rounding keeps the end of the first two ranges
    snow: (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    frost: ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    fog: ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    brightness: (0.05, 0.1, 0.15, 0.2, 0.3),
    contrast: (0.75, 0.5, 0.4, 0.3, 0.15),
    elastic_transform: (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    ),
    pixelate: (0.95, 0.9, 0.85, 0.75, 0.65),
    jpeg_compression: (80, 65, 58, 50, 40),
}
_FUNCTIONS = {function.__name__: function for function in _TABLE}
CORRUPTIONS = tuple(_FUNCTIONS)


def corrupt(images: np.ndarray, name: str, severity: int, *, seed: int = 0) -> np.ndarray:
    """Corrupt images.

    Parameters
    ----------
    images : uint8 (N, height, width, 1 or 3) array
    name : str
        One of `CORRUPTIONS`.
    severity : int
        1 to 5.
    seed : int
        Image i is corrupted in the same way whatever the number of images.

    Returns
    -------
    uint8 array of the same shape

    Raises
    ------
    InputError
        If the corruption or its severity is unknown, or the images are not as above.
    """
    if name not in _FUNCTIONS:
        raise InputError(f"corruption: {name!r} found, expected one of {', '.join(CORRUPTIONS)}")
    if not 1 <= severity <= SEVERITIES:
        raise InputError(f"severity: {severity} found, expected 1 to {SEVERITIES}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise InputError(
            f"images: {images.dtype} {images.shape} found, expected uint8 "
            "(N, height, width, 1 or 3) to corrupt"
        )
    function, which = _FUNCTIONS[name], CORRUPTIONS.index(name)
    parameters = _TABLE[function][severity - 1]
    corrupted = np.empty_like(images)
    for i, image in enumerate(images):
        rng = np.random.default_rng(derive_seed(seed, which, severity, i))
        x = function(image / 255, parameters, rng)
        corrupted[i] = np.rint(255 * np.clip(x, 0, 1))
    return corrupted


def corrupted_dataset(
    dataset: ImageDataset,
    name: str,
    severity: int,
    *,
    official: Path | None = None,
    seed: int = 0,
) -> ImageDataset:
    """A test set under a corruption: generated, or the first so many of the `official` images.

    Raises
    ------
    InputError
        If the official arrays are unreadable or are not those of this dataset.
    """
    import torch

    if official is None:
        images = corrupt(dataset.images.numpy(), name, severity, seed=seed)
        return replace(dataset, images=torch.from_numpy(images))
    try:
        images, labels = (np.load(official / f"{f}.npy", mmap_mode="r") for f in (name, "labels"))
    except (OSError, ValueError) as error:
        raise InputError(f"{official / name}.npy: not a readable array ({error})") from error
    per_severity = len(labels) // SEVERITIES
    start, shape = (severity - 1) * per_severity, tuple(dataset.images.shape[1:])
    if images.shape != (len(labels), *shape) or images.dtype != np.uint8:
        raise InputError(
            f"{official / name}.npy: {images.dtype} {images.shape} found, expected uint8 "
            f"{(len(labels), *shape)}, {SEVERITIES} severities one after another"
        )
    own = labels[start : start + len(dataset)].astype(np.int64)
    if not np.array_equal(own, dataset.labels):
        raise InputError(
            f"{official / 'labels'}.npy: other labels than those of the test images of "
            f"{dataset.name}, expected the same images in the same order"
        )
    return replace(dataset, images=torch.from_numpy(np.array(images[start : start + len(own)])))


def contact_sheet(image: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """One (h, w, channels) image as it is, and under everything: (15, 1 + 5, h, w, channels)."""
    severities = range(1, SEVERITIES + 1)
    return np.stack(
        [
            np.concatenate(
                [image[None], *(corrupt(image[None], name, s, seed=seed) for s in severities)]
            )
            for name in CORRUPTIONS
        ]
    )


def _grey(x: np.ndarray) -> np.ndarray:
    """Luma (ITU-R BT.601) of an image, (height, width, 1)."""
    return x @ np.array([[0.299], [0.587], [0.114]]) if x.shape[2] == 3 else x


def _blur(x: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


@lru_cache
def _line(radius: int, sigma: float) -> np.ndarray:
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def _smear(x: np.ndarray, radius: int, sigma: float, *, angle: float) -> np.ndarray:
    """One-sided Gaussian along a line, as ImageMagick's motion blur; the angle is in degrees."""
    weights, steps = _line(radius, sigma), np.arange(2 * radius + 1)
    down = np.rint(steps * np.sin(np.radians(angle))).astype(int)
    right = np.rint(steps * np.cos(np.radians(angle))).astype(int)
    rows = np.clip(np.arange(x.shape[0]) + down[:, None], 0, x.shape[0] - 1)
    columns = np.clip(np.arange(x.shape[1]) + right[:, None], 0, x.shape[1] - 1)
    return np.tensordot(weights, x[rows[:, :, None], columns[:, None, :]], axes=1)


def _zoom(x: np.ndarray, zoom: float) -> np.ndarray:
    """Magnify what lies about the centre, to whole pixels as the official code crops."""
    for axis in (0, 1):
        size = x.shape[axis]
        kept = math.ceil(size / zoom)
        first = (size - kept) // 2
        magnified = _magnifier(kept, zoom)
        trimmed = (len(magnified) - size) // 2
        part = x.take(range(first, first + kept), axis)
        x = np.moveaxis(np.tensordot(magnified[trimmed : trimmed + size], part, (1, axis)), 0, axis)
    return x


@lru_cache(maxsize=128)
def _magnifier(size: int, zoom: float) -> np.ndarray:
    """Linear interpolation along one axis, both ends kept: (round(size * zoom), size)."""
    return np.asarray(ndimage.zoom(np.eye(size), (zoom, 1), order=1))


def _plasma(size: int, decay: float, rng: Generator) -> np.ndarray:
    """Cloud in [0, 1] by midpoint displacement on a torus (Fournier et al., 1982).

    Square, its side the next power of 2 of `size`; displacements shrink by `decay` squared from one
    scale to the next.
    """
    side = 1 << max(size - 1, 1).bit_length()
    field = np.zeros((side, side))
    step, amplitude = side, 1.0

    def midpoints(*corners: np.ndarray) -> np.ndarray:
        return sum(corners) / len(corners) + rng.uniform(-amplitude, amplitude, corners[0].shape)

    while step > 1:
        half = step // 2
        corners = field[::step, ::step]
        right, below = np.roll(corners, -1, 1), np.roll(corners, -1, 0)
        centres = midpoints(corners, right, below, np.roll(below, -1, 1))
        field[half::step, half::step] = centres
        field[::step, half::step] = midpoints(corners, right, centres, np.roll(centres, 1, 0))
        field[half::step, ::step] = midpoints(corners, below, centres, np.roll(centres, 1, 1))
        step, amplitude = half, amplitude / decay**2
    return (field - field.min()) / np.ptp(field)


def _to_pillow(x: np.ndarray) -> Image.Image:
    pixels = np.rint(255 * x).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if x.shape[2] == 1 else pixels)


def _from_pillow(image: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(image, dtype=float).reshape(shape) / 255
