"""The analysis commands on models that are no CSANs, from a folder of images to the figures."""

import json
import re
import shutil
from pathlib import Path
from typing import get_args

import h5py
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

from analysis import claims, figures, hessian, landscape, nll, options, robustness
from analysis.measurements.recording import store, stored
from lossgeometry import Hessian
from lossgeometry.errors import InputError
from lossgeometry.operators.checking import Check
from models import load_dataset
from models.description import SCORES
from models.factory import build_model
from models.recipes import PRESETS
from models.train import Options, untrained

VIT = "timm:vit_tiny_patch16_224?img_size=16&patch_size=8&depth=1&embed_dim=12&num_heads=2"
CONV = "timm:convnext_atto?depths=(1,1,1,1)&dims=(4,4,8,8)&patch_size=1"
BATCHNORM = (
    "torchvision:mobilenet_v2?width_mult=0.25&inverted_residual_setting=[[1,16,1,1],[2,24,1,2]]"
    "&dropout=0.0"
)
SPECS = {"vit": VIT, "conv": CONV, "batchnorm": BATCHNORM}
SMALL = {
    hessian: "--k 1 --batches 2 --batch-size 4 --density-batches 1 --probes 2 --steps 2",
    landscape: "--batches 1 --batch-size 4 --points 3 --line-points 5 --lines 2",
    nll: "",
    robustness: "--images 4",
}
GROUPS = {
    hessian: "hessian/train",
    landscape: "landscape/train",
    nll: "outcomes",
    robustness: "robustness",
}


ODD = """
import torchvision
from torch import nn

class Pair(nn.Linear):
    def forward(self, x): return super().forward(x.flatten(1)), x

class Sampled(nn.Linear):
    def forward(self, x):
        scores = super().forward(x.flatten(1))[..., None, None]
        boxes = [scores.new_zeros(1, 4)] * len(x)
        return torchvision.ops.roi_align(scores, boxes, 1).flatten(1)

def model(): return Pair(768, 2)
def once(): return Sampled(768, 2)
def norm(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 2), nn.BatchNorm1d(2))
"""
ODD_SPECS = {
    "odd": "torch.nn:Linear?in_features=768&out_features=2",  # the weights of odd:model
    "once": "odd:once",
    "norm": "odd:norm",
}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with images of two classes and the weights of three models, and of odd ones."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for split, n in (("train", 8), ("test", 3)):
        for name in ("cat", "dog"):
            place = folder / "pets" / split / name
            place.mkdir(parents=True)
            for i in range(n):
                image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(image).save(place / f"{i}.png")
    with h5py.File(folder / "large", "w") as file:
        for split in ("train", "test"):
            file[f"{split}/images"] = np.zeros((4, 24, 24, 3), np.uint8)
            file[f"{split}/labels"] = [0, 1, 0, 1]
    (folder / "odd.py").write_text(ODD)
    torch.manual_seed(1)  # not that of the weights that a test draws
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, spec in (SPECS | ODD_SPECS).items():
            model = build_model(spec, classes=2, channels=3)
            torch.save({"state_dict": model.state_dict()}, f"{name}.pt")
    return folder


@pytest.fixture
def here(template, tmp_path, monkeypatch):
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own(name, *more):
    return ["--model", SPECS[name], "--ckpt", f"{name}.pt", "--dataset", "pets", *more]


@pytest.mark.parametrize("name", SPECS)
def test_every_command_measures_any_model(here, unrendered, call_module, name):
    model = SPECS[name].partition(":")[2].partition("?")[0]
    for module, arguments in SMALL.items():
        code, out, err = call_module(module, *own(name), *arguments.split())
        assert code == 0, err
        assert model in out
        with h5py.File(f"{name}.h5") as file:
            checkpoint = json.loads(file[GROUPS[module]].attrs["checkpoint"])
        assert checkpoint["architecture"] == {"model": SPECS[name]}
        if module in (hessian, landscape):
            assert "measuring NLL without augmentation, weight decay 0:" in out
            assert "NLL on unaugmented train images" in out
        again = call_module(module, *own(name), *arguments.split())[1]
        assert ("is there already" in again) == (module is not nll)
    code, _, err = call_module(claims, "--measurements", ".")
    assert code == 2
    assert "no trained network" in err


def test_batchnorm_normalises_over_the_mini_batch_in_training_only(here, unrendered, call_module):
    for objective, mode in (("train", "train"), ("clean", "eval")):
        call_module(
            landscape, *own("batchnorm"), *SMALL[landscape].split(), "--objective", objective
        )
        with h5py.File("batchnorm.h5") as file:
            group = file[f"landscape/{objective}"]
            attributes = json.loads(group["line/settings"][()].tobytes())
            at_the_weights = group["line/nll"][2]
        assert attributes["mode"] == mode
        model = build_model(BATCHNORM, classes=2, channels=3)
        model.load_state_dict(torch.load("batchnorm.pt")["state_dict"])
        ours = options.CheckpointOptions(model=BATCHNORM, dataset="pets")
        (checkpoint,) = ours.describe([Path("batchnorm.pt")])
        objective = hessian.Options(objective=objective, batch_size=4).build(checkpoint, 1)
        ((x, y),) = objective.batches
        expected = objective.loss(model.train(mode == "train")(x), y)
        assert at_the_weights == pytest.approx(expected.item(), rel=1e-5)


def test_statistics_are_recalibrated_and_bfloat16_is_used_where_asked(
    here, unrendered, call_module
):
    arguments = [*own("batchnorm"), *SMALL[landscape].split(), "--objective", "clean"]
    losses = []
    for extra, batchnorm, precision in (
        ((), "kept", "float32"),
        (("--recalibrate",), "recalibrated", "float32"),
        (("--bf16",), "kept", "bfloat16"),
    ):
        for again in (False, True):
            force = [] if again else ["--force"]  # in place of the one before
            code, out, err = call_module(landscape, *arguments, *extra, *force)
            assert code == 0, err
            assert ("is there already" in out) == again
        with h5py.File("batchnorm.h5") as file:
            group = file["landscape/clean"]
            for part in ("line", "test_line", "surface"):
                found = json.loads(group[f"{part}/settings"][()].tobytes())
                assert (found["batchnorm"], found["precision"]) == (batchnorm, precision)
            losses.append(group["line/nll"][2])
    assert len(set(losses)) == 3
    code, _, err = call_module(landscape, *own("vit"), *SMALL[landscape].split(), "--recalibrate")
    assert code == 2
    assert "vit.pt has no BatchNorm with running statistics under --objective train" in err


def test_a_hessian_that_fails_its_check_is_refused(here, call_module, monkeypatch):
    monkeypatch.setattr(Hessian, "check", lambda self: Check(1e-7, 1e-3, 3e-4))
    for extra, advice in (((), "--float64"), (("--float64",), "another version of PyTorch")):
        code, _, err = call_module(hessian, *own("batchnorm", *SMALL[hessian].split(), *extra))
        assert code == 2
        assert err.endswith(f"expected at most 3.0e-04; try {advice}\n")
    assert not Path("batchnorm.h5").exists()


def test_no_history_is_of_a_model_without_one(here):
    given = options.CheckpointOptions(model=VIT, dataset="pets").describe([Path("vit.pt")])[0]
    scores = dict.fromkeys(("epoch", *SCORES), np.zeros(1))
    with pytest.raises(InputError, match="window: None is not usable"):
        store("history", scores, checkpoint=given, options={})


def test_the_objective_is_that_of_the_preset(here):
    common = dict(model=VIT, dataset="pets")
    for given, decay, augmented in (
        (dict(preset="cifar10"), 0.05, True),
        (dict(preset="cifar10", weight_decay=0.1), 0.1, True),
        (dict(weight_decay=0.1), 0.1, False),
        (dict(), 0.0, False),
    ):
        chosen = options.MeasurementOptions(**common, **given)
        objective = chosen.build(chosen.describe([Path("vit.pt")])[0], 3)
        assert objective.weight_decay == decay
        targets = torch.cat([y for _, y in objective.batches])
        assert ((targets > 0) & (targets < 1)).any() == augmented
        smoothing = PRESETS["cifar10"].recipe.label_smoothing if augmented else 0.0
        assert objective.loss.keywords == {"label_smoothing": smoothing}


def test_presets_of_the_command_line_are_those_of_the_recipes():
    assert set(get_args(options.Preset)) == set(PRESETS)


def nll_as_timm_prepares(model, size, **config):
    """Of each test image, prepared by timm itself."""
    transform = timm.data.create_transform((3, size, size), **config)
    paths = sorted(Path("pets/test").glob("*/*.png"))
    inputs = torch.stack([transform(Image.open(path)) for path in paths])
    labels = torch.tensor([int(path.parent.name == "dog") for path in paths])
    with torch.no_grad():
        return F.cross_entropy(model.eval()(inputs), labels, reduction="none").tolist()


def test_images_are_prepared_as_the_model_says_or_as_given(here, unrendered, call_module):
    """By every command; what was measured with another preparation does not count as stored."""
    torch.manual_seed(0)
    for i, path in enumerate(sorted(Path("pets").rglob("*.png"))):
        Image.open(path).resize((20 + 3 * i % 11, 20 + i % 7)).save(path)
    model = build_model(CONV, classes=2, channels=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save(model.state_dict(), "conv.pt")
    cases = {
        "of 16 x 16; normalised by mean 0.485 0.456 0.406, std 0.229 0.224 0.225, as timm's": (
            ["--image-size", "16"],
            (16, dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))),
        ),
        "of 12 x 12; normalised by mean 0.3 0.3 0.3, std 0.5 0.5 0.5, as given": (
            ["--image-size", "12", "--mean", "0.3", "--std", "0.5"],
            (12, dict(mean=(0.3, 0.3, 0.3), std=(0.5, 0.5, 0.5))),
        ),
    }
    for line, (arguments, (size, normalised)) in cases.items():
        expected = nll_as_timm_prepares(
            model, size, crop_pct=0.875, interpolation="bicubic", **normalised
        )
        for module, small in SMALL.items():
            words = small.replace("4", "6").split()  # all six test images at once
            code, out, err = call_module(module, *own("conv", *arguments), *words)
            assert code == 0, err
            assert line in out
            assert "is there already" not in out
        with h5py.File("conv.h5") as file:
            nlls = file["outcomes/test/nll"][()]
            mean = file["landscape/train/test_line/nll"][2]
        np.testing.assert_allclose(sorted(nlls), sorted(expected), rtol=1e-4)
        assert mean == pytest.approx(np.mean(expected), rel=1e-4)
        words = SMALL[hessian].replace("4", "6").split()
        out = call_module(hessian, *own("conv", *arguments), *words)[1]
        assert "is there already" in out


def test_without_a_model_that_says_so_images_have_the_statistics_of_their_own(here, call_module):
    code, out, err = call_module(nll, *own("batchnorm"))
    assert code == 0, err
    assert "those of the training images; --mean and --std name the model's own" in out
    found = load_dataset("pets")
    for name, numbers in (("mean", found.mean), ("std", found.std)):
        assert f"{name} " + " ".join(f"{n:.4g}" for n in numbers.tolist()) in out


@pytest.mark.parametrize(
    "change",
    [
        dict(mean=(0.1,), std=(1.0,)),
        dict(image_size=16),
        dict(weight_decay=0.1),
        dict(preset="cifar10"),
        dict(dataset="other"),
        dict(model=VIT + "&class_token=True"),
    ],
)
def test_what_was_measured_otherwise_is_not_taken_for_the_same(here, change):
    Path("other").symlink_to("pets")
    given = dict(model=VIT, dataset="pets")
    load = [options.MeasurementOptions(**(given | c)).describe for c in ({}, {}, change)]
    first, same, other = (open_([Path("vit.pt")])[0] for open_ in load)
    store("x", {"array": np.ones(2)}, checkpoint=first, options={})
    assert stored("x", checkpoint=same, options={}) is not None
    assert stored("x", checkpoint=other, options={}) is None


def test_other_checkpoints_and_snapshots_are_of_the_same_model(here, unrendered, call_module):
    Path("vit").mkdir()
    for i in range(3):
        torch.save(build_model(VIT, classes=2, channels=3).state_dict(), f"vit/epoch{i}.pt")
    small = SMALL[landscape].split()
    for extra in (["pca"], ["plane", "--towards", "vit/epoch0.pt", "vit/epoch1.pt"]):
        code, _, err = call_module(landscape, *own("vit"), *small, "--directions", *extra)
        assert code == 0, err
    with h5py.File("vit.h5") as file:
        assert len(file["landscape_pca/train/cut/points"]) == 4


def test_own_models_and_csans_do_not_share_a_figure(here, call_module, unrendered):
    """Nor does one of them rename what is drawn of the other."""
    start = untrained(Options(out="x.pt", window=3, dim=6, depth=1), load_dataset("digits"))
    names = ("train_nll", "train_error", "test_nll", "test_error")
    start.history.update(epoch=[0.0], **{name: [0.5] for name in names})
    object.__setattr__(start, "epoch", start.recipe.epochs)
    start.save(Path("checkpoints/csan3.pt"))
    spec = VIT.replace("img_size=16&patch_size=8", "img_size=8&patch_size=4")
    for name in ("a", "b"):
        torch.save(build_model(spec, classes=10, channels=1).state_dict(), f"checkpoints/{name}.pt")
    weights = ["--ckpt", "checkpoints/a.pt", "checkpoints/b.pt"]
    assert call_module(nll)[0] == 0
    shown = {path.name for path in Path("figures").iterdir()}
    for module, arguments in SMALL.items():
        given = ["--model", spec, "--dataset", "digits", *weights, *arguments.split()]
        code, out, err = call_module(module, *given)
        assert code == 0, err
        written = {Path(line.split()[-1]) for line in out.splitlines() if line.startswith("wrote")}
        assert all(path.exists() for path in written)
        assert bool(written) == (module is not nll)
        shown |= {path.name for path in written}
    code, out, err = call_module(figures, "--out", "again")
    assert code == 0, err
    drawn = {path.name for path in Path("again").iterdir()}
    assert drawn >= {name for name in shown if "claims" not in name}
    assert drawn >= {
        "hessian_digits_a_b.png",
        "landscape_digits_a_b_contours.png",
        "robustness_digits_a_b.png",
    }
    code, out, _ = call_module(claims)
    assert code == 0
    assert "Claims on digits\n" in re.sub(" +\n", "\n", out)


BAD = {
    "no dataset": ("--model {vit} --ckpt vit.pt", "dataset: none given, expected what --model"),
    "no weights": ("--model {vit} --dataset pets", "ckpt: none given, expected the weights"),
    "no model": ("--ckpt vit.pt --dataset pets", "dataset: pets found, .* expected --model, too"),
    "mean alone": ("--ckpt vit.pt --mean 0.5", "mean: .0.5,. found, .* expected --model, too"),
    "size alone": ("--ckpt vit.pt --image-size 8", "image-size: 8 found, .* expected --model, too"),
    "no std": ("--model {vit} --ckpt vit.pt --dataset pets --mean 0.5", "std: 0 numbers found"),
    "two channels": (
        "--model {vit} --ckpt vit.pt --dataset pets --mean 0.5 0.5 --std 1 1",
        "mean: 2 numbers found, expected 1 or the 3 of the channels of pets",
    ),
    "pixels to 255": (
        "--model {vit} --ckpt vit.pt --dataset pets --mean 124 --std 58",
        "mean: 124.0 is not usable, expected a number from 0 to 1",
    ),
    "no folder": (
        "--model {vit} --ckpt vit.pt --dataset large --image-size 16",
        "image-size: large found, expected a folder of images",
    ),
    "no size": (
        "--model {vit} --ckpt vit.pt --dataset pets --image-size 0",
        "image-size: 0 is not usable, expected at least 1",
    ),
    "preset alone": (
        "--ckpt vit.pt --preset digits",
        "preset: digits found, .* expected --model, too",
    ),
    "decay alone": (
        "--ckpt vit.pt --weight-decay 1",
        "weight-decay: 1.0 found, .* expected --model, too",
    ),
    "unknown preset": ("--preset none", "'none'.*--preset"),
    "negative decay": (
        "--model {vit} --ckpt vit.pt --dataset pets --weight-decay -1",
        "weight-decay: -1.0 found, expected 0 or more",
    ),
    "unknown dataset": ("--model {vit} --ckpt vit.pt --dataset none", "dataset: none is neither"),
    "another spec": (
        "--model {conv} --ckpt vit.pt --dataset pets",
        "vit.pt: .* have other names|does not fit",
    ),
    "other classes": ("--model {vit} --ckpt vit.pt --dataset digits", "vit.pt: does not fit the"),
    "other size": (
        "--model {vit}&dynamic_img_size=False --ckpt vit.pt --dataset large",
        "model: it fails on images of shape 4x3x24x24: Input height",
    ),
    "not scores": (
        "--model odd:model --ckpt odd.pt --dataset pets --batch-size 2",
        r"model: tuple comes out of images of shape 2x3x16x16, expected scores \(2, 2\)",
    ),
    "one image": (
        "--model odd:norm --ckpt norm.pt --dataset pets --batch-size 1",
        "model: it fails on images of shape 1x3x16x16: Expected more than 1 value per channel",
    ),
    "no second derivative": (
        "--model odd:once --ckpt once.pt --dataset pets --batch-size 2",
        "model: PyTorch has no second derivative of roi_align",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(here, call_module, case):
    arguments, complaint = BAD[case]
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    code, _, err = call_module(hessian, *arguments.format(**SPECS).split(), *["--batches", "4"])
    assert code == 2
    assert re.fullmatch(f"error: [^\n]*({complaint})[^\n]*\n", err), err
    after = {p: p.read_bytes() for p in here.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert after == before


def test_weights_alone_have_no_history(here, call_module):
    code, _, err = call_module(nll, *own("vit", "--history-only"))
    assert (code, err) == (
        2,
        "error: history-only: the weights of --model have no history, leave it out\n",
    )
