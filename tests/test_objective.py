import dataclasses

import pytest
import torch
from torch.nn import functional as F

from analysis.objective import build_objective, error_rate
from lossgeometry import InputError
from models import load_dataset
from models.train import Options, untrained


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits").first(50)


@pytest.fixture(scope="module")
def checkpoint(digits):
    return untrained(Options(out="unused.pt", window=3, dim=6, depth=2), digits)


def test_clean_objective_is_every_image_once_in_evaluation_mode(checkpoint, digits):
    objective = build_objective(checkpoint, digits, kind="clean")
    assert [len(x) for x, _ in objective.batches] == [16, 16, 16, 2]
    inputs = torch.cat([x for x, _ in objective.batches])
    distances = torch.cdist(inputs.flatten(1), digits.inputs.flatten(1))
    assert distances.argmin(1).unique().numel() == 50
    assert torch.equal(
        torch.cat([y for _, y in objective.batches]), digits.labels[distances.argmin(1)]
    )
    assert objective.loss is F.cross_entropy
    assert objective.weight_decay == 0
    assert not objective.model.training


def test_training_objective_is_that_of_the_recipe(checkpoint, digits):
    objective = build_objective(checkpoint, digits)
    assert objective.weight_decay == checkpoint.recipe.weight_decay
    assert objective.loss.keywords == {"label_smoothing": checkpoint.recipe.label_smoothing}
    assert objective.model.training
    targets = torch.cat([y for _, y in objective.batches])
    assert targets.shape == (50, 10)
    assert ((targets > 0) & (targets < 1)).any()  # mixup


@pytest.mark.parametrize("kind", ["train", "clean"])
def test_mini_batches_are_frozen_by_the_seed_alone(checkpoint, digits, kind):
    few = build_objective(checkpoint, digits, kind=kind, batches=2, seed=3)
    torch.rand(7)
    many = build_objective(checkpoint, digits, kind=kind, batches=6, seed=3)
    for (x, y), (again_x, again_y) in zip(few.batches, many.batches, strict=False):
        assert torch.equal(x, again_x)
        assert torch.equal(y, again_y)
    assert len(many.batches) == 6  # a second epoch is begun
    other = build_objective(checkpoint, digits, kind=kind, batches=2, seed=4)
    assert not torch.equal(other.batches[0][0], few.batches[0][0])


def test_drawing_leaves_the_global_random_state_alone(checkpoint, digits):
    before = torch.get_rng_state()
    build_objective(checkpoint, digits)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_options_are_named(checkpoint, digits):
    for options, complaint in (
        (dict(batch_size=0), "batch-size: 0 found"),
        (dict(batches=0), "batches: 0 found"),
        (dict(kind="dirty"), "objective: 'dirty' is unknown"),
    ):
        with pytest.raises(InputError, match=complaint):
            build_objective(checkpoint, digits, **options)
    wide = dataclasses.replace(digits, images=digits.images.repeat(1, 1, 2, 1))
    with pytest.raises(
        InputError, match=r"images of digits are \(8, 16, 1\), expected \(8, 8, 1\)"
    ):
        build_objective(checkpoint, wide)


def test_error_rate_against_labels_and_soft_targets():
    outputs = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 2.0]])
    labels = torch.tensor([0, 0, 0, 1])
    assert error_rate(outputs, labels) == 0.25
    soft = 0.6 * F.one_hot(labels, 2) + 0.2
    assert error_rate(outputs, soft) == 0.25
