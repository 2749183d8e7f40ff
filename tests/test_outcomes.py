"""What a model makes of single images, and of the augmented ones that it is trained on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from analysis.objective import build_objective
from analysis.outcomes import objective_outcomes, outcomes
from lossgeometry import InputError
from lossgeometry.landscape.evaluation import Evaluator
from lossgeometry.running import memory
from lossgeometry.running.distributed import ALONE
from models import load_dataset
from models.csan import CSAN
from models.train import Options, untrained
from models.training import evaluating
from tests.teams import run_team

IMAGES = 100  # three mini-batches of the recipe and a part of one


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits").first(IMAGES)


@pytest.fixture(scope="module")
def checkpoint(digits):
    options = Options(out="unused.pt", window=3, dim=6, depth=2)
    start = untrained(options, digits)
    with torch.no_grad():  # far from the indifference of the initialisation
        start.model.head.weight.mul_(20)
    return start


def test_outcomes_are_those_of_single_images(checkpoint, digits):
    nll, correct = outcomes(checkpoint, digits)
    scores = checkpoint.model(digits.inputs)
    expected = F.cross_entropy(scores, digits.labels, reduction="none").detach()
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(correct, scores.argmax(1) == digits.labels)
    assert nll.dtype == np.float32
    assert correct.dtype == bool


def test_objective_is_that_of_the_landscape_at_the_weights(checkpoint, digits):
    size = checkpoint.recipe.batch_size
    assert IMAGES % size  # the last mini-batch is smaller
    objective = build_objective(checkpoint, digits, batch_size=size)
    there = Evaluator(objective.model, objective.metrics, objective.batches)
    found = objective_outcomes(checkpoint, digits)
    np.testing.assert_allclose(found, there(there.weights), rtol=1e-12)
    clean = build_objective(checkpoint, digits, kind="clean", batch_size=size)
    plain = Evaluator(clean.model, clean.metrics, clean.batches)
    assert abs(plain(plain.weights)[0] - found[0]) > 0.1


def test_objective_is_the_same_again_and_draws_from_no_global_generator(checkpoint, digits):
    before = torch.get_rng_state()
    first = objective_outcomes(checkpoint, digits)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert objective_outcomes(checkpoint, digits) == first


@pytest.mark.parametrize("most", [1, 7, 50])
def test_objective_does_not_depend_on_memory(checkpoint, digits, monkeypatch, most):
    expected = objective_outcomes(checkpoint, digits)
    forward, seen = CSAN.forward, []

    def limited(model, x):
        if len(x) > most:
            raise torch.OutOfMemoryError
        seen.append(len(x))
        return forward(model, x)

    monkeypatch.setattr(CSAN, "forward", limited)
    monkeypatch.setattr(evaluating, "size", evaluating.size)
    monkeypatch.setattr(memory, "_announced", set())
    np.testing.assert_allclose(objective_outcomes(checkpoint, digits), expected, rtol=1e-6)
    assert most / 2 < max(seen) <= most
    assert sum(seen) == IMAGES + 1  # one to see whether the images fit


def test_other_classes_than_those_of_the_dataset_are_refused(checkpoint, digits):
    fewer = replace(digits, classes=digits.classes[:-1], labels=digits.labels.clamp(max=8))
    for measure in (outcomes, objective_outcomes):
        with pytest.raises(InputError, match=r"10.* comes out of images"):
            measure(checkpoint, fewer)


def test_images_of_another_size_are_refused(checkpoint, digits):
    large = replace(digits, images=torch.zeros(4, 9, 9, 1, dtype=torch.uint8))
    for measure in (outcomes, objective_outcomes):
        with pytest.raises(InputError, match=r"dataset: images of digits are \(9, 9, 1\), expec"):
            measure(checkpoint, large)


def both(team, *given):
    return tuple(measure(*given, "cpu", team) for measure in (outcomes, objective_outcomes))


@pytest.mark.parametrize("size", [2, 5])  # of five, one has no mini-batch
def test_a_team_finds_the_same(checkpoint, digits, tmp_path, size):
    (nll, correct), objective = both(ALONE, checkpoint, digits)
    for (their_nll, their_correct), theirs in run_team(
        size, both, checkpoint, digits, folder=tmp_path
    ):
        np.testing.assert_allclose(their_nll, nll, rtol=1e-5)
        np.testing.assert_array_equal(their_correct, correct)
        np.testing.assert_allclose(theirs, objective, rtol=1e-12)
