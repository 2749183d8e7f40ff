"""Checkpoints and states of trainings with contents that make no sense."""

from pathlib import Path

import pytest
import torch

from lossgeometry import InputError
from models import CSAN, load_checkpoint
from models.resuming import read_state
from tests.fuzz import bases

ARCHITECTURES = {
    "dim": (10**9, "dim"),
    "depth": (10**9, "depth"),
    "image_size": (10**9, "image_size"),
    "window": (10**30, "window: 1000000"),
    "head_window": (True, "head_window"),
    "heads": ("1", "heads: '1'"),
    "classes": (True, "classes: True"),
    "channels": (float("nan"), "channels: nan"),
    "mlp_ratio": (float("nan"), "mlp_ratio: nan"),
    "stochastic_depth": (1.0, "stochastic_depth: 1.0"),
    "border": ([[]], "border: a list"),
    "pooling": ("../x", "pooling: '../x'"),
    "patch_size": (0, "patch_size: 0"),
    "unknown": (1, "unknown"),
}


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_architectures_of_strangers_are_refused(refused, key):
    value, complaint = ARCHITECTURES[key]
    content = bases.checkpoint_content()
    content["architecture"] = content["architecture"] | {key: value}
    assert complaint in refused(load_checkpoint, "bad.pt", bases.saved(content))


def test_sizes_that_fit_each_other_but_not_the_weights_are_refused(refused):
    content = bases.checkpoint_content()
    content["architecture"] = content["architecture"] | {"dim": 4096, "image_size": 64}
    complaint = refused(load_checkpoint, "bad.pt", bases.saved(content))
    assert "weights, not 117452800" in complaint


def test_weights_that_share_their_bytes_are_refused(refused):
    architecture = bases.ARCHITECTURE | {"dim": 64, "depth": 40, "mlp_ratio": 4.0}
    content = bases.checkpoint_content() | {"architecture": architecture}
    bytes_of_all = torch.zeros(4 * 64 * 64)
    content["state_dict"] = {
        name: bytes_of_all[: t.numel()].view(t.shape)
        for name, t in CSAN(**architecture).state_dict().items()
    }
    assert "weights, not" in refused(load_checkpoint, "bad.pt", bases.saved(content))


def test_attention_of_absurd_size_is_refused(little_memory):
    with pytest.raises(InputError, match=r"image_size: 4096 .* tokens"):
        CSAN(**bases.ARCHITECTURE | {"image_size": 4096})
    with pytest.raises(InputError, match=r"image_size: 256 .* attention scores"):
        CSAN(**bases.ARCHITECTURE | {"image_size": 256, "patch_size": 1})
    with pytest.raises(InputError, match=r"dim: 100000 .* weights"):
        CSAN(**bases.ARCHITECTURE | {"dim": 100_000})


CONTENTS = {
    "epochs": ("recipe", "epochs", 10**18, "epochs: 1000000000000000000"),
    "no epochs": ("recipe", "epochs", -1, "epochs: -1"),
    "rate": ("recipe", "learning_rate", float("nan"), "learning_rate: nan"),
    "decay": ("recipe", "weight_decay", "0.1", "weight_decay: '0.1'"),
    "batch": ("recipe", "batch_size", 0, "batch_size: 0"),
    "smoothing": ("recipe", "label_smoothing", 2.0, "label_smoothing: 2.0"),
    "flip": ("recipe", "flip", 1, "flip: 1"),
    "clip": ("recipe", "clip_norm", [1], "clip_norm: a list"),
    "history": ("history", "train_nll", ["x", 1.0, 2.0], "train_nll"),
    "column": ("history", "test_error", [0.5], "test_error"),
    "empty": ("history", "epoch", [], "epoch"),
    "version": ("versions", "torch", 2, "versions"),
    "seed": (None, "seed", -1, "seed: -1"),
    "large seed": (None, "seed", 2**70, "seed: 1180591620717411303424"),
    "epoch": (None, "epoch", 3, "epoch: 3"),
    "bool": (None, "epoch", True, "epoch: True"),
    "images": (None, "images", -5, "images: -5"),
    "dataset": (None, "dataset", "a\nb", "dataset"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_values_of_strangers_are_refused(refused, case):
    part, key, value, complaint = CONTENTS[case]
    content = bases.checkpoint_content()
    if part is None:
        content[key] = value
    else:
        content[part] = content[part] | {key: value}
    assert complaint in refused(load_checkpoint, "bad.pt", bases.saved(content))


def test_states_of_strangers_are_refused(refused):
    start = load_checkpoint_of(bases.checkpoint_content() | {"epoch": 0})
    content = bases.resume_content(start)

    def resume(path):
        return read_state(path, start, [])

    for changed in (
        {"epoch": 10**18},
        {"epoch": float("nan")},
        {"history": {"epoch": [1]}},
        {"weights": {}},
        {"weights": content["weights"].double()},
        {"exp_avg": torch.zeros(1)},
        {"exp_avg_sq": []},
        {"step": torch.zeros(2)},
    ):
        assert "damaged" in refused(resume, "resume.pt", bases.saved(content | changed))
    assert "other options" in refused(resume, "resume.pt", bases.saved(content | {"run": "x"}))
    Path("resume.pt").write_bytes(bases.saved(content))
    assert resume(Path("resume.pt"))["epoch"] == 1


def load_checkpoint_of(content):
    Path("resume.pt").write_bytes(bases.saved(content))
    return load_checkpoint("resume.pt")
