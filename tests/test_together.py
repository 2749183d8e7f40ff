"""Networks that are trained as one program end as they would have alone."""

import copy
import math
import os
from dataclasses import replace
from functools import partial

import pytest
import torch

from lossgeometry import InputError
from lossgeometry.running.distributed import ALONE
from models import CSAN, load_checkpoint, load_dataset
from models.networks import build_network
from models.recipes import Recipe
from models.stack import Stack
from models.train import Options, train_all, untrained
from models.training import train, train_together
from tests.teams import run_team

# Windows and head windows of every kind, one without border; seeds of their own.
GRID = ((3, 1, "clamp", 0), (8, 1, "clamp", 1), (5, 3, "zero", 2), (3, 2, "mask", 0))
RECIPE = Recipe(
    epochs=4,
    warmup_epochs=1,
    learning_rate=5e-3,
    batch_size=20,
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
    crop_padding=1,
    flip=True,
    clip_norm=0.5,  # of gradients that are longer
)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits").first(64), load_dataset("digits", "test").first(32)


def grid(folder, digits):
    """Untrained networks of one shape, and where they are to be written."""
    outs, starts = [], []
    for i, (window, head_window, border, seed) in enumerate(GRID):
        outs.append(folder / f"{i}.pt")
        options = Options(
            out=outs[-1],
            window=window,
            head_window=head_window,
            border=border,
            seed=seed,
            images=64,
            dim=6,
            depth=2,
        )
        starts.append(replace(untrained(options, digits[0]), recipe=RECIPE))
    return starts, outs


def assert_same(found, expected, tolerance=dict(rtol=1e-4, atol=1e-5)):  # noqa: B006
    for one, other in zip(found, expected, strict=True):
        theirs = other.model.state_dict()
        for name, tensor in one.model.state_dict().items():
            torch.testing.assert_close(tensor, theirs[name], **tolerance, msg=name)
        assert one.architecture == other.architecture
        for name, values in other.history.items():
            if name != "seconds":
                torch.testing.assert_close(one.history[name], values, **tolerance, equal_nan=True)


def test_networks_together_end_as_each_alone(tmp_path, digits):
    """With stochastic depth, mixup, cutmix, label smoothing and clipping."""
    starts, outs = grid(tmp_path / "together", digits)
    found = train_together(starts, outs, *digits, snapshots=[2], evaluate_every=3)
    starts, others = grid(tmp_path / "alone", digits)
    expected = [
        train(start, out, *digits, snapshots=[2], evaluate_every=3)
        for start, out in zip(starts, others, strict=True)
    ]
    assert_same(found, expected)
    for out, other in zip(outs, others, strict=True):
        names = sorted(path.name for path in out.with_suffix("").iterdir())
        assert names == ["epoch000.pt", "epoch001.pt", "epoch002.pt"]
        assert out.stat().st_size == other.stat().st_size
        for name in names:
            pair = (load_checkpoint(p.with_suffix("") / name) for p in (out, other))
            assert_same([next(pair)], [next(pair)])
    assert not torch.equal(found[0].model.head.weight, found[3].model.head.weight)


@pytest.mark.parametrize("pooling", ["gap", "cls"])
def test_losses_and_gradients_are_those_of_the_networks(pooling):
    """In double precision, with masks of every kind, to twelve digits."""
    sizes = dict(image_size=8, channels=2, classes=5, patch_size=2, dim=12, depth=2, heads=4)
    kinds = [(2, 1, "clamp"), (4, 3, "clamp"), (3, 4, "zero"), (3, 2, "mask"), (1, 1, "zero")]
    models = [
        CSAN(
            **sizes,
            window=window,
            head_window=head_window,
            border=border,
            pooling=pooling,
            stochastic_depth=0.5,
        ).double()
        for window, head_window, border in kinds
    ]
    inputs = torch.randn(5, 7, 2, 8, 8, dtype=torch.float64)
    targets = torch.rand(5, 7, 5, dtype=torch.float64).softmax(-1)
    expected, gradients, kept = [], [], []
    for model, x, y in zip(models, inputs, targets, strict=True):
        torch.manual_seed(len(kept))
        loss = RECIPE.loss(model.train()(x), y)
        expected.append(loss)
        found = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
        torch.manual_seed(len(kept))
        kept.append(Stack([model], "cpu").draw(7))
    stack = Stack(models, "cpu")
    losses = stack.losses(RECIPE.loss, inputs, targets, torch.stack(kept))
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(losses, torch.stack(expected))
    close(torch.autograd.grad(losses.sum(), stack.weights)[0], torch.stack(gradients))
    with torch.no_grad():
        stack.weights[2].zero_()
    assert [p.abs().sum().item() > 0 for m in models for p in [m.head.weight]] == [
        *(True, True, False, True, True)
    ]


def test_batch_norms_keep_their_own_statistics():
    """Of a stack: losses, gradients and statistics are those of each network, to twelve digits."""
    sizes = dict(image_size=4, channels=1, classes=5, patch_size=1, dim=4, depth=2, kernel_size=5)
    models = [build_network({"network": "replknet", **sizes}).double() for _ in range(3)]
    inputs = torch.randn(2, 3, 7, 1, 4, 4, dtype=torch.float64)
    targets = torch.rand(2, 3, 7, 5, dtype=torch.float64).softmax(-1)
    expected = copy.deepcopy(models)
    stack = Stack(models, "cpu")
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    for x, y in zip(inputs, targets, strict=True):
        losses = stack.losses(RECIPE.loss, x, y, torch.zeros(3, 7, 0))
        (gradients,) = torch.autograd.grad(losses.sum(), stack.weights)
        for k, model in enumerate(expected):
            loss = RECIPE.loss(model.train()(x[k]), y[k])
            close(losses[k], loss)
            found = torch.autograd.grad(loss, list(model.parameters()))
            close(gradients[k], torch.cat([g.flatten() for g in found]))
    for model, other in zip(models, expected, strict=True):
        close(dict(model.named_buffers()), dict(other.named_buffers()))
        assert model.blocks[0].norm1.num_batches_tracked == 2


def trained(team, folder, digits):
    starts, outs = grid(folder, digits)
    found = train_together(starts, outs, *digits, team=team)
    return [(dict(one.model.state_dict()), dict(one.history)) for one in found]


def test_a_team_trains_them_as_one_process_does(tmp_path, digits):
    found = run_team(2, trained, tmp_path / "team", digits, folder=tmp_path)[0]
    for (ours, history), (theirs, expected) in zip(
        found, trained(ALONE, tmp_path / "alone", digits), strict=True
    ):
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            history["objective"], expected["objective"], rtol=1e-4, atol=0, equal_nan=True
        )


def options(folder, window, **others):
    out = folder / f"csan{window}.pt"
    sizes = dict(dim=6, depth=1, epochs=6, images=64)
    return Options(out=out, window=window, device="cpu", **sizes, **others)


def test_the_time_is_up_after_an_epoch_and_the_same_call_goes_on(tmp_path, capsys):
    several = [options(tmp_path, window) for window in (3, 5)]
    for epoch in range(1, 6):
        train_all(several, deadline=0.0)
        said = capsys.readouterr().out
        assert said.count(f"time is up after {epoch} of 6 epochs") == 2
        assert not any(one.out.exists() for one in several)
    train_all(several, deadline=0.0)
    assert "time is up" not in capsys.readouterr().out
    whole = [options(tmp_path / "whole", window) for window in (3, 5)]
    train_all(whole, deadline=math.inf)
    for one, other in zip(several, whole, strict=True):
        ours, theirs = (load_checkpoint(o.out).model.state_dict() for o in (one, other))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_is_there_is_not_trained_and_what_was_begun_apart_goes_on(tmp_path, capsys):
    train_all([options(tmp_path, 3)], math.inf)
    before = (tmp_path / "csan3.pt").read_bytes()
    train_all([options(tmp_path, 5)], 0.0)
    train_all([options(tmp_path, 8)], 0.0)
    train_all([options(tmp_path, 8)], 0.0)
    seconds = [
        torch.load(tmp_path / f"csan{window}/resume.pt", weights_only=True)["history"]["seconds"]
        for window in (5, 8)
    ]
    capsys.readouterr()
    several = [options(tmp_path, window) for window in (2, 3, 5, 8)]
    train_all(several, math.inf)
    said = capsys.readouterr().out
    assert "csan3.pt is already there" in said
    assert said.count("wrote") == 3
    assert (tmp_path / "csan3.pt").read_bytes() == before
    for window, known in zip((5, 8), seconds, strict=True):
        found = load_checkpoint(tmp_path / f"csan{window}.pt").history["seconds"]
        assert found[: len(known)] == known


def test_one_that_diverges_ends_the_command_and_leaves_all_states(tmp_path):
    several = [options(tmp_path, window) for window in (3, 5, 8)]
    train_all(several, deadline=0.0)
    files = [one.out.with_suffix("") / "resume.pt" for one in several]
    state = torch.load(files[1], weights_only=True)
    state["weights"][7] = torch.nan
    torch.save(state, files[1])
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*.pt")}
    with pytest.raises(
        InputError, match=r"^out: \S*csan5.pt diverged, .* after epoch 2, "
    ) as error:
        train_all(several, math.inf)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pt")} == before


def kill_at(patch, at):
    """Let the `at`-th file that is put in its place be the end."""
    moves = []
    for function in (os.replace, os.rename):

        def move(*names, function=function):
            moves.append(names)
            if len(moves) == at:
                raise KeyboardInterrupt
            function(*names)

        patch.setattr(os, function.__name__, move)


def test_killed_anywhere_they_end_with_the_same_bits(tmp_path, digits, monkeypatch):
    """At every file that is put in its place: first snapshots, states, snapshots, results."""
    starts, outs = grid(tmp_path / "whole", digits)
    whole = train_together(starts, outs, *digits)
    starts, outs = grid(tmp_path / "killed", digits)
    kills, done = 0, False
    while not done:
        some = grid(tmp_path / "killed", digits)[0]
        left = [i for i, out in enumerate(outs) if not out.exists()]
        with monkeypatch.context() as patch:
            kill_at(patch, 3 + kills)  # later each time, in the end not at all
            try:
                train_together([some[i] for i in left], [outs[i] for i in left], *digits)
                done = True
            except KeyboardInterrupt:
                kills += 1
    assert kills > 8
    for out, expected in zip(outs, whole, strict=True):
        found = load_checkpoint(out).model.state_dict()
        assert all(torch.equal(found[n], t) for n, t in expected.model.state_dict().items())
        assert sorted(p.name for p in out.with_suffix("").iterdir()) == [
            "epoch000.pt",
            "epoch001.pt",
        ]
