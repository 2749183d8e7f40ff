"""Recipes, augmentation, checkpoints, and a training that is killed."""

import copy
import dataclasses
import os
import time
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.distributed import HashStore
from torch.func import functional_call
from torch.nn import functional as F

from lossgeometry import InputError
from lossgeometry.running import memory
from lossgeometry.running.distributed import ALONE
from lossgeometry.running.processes import Processes
from lossgeometry.seeds import derive_seed
from models import CSAN, load_checkpoint, load_dataset
from models.data.augment import Augmentation
from models.isotropic import Isotropic, StochasticDepth
from models.provenance import FORMAT
from models.recipes import PRESETS, Recipe
from models.train import Options, untrained
from models.training import evaluate, train
from tests.teams import run_team, start_team

TINY = dict(dim=6, depth=1, epochs=7, images=64)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits").first(64), load_dataset("digits", "test").first(32)


def tiny(out, digits, **options):
    return untrained(Options(out=out, **{"window": 3, **TINY, **options}), digits[0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    out = tmp_path_factory.mktemp("trained") / "tiny.pt"
    return train(tiny(out, digits), out, *digits, snapshots=[6])


def test_learning_rate_warms_up_and_falls_to_zero():
    recipe = Recipe(epochs=12, warmup_epochs=2, learning_rate=0.5)
    rates = [recipe.learning_rate_at(epoch) for epoch in (0, 1, 2, 7, 12, 13)]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.25, 0, 0])


def test_loss_is_cross_entropy_against_smoothed_targets():
    recipe = Recipe(epochs=1, warmup_epochs=0, learning_rate=1, label_smoothing=0.3)
    outputs, targets = torch.randn(5, 4), torch.rand(5, 4).softmax(1)
    smoothed = 0.7 * targets + 0.3 / 4
    expected = -(smoothed * outputs.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(recipe.loss(outputs, targets), expected)


def test_augmentation_is_that_of_the_recipe(digits):
    plain = Recipe(epochs=1, warmup_epochs=0, learning_rate=1)
    indices = torch.arange(8)
    inputs, targets = Augmentation(plain, digits[0])(indices)
    assert torch.equal(inputs, digits[0].inputs[:8])
    assert torch.equal(targets, F.one_hot(digits[0].labels[:8], 10).float())

    flipped = Augmentation(dataclasses.replace(plain, flip=True), digits[0])(indices)[0]
    both = torch.stack([inputs, inputs.flip(-1)])
    assert (flipped == both).all((2, 3, 4)).any(0).all()
    assert not torch.equal(flipped, inputs)

    _, mixed = Augmentation(dataclasses.replace(plain, mixup=1.0), digits[0])(indices)
    torch.testing.assert_close(mixed.sum(1), torch.ones(8))
    assert ((mixed > 0) & (mixed < 1)).any()

    cut, _ = Augmentation(dataclasses.replace(plain, cutmix=1.0), digits[0])(indices)
    assert ((cut == inputs) | (cut == inputs.roll(1, 0))).all()


def test_every_preset_augments_and_trains_reproducibly(digits):
    for preset in PRESETS.values():
        augment = Augmentation(preset.recipe, digits[0])
        draws = []
        for _ in range(2):
            torch.manual_seed(3)
            draws.append(augment(torch.arange(6)))
        assert torch.equal(draws[0][0], draws[1][0])
        assert torch.equal(draws[0][1], draws[1][1])


def test_the_papers_preset_has_the_border_and_the_positions_of_its_code(tmp_path, digits):
    options = dict(preset="paper-cifar100", dataset="digits", dim=96, depth=1, epochs=6)
    paper = tiny(tmp_path / "paper.pt", digits, **options)
    assert paper.architecture["border"] == "zero"
    assert paper.model.position_embedding.std().item() == pytest.approx(0.02, rel=0.1)
    chosen = tiny(tmp_path / "mask.pt", digits, **options, border="mask")
    assert chosen.architecture["border"] == "mask"
    own = tiny(tmp_path / "own.pt", digits, dim=96)
    assert own.architecture["border"] == "clamp"
    assert own.model.position_embedding.std().item() == pytest.approx(0.5, rel=0.1)
    paper.save(tmp_path / "paper.pt")
    again = load_checkpoint(tmp_path / "paper.pt")
    assert (again.recipe, again.architecture) == (paper.recipe, paper.architecture)


def test_a_recipe_of_before_is_described_as_before():
    """Or what is measured now would not be compared with what was."""
    old = PRESETS["cifar100"].recipe.options()
    assert "randaugment" not in old
    assert Recipe(**old) == PRESETS["cifar100"].recipe
    paper = PRESETS["paper-cifar100"].recipe
    assert (
        Recipe(**paper.options()) == paper != dataclasses.replace(paper, randaugment="torchvision")
    )
    with pytest.raises(InputError, match="randaugment: 'pillow' is not usable, expected one of"):
        dataclasses.replace(paper, randaugment="pillow")


def test_records_what_is_asked_of_a_training(trained, digits):
    history = trained.history
    assert history["epoch"] == list(range(8))
    assert set(history) == {
        *("epoch", "objective", "learning_rate", "seconds"),
        *("train_nll", "train_error", "test_nll", "test_error"),
    }
    again = evaluate(trained.model, *digits)
    assert all(history[name][-1] == value for name, value in again.items())
    model = trained.model.eval()
    nll = F.cross_entropy(model(digits[0].inputs), digits[0].labels)
    assert history["train_nll"][-1] == pytest.approx(nll.item(), rel=1e-6)
    assert history["learning_rate"][5] == pytest.approx(trained.recipe.learning_rate)


def test_keeps_snapshots_of_start_warmup_end_and_chosen_epochs(trained):
    folder = trained.path.with_suffix("")
    epochs = {path.name: load_checkpoint(path).epoch for path in folder.iterdir()}
    assert epochs == {"epoch000.pt": 0, "epoch005.pt": 5, "epoch006.pt": 6}
    assert trained.epoch == 7


def trained_by(team, out, digits, options):
    """Weights and history of a training in which every process does its share."""
    found = train(tiny(out, digits, **options), out, *digits, team=team)
    return {**found.model.state_dict()}, {**found.history}


def assert_same_training(found, expected):
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert list(ours) == list(theirs)
        for name in theirs:
            if name != "seconds":
                torch.testing.assert_close(
                    ours[name],
                    theirs[name],
                    rtol=1e-4,
                    atol=1e-5,
                    equal_nan=True,
                    msg=f"{i} {name}",
                )


# The batches hold 32 images, or the only one 3: one more than there are processes, or fewer.
@pytest.mark.parametrize(("size", "images"), [(2, 64), (3, 64), (5, 3)])
def test_a_team_trains_as_one_process_does(tmp_path, digits, size, images):
    """With stochastic depth, mixup and crops: everyone draws the same and takes its share."""
    some = digits[0].first(images), digits[1]
    options = dict(images=images, depth=2)
    expected = trained_by(ALONE, tmp_path / "alone.pt", some, options)
    found = run_team(size, trained_by, tmp_path / "team.pt", some, options, folder=tmp_path)
    assert_same_training(found[0], expected)
    for other in found[1:]:
        assert all(torch.equal(other[0][name], found[0][0][name]) for name in other[0])
        assert repr(other[1]) == repr(found[0][1])
    assert sorted(p.name for p in (tmp_path / "team").iterdir()) == ["epoch000.pt", "epoch005.pt"]


def test_a_team_goes_on_where_another_was_killed(tmp_path, digits):
    options = dict(depth=2, epochs=10)
    out, state = tmp_path / "team.pt", tmp_path / "team/resume.pt"
    members = start_team(2, trained_by, out, digits, options, folder=tmp_path)
    while not state.exists():
        assert all(member.is_alive() for member in members)
        time.sleep(0.002)
    for member in members:
        member.kill()
        member.join()
    assert not out.exists()
    before = torch.load(state, weights_only=True)["history"]["seconds"]
    found = run_team(3, trained_by, out, digits, options, folder=tmp_path)[0]
    assert found[1]["seconds"][: len(before)] == before  # it did go on
    assert_same_training(found, trained_by(ALONE, tmp_path / "alone.pt", digits, options))


def test_stochastic_depth_is_torchvisions_to_the_bit():
    x = torch.randn(7, 3, 2)
    ours, theirs = StochasticDepth(0.3), torchvision.ops.StochasticDepth(0.3, "row")
    torch.manual_seed(1)
    expected = theirs(x)
    torch.manual_seed(1)
    assert torch.equal(ours(x), expected)
    torch.manual_seed(1)
    kept = ours.draw(7)
    assert torch.equal(functional_call(ours, {"kept": kept[2:5]}, x[2:5]), expected[2:5])
    assert ours.eval()(x) is x


def test_resuming_with_other_options_is_refused(tmp_path, digits, monkeypatch):
    out = tmp_path / "other.pt"

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", interrupt)  # just before the state would be removed
    with pytest.raises(KeyboardInterrupt):
        train(tiny(out, digits, epochs=6), out, *digits)
    with pytest.raises(InputError, match=r"resume.pt: saved by a training with other options"):
        train(tiny(out, digits, epochs=6, seed=1), out, *digits)


@pytest.mark.parametrize("options", [{}, {"evaluate_every": 10}])
def test_what_diverges_is_not_saved(tmp_path, digits, options):
    start, out = tiny(tmp_path / "one.pt", digits), tmp_path / "one.pt"
    out.write_bytes(b"what was there")
    start = dataclasses.replace(start, recipe=dataclasses.replace(start.recipe, learning_rate=1e6))
    with pytest.raises(InputError, match=r"one.pt diverged, .* not finite after epoch \d, "):
        train(start, out, *digits, **options)
    assert out.read_bytes() == b"what was there"
    left = {path.name: load_checkpoint(path) for path in out.with_suffix("").glob("epoch*.pt")}
    assert list(left) == ["epoch000.pt"]
    assert all(p.isfinite().all() for p in left["epoch000.pt"].model.parameters())


def killed(out, digits, monkeypatch, at, **options):
    """A training that ends in its `at`-th saving of anything."""
    with monkeypatch.context() as patch:
        replaced, replace = [], os.replace

        def interrupt(*names):
            replaced.append(names)
            if len(replaced) == at:
                raise KeyboardInterrupt
            replace(*names)

        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(out, digits, epochs=6, **options), out, *digits)


def test_snapshots_have_the_same_bytes_wherever_a_training_was_killed(
    tmp_path, digits, monkeypatch
):
    """Start, five states, the end of warm-up, state, result: each is the last that is missing."""
    out = tmp_path / "one.pt"
    seen = {}
    for at in (2, 2, 1, 3, 1, 2, 3, 2, 1, 3, 1):
        killed(out, digits, monkeypatch, at)
        now = {p.name: p.read_bytes() for p in out.with_suffix("").glob("epoch*.pt")}
        assert now.items() >= seen.items()
        seen = now
    assert set(seen) == {"epoch000.pt", "epoch005.pt"}


def test_going_on_with_other_images_is_refused(tmp_path, digits, monkeypatch):
    out = tmp_path / "other.pt"
    killed(out, digits, monkeypatch, 4)
    labels = digits[0].labels.clone()
    labels[3] = (labels[3] + 1) % 10
    changed = dataclasses.replace(digits[0], labels=labels)
    state = out.with_suffix("") / "resume.pt"
    before = state.read_bytes()
    with pytest.raises(InputError, match=r"resume.pt: saved by a training on other images, digits"):
        train(tiny(out, digits, epochs=6), out, changed, digits[1])
    assert state.read_bytes() == before
    assert train(tiny(out, digits, epochs=6), out, *digits).epoch == 6


def test_damaged_states_are_refused_and_left_as_they_are(tmp_path, digits, monkeypatch):
    out = tmp_path / "bad.pt"
    killed(out, digits, monkeypatch, 4)
    state = out.with_suffix("") / "resume.pt"
    whole, content = state.read_bytes(), torch.load(state, weights_only=True)
    torch.save(content | {"weights": torch.zeros(3)}, state)
    for bad in (state.read_bytes(), whole[:-100], b""):
        state.write_bytes(bad)
        with pytest.raises(InputError, match=r"resume.pt: damaged; delete it, or start again with"):
            train(tiny(out, digits, epochs=6), out, *digits)
        assert state.read_bytes() == bad


def test_checkpoint_rebuilds_model_recipe_and_history(trained, digits):
    again = load_checkpoint(trained.path)
    x = digits[0].inputs
    assert torch.equal(again.model(x), trained.model(x))
    for name in ("architecture", "recipe", "epoch", "seed", "history", "dataset", "images"):
        assert repr(getattr(again, name)) == repr(getattr(trained, name))  # nan is not nan
    assert isinstance(again.model, CSAN)
    assert not again.model.training


class RunsCode:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda content: RunsCode(), "it would run code"),
        (lambda content: [1, 2], "its format is a list"),
        (lambda content: {"state_dict": {}}, "its format is None"),
        (lambda content: {"format": FORMAT}, "no usable 'architecture'"),
        (lambda content: content | {"epoch": "five"}, "no usable 'epoch'"),
        (lambda content: content | {"recipe": {"pace": 1}}, "options do not fit.*pace"),
        (lambda content: change(content, "architecture", window=0), "window: 0"),
        (lambda content: change(content, "architecture", border="wrap"), "border: 'wrap'"),
        (lambda content: change(content, "architecture", head_window=4), "head_window: 4"),
        (lambda content: content | {"state_dict": {}}, "weights do not fit.*is missing"),
        (
            lambda content: change(content, "state_dict", **{"norm.bias": torch.zeros(3)}),
            "weights do not fit.*norm.bias is .3,., expected",
        ),
    ],
)
def test_unusable_checkpoints_are_refused(trained, tmp_path, monkeypatch, spoil, complaint):
    monkeypatch.chdir(tmp_path)
    content = torch.load(trained.path, weights_only=True)
    torch.save(spoil(content), "bad.pt")
    with pytest.raises(InputError, match=f"^bad.pt: .*{complaint}") as error:
        load_checkpoint("bad.pt")
    assert "\n" not in str(error.value)
    assert not Path("executed").exists()


def change(content, key, **values):
    return content | {key: content[key] | values}


def test_truncated_and_missing_checkpoints_are_refused(trained, tmp_path):
    bad = tmp_path / "bad.pt"
    with pytest.raises(InputError, match="there is no such file"):
        load_checkpoint(bad)
    whole = trained.path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 10):
        bad.write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a checkpoint"):
            load_checkpoint(bad)


def test_history_has_a_row_for_each_evaluated_epoch_only(tmp_path, digits, trained):
    out = tmp_path / "seldom.pt"
    seldom = train(tiny(out, digits), out, *digits, snapshots=[6], evaluate_every=4)
    assert seldom.history["epoch"] == [0, 4, 5, 6, 7]  # 5: end of warm-up
    for name, values in seldom.history.items():
        if name != "seconds":
            expected = [trained.history[name][epoch] for epoch in (0, 4, 5, 6, 7)]
            torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


def test_halves_of_batches_make_the_same_training(tmp_path, digits, monkeypatch, capsys):
    """With stochastic depth and mixup, where memory suffices for 9 images at once."""
    options = dict(depth=2)
    expected = trained_by(ALONE, tmp_path / "whole.pt", digits, options)
    forward = CSAN.forward

    def short_of_memory(model, x):
        if model.training and len(x) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(model, x)

    monkeypatch.setattr(memory, "_announced", set())
    monkeypatch.setattr(CSAN, "forward", short_of_memory)
    assert_same_training(trained_by(ALONE, tmp_path / "halves.pt", digits, options), expected)
    assert capsys.readouterr().err.count("training: not enough memory for 32 examples at once") == 1


def plain_loop(start, train_set):
    """Weights and statistics after a recipe, by AdamW on whole mini-batches."""
    model, recipe = copy.deepcopy(start.model).train(), start.recipe
    augment = Augmentation(recipe, train_set)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=recipe.weight_decay)
    for epoch in range(recipe.epochs):
        torch.manual_seed(derive_seed(start.seed, epoch))
        batches = torch.randperm(len(train_set)).split(recipe.batch_size)
        for step, indices in enumerate(batches, start=1):
            inputs, targets = augment(indices)
            optimizer.param_groups[0]["lr"] = recipe.learning_rate_at(epoch + step / len(batches))
            optimizer.zero_grad()
            recipe.loss(model(inputs), targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
    return model.state_dict()


@pytest.fixture
def normalised(digits):
    """A RepLKNet with batches of 48, which a CPU would take in parts."""

    def make(out, **options):
        # Of a size at which rounding is alike: AdamW makes whole steps of it where a bias before a
        # BatchNorm has no gradient.
        options = dict(network="replknet", kernel_size=5, window=None) | options
        start = tiny(out, digits, **options)
        recipe = dataclasses.replace(start.recipe, batch_size=48, mixup=0.3, crop_padding=1)
        return dataclasses.replace(start, recipe=recipe)

    return make


SAME = dict(rtol=1e-4, atol=1e-5)


def test_batch_norm_is_trained_on_whole_mini_batches(tmp_path, digits, normalised):
    start = normalised(tmp_path / "one.pt")
    some = digits[0].first(48)  # one mini-batch an epoch, as incomplete ones are left out
    expected = plain_loop(start, some)
    found = train(start, tmp_path / "one.pt", some, digits[1])
    for name, tensor in found.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], **SAME, msg=name)
    assert found.model.blocks[0].norm1.num_batches_tracked == start.recipe.epochs
    assert evaluate(load_checkpoint(found.path).model, some, digits[1]) == {
        name: found.history[name][-1]
        for name in ("train_nll", "train_error", "test_nll", "test_error")
    }


def test_an_interrupted_training_goes_on_with_its_statistics(tmp_path, digits, normalised):
    whole = train(normalised(tmp_path / "whole.pt"), tmp_path / "whole.pt", *digits)
    out = tmp_path / "late.pt"
    while not out.exists():
        train(normalised(out), out, *digits, deadline=0.0)
    found = load_checkpoint(out).model.state_dict()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_a_team_does_not_share_the_mini_batches_of_batch_norm(tmp_path, digits, normalised):
    team = Processes(0, 2, HashStore())
    with pytest.raises(InputError, match="torchrun: 2 processes found for a network with BatchNo"):
        train(normalised(tmp_path / "one.pt"), tmp_path / "one.pt", *digits, team=team)
    assert not list(tmp_path.iterdir())


def test_memory_that_does_not_suffice_for_a_batch_changes_no_statistics(
    tmp_path, digits, normalised, monkeypatch
):
    forward = Isotropic.forward

    def short_of_memory(model, x):
        if model.training and len(x) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(model, x)

    monkeypatch.setattr(Isotropic, "forward", short_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        train(normalised(tmp_path / "one.pt"), tmp_path / "one.pt", *digits)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (dict(network="lstm"), "network: 'lstm' is not usable, expected one of csan, convnext"),
        (dict(network="van", window=3), "window: 3 found, which van does not have"),
        (dict(network="convnext", dilation=2), "dilation: 2 found, which convnext does not have"),
        (dict(network="gated", heads=3), "heads: 3 found"),
        (dict(network="convnext", pooling="cls"), "pooling: cls found"),
        (dict(kernel_size=3), "kernel_size: 3 found, which csan does not have"),
        (dict(network="pit", pooling="cls"), "pooling: cls found, which pit does not have"),
        (dict(network="resnet", heads=3), "heads: 3 found, which resnet does not have"),
    ],
)
def test_options_that_a_network_does_not_have_are_refused(tmp_path, digits, options, complaint):
    with pytest.raises(InputError, match=f"^{complaint}"):
        tiny(tmp_path / "one.pt", digits, **{"window": None, **options})
