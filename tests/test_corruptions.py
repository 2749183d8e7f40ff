"""The corruptions: deterministic, of the right strength, and the official arrays where they are."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from lossgeometry import InputError
from models.data.arrays import official_corruptions
from models.data.corruptions import (
    _TABLE,
    CORRUPTIONS,
    SEVERITIES,
    contact_sheet,
    corrupt,
    corrupted_dataset,
)
from models.data.datasets import ImageDataset


def photographs(n=4, size=32, channels=3):
    """Smooth coloured blobs with an edge in each."""
    rows, columns = np.mgrid[:size, :size] / size
    images = np.empty((n, size, size, channels))
    for i in range(n):
        for c in range(channels):
            images[i, ..., c] = 0.5 + 0.35 * np.sin(5 * rows + i + c) * np.cos(6 * columns - c)
        images[i, size // 3 : size // 2, size // 4 :] = 0.15 * (i + 1)
    return np.uint8(np.rint(255 * images))


def test_fifteen_at_five_severities():
    assert len(CORRUPTIONS) == 15
    assert all(len(parameters) == SEVERITIES for parameters in _TABLE.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(32, 3), (8, 1)])
def test_changes_the_image_and_keeps_its_form(name, shape):
    images = photographs(4, *shape)
    original = images.copy()
    for severity in range(1, SEVERITIES + 1):
        corrupted = corrupt(images, name, severity)
        assert corrupted.shape == images.shape
        assert corrupted.dtype == np.uint8
        if (name, severity) not in (("jpeg_compression", 1), ("zoom_blur", 1)):  # on few pixels
            assert (corrupted != images).any()
        # What it shows is still there.
        assert np.corrcoef(corrupted.ravel(), images.ravel())[0, 1] > 0.3
    np.testing.assert_array_equal(images, original)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_same_seed_gives_the_same_image_however_many_there_are(name):
    images = photographs()
    whole = corrupt(images, name, 4, seed=5)
    np.testing.assert_array_equal(corrupt(images[:2], name, 4, seed=5), whole[:2])
    fixed = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    other = corrupt(images, name, 4, seed=6)
    assert (other == whole).all() == (name in fixed)


OTHERWISE = {"glass_blur", "elastic_transform", "snow", "frost", "pixelate"}


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in OTHERWISE])
def test_severity_grows(name):
    """But for those whose parameters, as published, trade one property for another."""
    images = photographs(8)
    distances = [
        np.abs(corrupt(images, name, s).astype(float) - images).mean()
        for s in range(1, SEVERITIES + 1)
    ]
    assert distances[4] > distances[2] > distances[0]


def test_known_values():
    grey = np.full((1, 32, 32, 3), 100, dtype=np.uint8)
    for name in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "pixelate", "contrast"):
        np.testing.assert_array_equal(corrupt(grey, name, 5), grey)
    np.testing.assert_array_equal(corrupt(grey, "brightness", 2), 100 + 26)
    noise = corrupt(grey, "gaussian_noise", 3).astype(float) - 100
    assert noise.std() == pytest.approx(0.08 * 255, rel=0.05)
    shot = corrupt(grey, "shot_noise", 5) / 255
    assert shot.var() == pytest.approx(100 / 255 / 50, rel=0.1)
    hit = corrupt(np.repeat(grey, 20, 0), "impulse_noise", 5) != 100
    assert hit.mean() == pytest.approx(0.07, abs=0.005)
    image = photographs(1)
    squeezed = corrupt(image, "contrast", 2).astype(float)
    expected = image.mean((1, 2), keepdims=True) / 2 + image / 2
    np.testing.assert_allclose(squeezed, expected, atol=0.51)
    colour = np.zeros((1, 4, 4, 3), dtype=np.uint8) + np.uint8([40, 80, 160])
    np.testing.assert_array_equal(corrupt(colour, "brightness", 5)[0, 0, 0], [59, 118, 236])


@pytest.mark.parametrize(("severity", "largest"), [(1, 6), (2, 11), (3, 15), (5, 25)])
def test_zooms_are_cropped_to_whole_pixels(severity, largest):
    """As the official arrays are: whole rows about the centre, magnified with both ends kept."""
    image = photographs(1)[0]
    mean = image / 255
    for percent in range(largest + 1):
        zoom = 1 + percent / 100
        kept = int(np.ceil(32 / zoom))
        rows = slice((32 - kept) // 2, (32 - kept) // 2 + kept)
        whole = ndimage.zoom(image[rows, rows] / 255, (zoom, zoom, 1), order=1)
        first = (len(whole) - 32) // 2
        mean = mean + whole[first : first + 32, first : first + 32]
    expected = np.rint(255 * mean / (largest + 2))
    np.testing.assert_array_equal(corrupt(image[None], "zoom_blur", severity)[0], expected)


def test_glass_leaves_the_first_two_rows_and_columns():
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    moved = (corrupt(images, "glass_blur", 1) != images).any(axis=(0, 3))
    assert not moved[:2].any()
    assert not moved[:, :2].any()
    assert moved[2:, 2:].all()


def test_fog_and_frost_are_not_one_flat_veil():
    black = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    white = black + np.uint8(255)
    assert corrupt(black, "frost", 5).std() > 10
    assert corrupt(white, "fog", 5).std() > 10
    assert corrupt(black, "fog", 5).max() == 0  # no brighter than the brightest point


def test_contact_sheet():
    sheet = contact_sheet(photographs(1)[0], seed=2)
    assert sheet.shape == (15, 6, 32, 32, 3)
    np.testing.assert_array_equal(sheet[:, 0], np.repeat(photographs(1), 15, axis=0))
    np.testing.assert_array_equal(
        sheet[3, 2], corrupt(photographs(1), CORRUPTIONS[3], 2, seed=2)[0]
    )


def cifar(n=6):
    images = torch.from_numpy(photographs(n))
    labels = torch.arange(n)
    classes = tuple(map(str, range(100)))
    return ImageDataset("cifar100", images, labels, classes, torch.zeros(3), torch.ones(3))


def test_official_arrays_are_used_where_they_are(tmp_path):
    folder = tmp_path / "CIFAR-100-C"
    assert official_corruptions("cifar100", tmp_path) is None
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    np.save(folder / "fog.npy", images)
    np.save(folder / "labels.npy", np.tile(np.arange(6, dtype=np.uint8), 5))
    assert official_corruptions("cifar100", tmp_path) == folder
    assert official_corruptions("digits", tmp_path) is None
    found = corrupted_dataset(cifar().first(4), "fog", 3, official=folder)
    np.testing.assert_array_equal(found.images, images[12:16])
    assert len(found) == 4

    with pytest.raises(InputError, match=r"snow.npy: not a readable array"):
        corrupted_dataset(cifar(), "snow", 1, official=folder)
    np.save(folder / "snow.npy", images[:7])
    with pytest.raises(InputError, match=r"snow.npy: uint8 \(7, 32, 32, 3\) found"):
        corrupted_dataset(cifar(), "snow", 1, official=folder)
    np.save(folder / "labels.npy", np.zeros(30, dtype=np.uint8))
    with pytest.raises(InputError, match=r"labels.npy: other labels than those of the test"):
        corrupted_dataset(cifar(), "fog", 1, official=folder)


def test_bad_input_is_refused():
    images = photographs(1)
    with pytest.raises(InputError, match="corruption: 'rain' found, expected one of gaussian_no"):
        corrupt(images, "rain", 1)
    with pytest.raises(InputError, match="severity: 6 found, expected 1 to 5"):
        corrupt(images, "fog", 6)
    with pytest.raises(InputError, match=r"images: float64 \(1, 32, 32, 3\) found"):
        corrupt(images / 1.0, "fog", 1)
