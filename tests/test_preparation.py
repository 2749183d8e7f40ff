"""Images are resized, cropped and normalised as torchvision and timm do to evaluate a network."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms._presets import ImageClassification

from analysis import nll
from lossgeometry import InputError
from models import load_checkpoint, load_dataset, train
from models.data.preparation import Preparation, parse, prepared

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.fixture
def folder(tmp_path):
    """Photographs, one might think, of many sizes."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("test", 5)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                height, width = rng.integers(9, 70, 2)
                image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(image).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def expected(folder, transform):
    """What another evaluation makes of the test images."""
    paths = sorted((folder / "test").glob("*/*.png"))
    return torch.stack([transform(Image.open(path)) for path in paths])


def in_order(dataset):
    """Inputs in an order that does not depend on that of the files."""
    return sorted(dataset.inputs.flatten(1).tolist())


def test_the_defaults_are_those_of_torchvision(folder):
    found = load_dataset(prepared(str(folder), 28, IMAGENET["mean"], IMAGENET["std"]), "test")
    theirs = expected(folder, ImageClassification(crop_size=28, resize_size=32))
    assert found.inputs.shape == theirs.shape == (10, 3, 28, 28)
    np.testing.assert_allclose(in_order(found), sorted(theirs.flatten(1).tolist()), atol=1e-6)


CONFIGS = {
    "bicubic": dict(crop_pct=0.9, interpolation="bicubic", crop_mode="center"),
    "no margin": dict(crop_pct=1.0, interpolation="bilinear", crop_mode="center"),
    "squash": dict(crop_pct=0.95, interpolation="bicubic", crop_mode="squash"),
    "padded": dict(crop_pct=1.15, interpolation="bicubic", crop_mode="center"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_a_model_of_timm_says_is_done_as_timm_does_it(folder, case):
    config = {**CONFIGS[case], **IMAGENET}
    name, own = parse(f"{folder}?image_size=20")
    found = load_dataset(own.completed(config, 3).spec(name), "test")
    theirs = expected(folder, timm.data.create_transform((3, 20, 20), **config))
    np.testing.assert_allclose(in_order(found), sorted(theirs.flatten(1).tolist()), atol=1e-6)


def test_what_is_given_comes_before_what_a_model_says():
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 4, 4, 4))
    given = Preparation(image_size=20, crop_pct=1, mean=(0.5,), std=(0.2,))
    found = given.completed(model.pretrained_cfg, 3)
    assert (found.crop_pct, found.mean, found.std) == (1, (0.5,), (0.2,))
    assert (found.interpolation, found.crop_mode) == ("bicubic", "center")
    assert Preparation().completed(model.pretrained_cfg, 3) == Preparation(**IMAGENET)
    assert Preparation().completed(model.pretrained_cfg, 1) == Preparation()  # of other images
    assert Preparation().completed(None, 3) == Preparation()


def test_a_spec_is_read_as_it_is_written():
    for preparation in (
        Preparation(),
        Preparation(image_size=20, crop_pct=0.9, interpolation="bicubic", crop_mode="squash"),
        Preparation(**IMAGENET),
        Preparation(image_size=8, mean=(0.5,), std=(0.25,)),
    ):
        assert parse(preparation.spec("a/b.h5")) == ("a/b.h5", preparation)
    assert prepared("a?image_size=8&mean=0.5&std=1.0", 9) == "a?image_size=9&mean=0.5&std=1.0"


def test_one_number_is_for_all_channels_and_other_datasets_have_it_too(folder):
    three, one = (
        load_dataset(f"{folder}?image_size=8&mean={mean}&std={std}", "test")
        for mean, std in ((".5,.5,.5", ".2,.2,.2"), (".5", ".2"))
    )
    assert torch.equal(three.inputs, one.inputs)
    digits = load_dataset("digits?mean=0&std=1")
    assert torch.equal(digits.inputs, digits.images.movedim(3, 1) / 255)
    assert digits.fingerprint != load_dataset("digits").fingerprint
    assert digits.name == "digits"


def test_a_network_is_trained_on_images_of_many_sizes(folder, tmp_path, call_module):
    """Its checkpoint says how they were brought to one, and nothing else has to."""
    small = ["--window", "3", "--dim", "6", "--depth", "1", "--epochs", "3", "--image-size", "16"]
    out = tmp_path / "csan.pt"
    code, _, err = call_module(train, "--dataset", str(folder), "--out", str(out), *small)
    assert code == 0, err
    found = load_checkpoint(out)
    assert found.dataset == f"{folder}?image_size=16"
    assert found.architecture["image_size"] == 16
    code, out, err = call_module(nll, "--ckpt", str(out), "--out", str(tmp_path / "figures"))
    assert code == 0, err
    assert f"/{folder.name} " in out


def test_a_folder_may_have_a_question_mark_in_its_name(folder):
    odd = folder.rename(folder.with_name("what?image_size=3"))
    with pytest.raises(InputError, match="--image-size brings all images to one size"):
        load_dataset(str(odd))


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("digits?image_size=8", "image-size: digits found, expected a folder of images"),
        ("digits?size=8", "dataset: 'size' found in 'digits.size=8', expected DATA.key=1"),
        ("digits?mean", "dataset: 'mean' found in 'digits.mean'"),
        ("digits?mean=0.5", "std: 0 numbers found, expected 1, as many as of mean"),
        ("digits?mean=.1,.2&std=1,1", "mean: 2 numbers found, expected 1 or the 1 of the channels"),
        ("digits?mean=120&std=1", "mean: 120 is not usable, expected a number from 0 to 1"),
        ("digits?mean=nan&std=1", "mean: 'nan' is not usable"),
        ("digits?mean=0&std=0", "std: 0 is not usable"),
        ("digits?crop_pct=0.9", "crop_pct: 0.9 is not usable, expected an image_size beside it"),
        ("x?image_size=0", "image-size: 0 is not usable"),
        ("x?image_size=8&crop_pct=0", "crop_pct: 0 is not usable"),
        ("x?image_size=8&interpolation=best", "interpolation: 'best' is not usable"),
        ("x?image_size=8&crop_mode=border", "crop_mode: 'border' is not usable"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(spec, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        load_dataset(spec)
    assert "\n" not in str(error.value)
