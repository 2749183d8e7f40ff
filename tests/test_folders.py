"""Folders of images: what is read, in which order, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from lossgeometry import InputError
from models import load_dataset
from models.data.arrays import form

CLASSES = ("cat", "dog", "eel")


def write(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)


@pytest.fixture
def folder(tmp_path):
    """Each image in one colour, twice its label or a little more."""
    for split, n in (("train", 9), ("val", 4)):
        for label, name in enumerate(CLASSES):
            for i in range(n):
                value = np.full((6, 5, 3), 80 * label + i, np.uint8)
                write(tmp_path / "pets" / split / name / f"{i}.png", value)
    return tmp_path / "pets"


@pytest.mark.parametrize(("split", "n"), [("train", 9), ("test", 4)])
def test_every_image_once_with_its_label(folder, split, n):
    found = load_dataset(folder, split)
    assert (found.name, found.classes) == ("pets", CLASSES)
    assert found.images.shape == (3 * n, 6, 5, 3)
    values = found.images[:, 0, 0, 0].tolist()
    assert [value // 80 for value in values] == found.labels.tolist()
    assert sorted(values) == [80 * label + i for label in range(3) for i in range(n)]
    assert (found.images == found.images[:, :1, :1, :1]).all()


def test_the_first_images_are_of_all_classes_and_always_the_same(folder):
    first = load_dataset(folder).first(9)
    assert set(first.labels.tolist()) == {0, 1, 2}
    assert (load_dataset(folder).first(9).images == first.images).all()


def test_statistics_are_those_of_the_training_images(folder):
    pixels = load_dataset(folder).images.double() / 255
    test = load_dataset(folder, "test")
    np.testing.assert_allclose(test.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(test.std, pixels.std((0, 1, 2), correction=0), rtol=1e-6)


def test_test_comes_before_val_and_needs_not_have_every_class(folder):
    write(folder / "test" / "eel" / "a.jpg", np.full((6, 5, 3), 7, np.uint8))
    test = load_dataset(folder, "test")
    assert (len(test), test.labels.tolist(), test.classes) == (1, [2], CLASSES)


def test_grey_images_have_one_channel_unless_there_are_coloured_ones(folder):
    for path in folder.rglob("*.png"):
        write(path, np.asarray(Image.open(path)), "L")
    grey = load_dataset(folder)
    assert grey.images.shape == (27, 6, 5, 1)
    write(folder / "train" / "cat" / "0.png", np.full((6, 5, 4), 200, np.uint8))  # RGBA
    coloured = load_dataset(folder)
    assert coloured.images.shape == (27, 6, 5, 3)
    changed = (coloured.images[..., 0] != grey.images[..., 0]).any((1, 2))
    assert changed.sum() == 1
    with pytest.raises(
        InputError, match=r"pets: images of shape \(6, 5, 1\) in test, expected \(6,"
    ):
        load_dataset(folder, "test")


def test_hidden_files_and_folders_are_not_looked_at(folder):
    before = load_dataset(folder).images, load_dataset(folder, "test").images
    for split in ("train", "val"):
        (folder / split / ".DS_Store").write_bytes(b"Mac")
        (folder / split / "cat" / "._0.png").write_bytes(b"Mac")  # of a file on another disk
        image = np.full((6, 5, 3), 250, np.uint8)
        write(folder / split / ".ipynb_checkpoints" / "0-checkpoint.png", image)
        write(folder / split / "dog" / ".ipynb_checkpoints" / "0-checkpoint.png", image)
    train, test = load_dataset(folder), load_dataset(folder, "test")
    assert train.classes == test.classes == CLASSES
    assert torch.equal(train.images, before[0])
    assert torch.equal(test.images, before[1])


def test_the_form_is_known_without_decoding(folder):
    assert form(folder) == (3, 3)
    path = folder / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:60])  # the header is whole
    assert form(folder) == (3, 3)
    for path in folder.rglob("*.png"):
        write(path, np.zeros((6, 5), np.uint8))
    assert form(f"{folder}?mean=0&std=1") == (3, 1)
    assert form("digits") == (10, 1)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: [p.rename(f / "none") for p in [f / "train"]], "there is no folder train"),
        (lambda f: [p.rename(f / "none") for p in [f / "val"]], "there is no folder test or val"),
        (lambda f: [p.unlink() for p in f.rglob("val/*/*.png")], "val: there are no images"),
        (
            lambda f: write(f / "train" / "dog" / "9.png", np.zeros((7, 5, 3), np.uint8)),
            "5 x [67] pixels, expected 5 x [67] as in .*; --image-size brings all images to one",
        ),
        (
            lambda f: write(f / "train" / "dog" / "9.png", np.zeros((6, 5), np.uint16)),
            "9.png: pixels of kind I;16, expected 8 bits",
        ),
        (lambda f: (f / "train/dog/0.png").write_bytes(b"text"), "0.png: not a readable image"),
        (
            lambda f: (f / "train/dog/0.png").write_bytes(
                (f / "train/dog/1.png").read_bytes()[:50]
            ),
            "0.png: not a readable image",
        ),
        (lambda f: (f / "val" / "fox").mkdir(), "the class fox is not in"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(folder, spoil, complaint):
    spoil(folder)
    with pytest.raises(InputError, match=complaint) as error:
        load_dataset(folder, "test")
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


def test_a_folder_without_classes_is_refused(tmp_path):
    write(tmp_path / "train" / "0.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(InputError, match="train: there are no folders in it, expected train/CLASS"):
        load_dataset(tmp_path)
