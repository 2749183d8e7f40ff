"""Networks that are trained as one program end as they would have alone."""

import os
from dataclasses import replace

import pytest
import torch

from models import load_checkpoint, load_dataset
from models.recipes import Recipe
from models.train import Options, untrained
from models.training import train, train_together

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


def grid(folder, digits, *, depth=3, recipe=RECIPE):
    """Untrained networks of one shape, and where they are to be written."""
    folder.mkdir(exist_ok=True)
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
            depth=depth,
        )
        starts.append(replace(untrained(options, digits[0]), recipe=recipe))
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
