"""Augmentation of whole batches against Pillow, timm and torchvision, image by image."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm
from timm.data import auto_augment
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from lossgeometry import InputError
from models import load_dataset
from models.data import randaugment
from models.data.augment import Augmentation
from models.data.datasets import ImageDataset
from models.data.randaugment import NONE, OPERATIONS, Operations
from models.recipes import PRESETS, Recipe

PAPER = PRESETS["paper-cifar100"].recipe
PLAIN = Recipe(epochs=1, warmup_epochs=0, learning_rate=1)
FILL = (129, 124, 112)
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def pictures(n, channels=3, height=32, width=32):
    """Uint8 (n, channels, height, width): noise, smooth, dark, of two levels, and of one."""
    random = torch.Generator().manual_seed(0)
    noise = torch.rand(n, channels, height, width, generator=random)
    smooth = F.interpolate(noise[:, :, :5, :5], (height, width), mode="bicubic").clamp(0, 1)
    noise[1::2] = smooth[1::2]
    noise[2::6] *= 0.2
    noise[-2] = noise[-2].round() * 0.4
    noise[-1] = 0.3
    return (noise * 255.99).to(torch.uint8)


def photographs(n):
    """A dataset of `pictures`, which are random, with CIFAR-100's statistics."""
    return ImageDataset(
        "pictures",
        pictures(n).permute(0, 2, 3, 1),
        torch.arange(n) % 10,
        tuple("abcdefghij"),
        torch.tensor((0.5071, 0.4867, 0.4408)),
        torch.tensor((0.2675, 0.2565, 0.2761)),
    )


def operation(name, levels, signs, bicubic):
    """One operation on each of n images."""
    kinds = torch.full((len(levels),), OPERATIONS.index(name))
    arguments = randaugment.arguments_of(kinds, levels, signs)
    return Operations(kinds[None], arguments[None], torch.full_like(kinds, bicubic)[None] > 0)


def as_pillow(image):
    return Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy())


def as_tensor(image):
    array = torch.from_numpy(np.array(image))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "bicubic"),
    [*((name, False) for name in OPERATIONS), *((name, True) for name in GEOMETRIC)],
)
def test_every_operation_is_timms_to_the_bit(monkeypatch, name, bicubic, channels):
    images = pictures(60, channels, 24, 32)
    # Posterize keeps no bit below a level of 2.5, and Pillow refuses that.
    levels = torch.linspace(2.5, 10, 60, dtype=torch.float64).roll(7)
    signs = torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64).repeat(20)
    fill = FILL[:channels]
    resampling = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    options = dict(img_mean=fill if channels == 3 else fill[0], interpolation=resampling)
    expected = []
    for image, level, sign in zip(images, levels.tolist(), signs.tolist(), strict=True):
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
        theirs = auto_augment.AugmentOp(name, prob=1.0, magnitude=level, hparams=options)
        expected.append(as_tensor(theirs(as_pillow(image))))
    ours = operation(name, levels, signs, bicubic)
    found = randaugment.apply(images, ours, torch.tensor(fill, dtype=torch.uint8))
    assert torch.equal(found, torch.stack(expected))
    changed = (found != images).flatten(1).any(1).float().mean()
    assert changed > 0.3 or (name, channels) == ("Color", 1)  # grey images have no colour


def sheared(image, x, y, interpolation):
    degrees = [math.degrees(math.atan(slope)) for slope in (x, y)]
    return functional.affine(image, 0.0, [0, 0], 1.0, degrees, interpolation, FILL, [0, 0])


def shifted(image, x, y, interpolation):
    return functional.affine(image, 0.0, [x, y], 1.0, [0.0, 0.0], interpolation, FILL)


# Of a uint8 tensor and the argument, and by how many levels its roundings may differ from Pillow's.
VALUES = {
    "AutoContrast": (lambda x, _: functional.autocontrast(x), 1),
    "Equalize": (lambda x, _: functional.equalize(x), 0),
    "Invert": (lambda x, _: functional.invert(x), 0),
    "Posterize": (lambda x, bits: functional.posterize(x, int(bits)), 0),
    "Solarize": (functional.solarize, 0),
    "Color": (functional.adjust_saturation, 1),
    "Contrast": (functional.adjust_contrast, 1),
    "Brightness": (functional.adjust_brightness, 1),
    "Sharpness": (functional.adjust_sharpness, 1),
}
# Of a Pillow image, the argument (of translations, which torchvision rounds, in pixels) and how.
MOVES = {
    "Rotate": lambda x, degrees, how: functional.rotate(x, degrees, how, fill=FILL),
    "ShearX": lambda x, slope, how: sheared(x, slope, 0, how),
    "ShearY": lambda x, slope, how: sheared(x, 0, slope, how),
    "TranslateXRel": lambda x, part, how: shifted(x, -round(32 * part), 0, how),
    "TranslateYRel": lambda x, part, how: shifted(x, 0, -round(32 * part), how),
}


@pytest.mark.parametrize("name", VALUES)
def test_operations_on_values_are_torchvisions(name):
    images = pictures(30)
    levels = torch.linspace(2.5, 9.9, 30, dtype=torch.float64)
    ours = operation(name, levels, torch.ones(30), False)
    found = randaugment.apply(images, ours, torch.tensor(FILL, dtype=torch.uint8))
    theirs, tolerance = VALUES[name]
    pairs = zip(images, ours.arguments[0].tolist(), strict=True)
    expected = torch.stack([theirs(*pair) for pair in pairs])
    assert (found.int() - expected.int()).abs().max() <= tolerance


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("name", MOVES)
def test_moves_are_torchvisions(name, bicubic):
    images = pictures(30)
    levels = torch.linspace(0, 10, 30, dtype=torch.float64)
    ours = operation(name, levels, (-1.0) ** torch.arange(30), bicubic)
    if "Translate" in name:
        ours = dataclasses.replace(ours, arguments=(32 * ours.arguments).round() / 32)
    found = randaugment.apply(images, ours, torch.tensor(FILL, dtype=torch.uint8))
    how = v2.InterpolationMode.BICUBIC if bicubic else v2.InterpolationMode.BILINEAR
    pairs = zip(images, ours.arguments[0].tolist(), strict=True)
    expected = torch.stack([as_tensor(MOVES[name](as_pillow(x), y, how)) for x, y in pairs])
    # Its shears are tan(atan(slope)): a last digit, which decides where a value is a whole number.
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (found != expected).float().mean() < 1e-3


def test_operations_are_drawn_as_the_recipe_says():
    n = 200_000
    drawn = randaugment.draw(n, 2, 9.0)
    counts = torch.stack([row.bincount(minlength=NONE + 1) for row in drawn.kinds]).double() / n
    torch.testing.assert_close(counts[:, NONE], torch.full((2,), 0.5).double(), rtol=0, atol=5e-3)
    each = torch.full((2, NONE), 1 / 30).double()
    torch.testing.assert_close(counts[:, :NONE], each, rtol=0, atol=2e-3)
    pairs = torch.stack([row == OPERATIONS.index("Rotate") for row in drawn.kinds])
    assert pairs.all(0).double().mean() == pytest.approx(1 / 900, abs=4e-4)  # with replacement
    assert drawn.bicubic.double().mean() == pytest.approx(0.5, abs=4e-3)
    degrees = drawn.arguments[drawn.kinds == OPERATIONS.index("Rotate")]
    assert (degrees > 0).double().mean() == pytest.approx(0.5, abs=0.02)
    for share in (0.02, 0.2, 0.5, 0.8):
        level = (degrees.abs() / 3).quantile(share).item()
        assert level == pytest.approx(norm.ppf(share, loc=9), abs=0.1)
    assert (degrees.abs() == 30).double().mean() == pytest.approx(0.1587, abs=0.02)


def test_images_change_as_often_and_as_much_as_timms():
    n = 3000
    images = pictures(n)
    options = dict(img_mean=FILL)
    theirs = auto_augment.rand_augment_transform("rand-m9-n2-mstd1.0", options)
    expected = torch.stack([as_tensor(theirs(as_pillow(image))) for image in images])
    found = randaugment.apply(
        images, randaugment.draw(n, 2, 9.0), torch.tensor(FILL, dtype=torch.uint8)
    )
    changes = [(x.float() - images.float()).abs().mean((1, 2, 3)) for x in (found, expected)]
    for ours, other in (changes, [(change > 0).float() for change in changes]):
        error = ((ours.var() + other.var()) / n).sqrt()
        assert abs(ours.mean() - other.mean()) < 4 * error


def in_turn(transform, dataset, indices):
    """What torchvision makes of one image after the other, and then of the mini-batch."""
    of_image, of_batch = transform
    images = dataset.images[indices].permute(0, 3, 1, 2)
    inputs = dataset.normalise(torch.stack([of_image(image) for image in images]))
    return of_batch(inputs, dataset.labels[indices])


@pytest.mark.parametrize("digits", [True, False])
def test_crops_and_mixtures_are_torchvisions_to_the_bit(digits):
    """Those of the digits, as when what is in the repository was measured, and of the paper."""
    dataset = load_dataset("digits") if digits else photographs(60)
    recipe = (
        PRESETS["digits"].recipe
        if digits
        else dataclasses.replace(PAPER, randaugment_ops=0, flip=False)
    )
    mixtures = [v2.MixUp(alpha=recipe.mixup, num_classes=10)]
    if recipe.cutmix:
        mixtures.append(v2.CutMix(alpha=recipe.cutmix, num_classes=10))
    size = dataset.images.shape[1:3]
    transform = v2.RandomCrop(size, recipe.crop_padding), v2.RandomChoice(mixtures)
    augment = Augmentation(recipe, dataset)
    for seed in range(20):
        indices = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        indices = indices[: 16 + seed]
        drawn = []
        for make in (augment, lambda own: in_turn(transform, dataset, own)):
            torch.manual_seed(seed)
            drawn.append((*make(indices), torch.get_rng_state()))
        assert torch.equal(drawn[0][0], drawn[1][0])
        torch.testing.assert_close(drawn[0][1], drawn[1][1], rtol=0, atol=0 if digits else 1e-6)
        assert torch.equal(drawn[0][2], drawn[1][2])


def test_the_old_randaugment_is_torchvisions_to_the_bit():
    recipe = dataclasses.replace(PRESETS["cifar100"].recipe, mixup=0.0)
    dataset = photographs(30)
    weights = torch.exp(-((torch.arange(11).double() - recipe.randaugment_magnitude) ** 2) / 2)
    operations = [v2.RandAugment(1, level, 11) for level in range(11)]
    transform = v2.Compose(
        [
            v2.RandomCrop(32, 4),
            v2.RandomHorizontalFlip(),
            v2.RandomChoice(operations, p=weights.tolist()),
        ]
    )
    indices = torch.arange(30)
    torch.manual_seed(0)
    expected = in_turn((transform, lambda x, y: (x, F.one_hot(y, 10).float())), dataset, indices)
    torch.manual_seed(0)
    found = Augmentation(recipe, dataset)(indices)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_several_mini_batches_at_once_are_those_one_by_one():
    for recipe in (PAPER, PRESETS["cifar100"].recipe, PLAIN):
        augment = Augmentation(recipe, photographs(60))
        torch.manual_seed(1)
        drawn = [augment.draw(torch.arange(start, start + 20)) for start in (0, 40, 10)]
        together = [whole.split(20) for whole in augment.apply(drawn)]
        for i, own in enumerate(drawn):
            for found, expected in zip(together, augment.apply([own]), strict=True):
                assert torch.equal(found[i], expected)


def test_what_is_beyond_the_border_is_the_mean_of_the_images():
    dataset = photographs(40)
    augment = Augmentation(dataclasses.replace(PAPER, mixup=0.0, cutmix=0.0), dataset)
    drawn = augment.draw(torch.arange(40))
    kinds = torch.full((2, 40), NONE)
    kinds[1] = OPERATIONS.index("TranslateXRel")
    moved = Operations(kinds, torch.full((2, 40), 0.45).double(), torch.zeros(2, 40) > 0)
    inputs, _ = augment.apply([dataclasses.replace(drawn, operations=moved)])
    step = 1 / 255 / dataset.std[:, None, None]
    assert (inputs[..., -14:].abs() <= step / 2 + 1e-6).all()


def test_randaugment_is_for_grey_and_coloured_images_only():
    dataset = photographs(8)
    double = dataclasses.replace(
        dataset, images=dataset.images.repeat(1, 1, 1, 2), mean=torch.rand(6), std=torch.rand(6)
    )
    with pytest.raises(InputError, match=r"dataset: 'pictures' .* 1 or 3 channels .* not 6"):
        Augmentation(PAPER, double)
    assert Augmentation(PLAIN, double)(torch.arange(8))[0].shape == (8, 6, 32, 32)
