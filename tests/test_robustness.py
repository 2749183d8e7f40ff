"""Robustness under corruptions: the numbers, the storage, an interruption, and the figure."""

import re
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from analysis import robustness
from analysis.corrupted import measure_robustness
from analysis.drawing.robustness import draw_robustness, mean_corruption_error
from analysis.measurements.files import collect
from analysis.measurements.recording import Recording
from analysis.outcomes import outcomes
from lossgeometry.running.distributed import ALONE
from models import load_checkpoint, load_dataset
from models.data.corruptions import CORRUPTIONS, corrupt
from tests.teams import run_team

IMAGES = 24


@pytest.fixture
def here(here):
    """Checkpoints that are far from the indifference of the initialisation."""
    for path in Path("checkpoints").glob("*.pt"):
        checkpoint = load_checkpoint(path)
        with torch.no_grad():
            checkpoint.model.head.weight.mul_(20)
        checkpoint.save(path)
    return here


@pytest.fixture
def call(call_module):
    return partial(call_module, robustness, "--images", IMAGES)


def test_numbers_are_those_of_the_corrupted_images(here, call):
    code, out, _ = call("--contact-sheet")
    assert code == 0
    assert {line.split()[-1] for line in out.splitlines() if line.startswith("wrote")} == {
        "figures/robustness_digits.png",
        "figures/corruptions_digits.png",
    }
    test = load_dataset("digits", "test").first(IMAGES)
    model = load_checkpoint("checkpoints/csan3.pt").model
    with h5py.File("checkpoints/csan3.h5") as file:
        group = {key: array[()] for key, array in file["robustness"].items()}
        assert "unfinished" not in file or not file["unfinished"].keys()
    assert [name.decode() for name in group["corruptions"]] == list(CORRUPTIONS)
    for k, s in ((0, 0), (9, 4)):
        images = torch.from_numpy(corrupt(test.images.numpy(), CORRUPTIONS[k], s + 1))
        outputs = model(test.normalise(images.permute(0, 3, 1, 2)))
        assert group["nll"][k, s] == pytest.approx(F.cross_entropy(outputs, test.labels).item())
        wrong = outputs.argmax(1) != test.labels
        assert group["error"][k, s] == pytest.approx(wrong.double().mean().item())
    clean = model(test.inputs)
    assert group["clean_nll"] == pytest.approx(F.cross_entropy(clean, test.labels).item())
    np.testing.assert_allclose(group["wrong"].mean(0) / 5, group["error"].mean(1))
    np.testing.assert_allclose(group["image_error"].mean(), group["mean_corruption_error"])
    assert group["error"].shape == group["nll"].shape == (15, 5)

    before = Path("checkpoints/csan3.h5").read_bytes()
    code, out, _ = call()
    assert "csan3.h5:/robustness is there already; --force" in out
    assert Path("checkpoints/csan3.h5").read_bytes() == before


def test_interval_is_over_seeds_where_there_are_several(here, call, tmp_path):
    call()
    one, other = collect([Path("checkpoints")], "robustness")
    single = mean_corruption_error([one])
    assert single.n == IMAGES
    assert single.mean == pytest.approx(float(one.arrays["mean_corruption_error"]), rel=1e-6)
    assert mean_corruption_error([one, other]).n == 2
    assert [path.name for path in draw_robustness([one, other], tmp_path / "figures")] == [
        "robustness_digits.png"
    ]


def measured(team):
    """What a team makes of both checkpoints."""
    checkpoints = {
        Recording("robustness", checkpoint, {}, dict, team=team): checkpoint
        for checkpoint in (load_checkpoint(f"checkpoints/csan{window}.pt") for window in (3, 8))
    }
    images = load_dataset("digits")  # as many as give each process some
    ours = outcomes(next(iter(checkpoints.values())), images, "cpu", team)
    test = load_dataset("digits", "test").first(IMAGES)
    measure_robustness(checkpoints, test)
    return [recording.found.arrays for recording in checkpoints], ours


def test_a_team_finds_the_same(here, tmp_path):
    shared = run_team(3, measured, folder=tmp_path)
    for path in Path("checkpoints").glob("*.h5"):
        path.unlink()
    alone = measured(ALONE)
    assert alone[0][0]["error"].any()
    for found in shared:
        np.testing.assert_equal(found, alone)


def test_bad_input_is_one_line(here, call):
    for arguments, complaint in (
        (("--images", "9999"), "images: 9999 found, expected from 1 to the 360 of digits"),
        (("--images", "0"), "images: 0 found"),
        (("--ckpt", "none.pt"), "none.pt: there is no such file"),
        (("--seed", "-1"), "seed: -1 found, expected at least 0"),
    ):
        code, _, err = call(*arguments)
        assert code == 2
        assert re.fullmatch(f"error: [^\n]*{complaint}[^\n]*\n", err)
    assert not list(here.rglob("*.h5"))
