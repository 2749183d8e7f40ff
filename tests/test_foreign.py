"""Weights as other frameworks save them: found, fitted, or refused in one line."""

import argparse
import datetime
import enum
import functools
import os
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from lossgeometry import InputError
from models.foreign import load_foreign, load_weights, read_tensors
from models.recipes import PLAIN


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))


STATE = OrderedDict(network(1).state_dict())
OTHER = {key: torch.zeros_like(tensor) for key, tensor in STATE.items()}
SELF = {"inner": {"state_dict": STATE}}
SELF["inner"]["again"] = SELF


def under(prefix, state=STATE):
    return {prefix + key: tensor for key, tensor in state.items()}


def optimizer():
    made = torch.optim.Adam([p := nn.Parameter(torch.ones(2))])
    p.sum().backward()
    made.step()
    return made.state_dict()


class Kind(enum.Enum):
    ONE = 1


class Words(list):
    """A container of somebody's own."""


@dataclass
class Config:
    kind: Kind
    rate: float = 0.1


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch executed",)


BESIDE = {  # what frameworks save with the weights
    "args": argparse.Namespace(out=Path("x"), when=datetime.datetime(2020, 1, 1), kind=Kind.ONE),
    "config": Config(Kind.ONE),
    "counts": [defaultdict(list, {"a": [1]}), Counter("abc"), deque([1, 2]), Words("abc")],
    "numbers": [np.float64(1.5), np.arange(3), 2**80, 1j, b"bytes", bytearray(b"x"), {1}],
    "functions": [functools.partial(int, base=2), torch.nn.functional.relu, RunsCode],
    "of PyTorch": [torch.float16, torch.device("cuda"), torch.Size([2]), torch.get_rng_state()],
    "keys": {(1, 2): 3, None: 4, 1.5: 5, -1: 6, Kind.ONE: 7, True: 8},
    "code": RunsCode(),
}
FORMS = {
    "bare": STATE,
    "DataParallel": under("module."),
    "compiled": under("_orig_mod."),
    "compiled in DataParallel": under("module._orig_mod."),
    "compiled inside": {key.replace("0.", "0._orig_mod."): STATE[key] for key in STATE},
    "FSDP": under("_fsdp_wrapped_module."),
    **{
        key: {key: STATE, "epoch": 3, "optimizer": optimizer()}
        for key in ("state_dict", "model", "model_state_dict", "net", "weights", "module")
    },
    "averaged alone": {"state_dict_ema": STATE},
    "timm": {"arch": "x", "state_dict": STATE, "state_dict_ema": OTHER, "metric": 1.0},
    "averaged first": {"model_ema": OTHER, "model": STATE},
    "DeiT": {"model": under("module."), "model_ema": OTHER},
    "Lightning": {
        "state_dict": {**under("model."), "criterion.weight": torch.ones(5)},
        "pytorch-lightning_version": "2.0",
        "optimizer_states": [optimizer()],
    },
    "Lightning with an average": {"state_dict": under("ema_model.", OTHER) | under("net.model.")},
    "SWA": {"n_averaged": torch.tensor(3), **under("module.")},
    "half precision": {
        k: t.half().float().half() for k, t in STATE.items() if t.is_floating_point()
    },
    "holds itself": SELF,
    "beside anything": {**BESIDE, "state_dict": STATE},
    "in containers": {"run": defaultdict(dict, {"net": OrderedDict(STATE)}), **BESIDE},
    "a module": network(1),
    "modules": {"model_ema": network(), "model": network(1)},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    torch.save(FORMS[form], tmp_path / "x.pt")
    model = network()
    load_weights(model, tmp_path / "x.pt")
    tolerance = 1e-3 if form == "half precision" else 0
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, STATE[key], rtol=tolerance, atol=tolerance)
    assert os.listdir() == ["x.pt"], "nothing in it is executed"


def test_what_timm_saves_is_read(tmp_path):
    model, optimizer = network(1), torch.optim.SGD(network().parameters(), 0.1)
    saver = timm.utils.CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model="x", mean=None, output=tmp_path),
        model_ema=timm.utils.ModelEmaV3(network()),
        checkpoint_dir=str(tmp_path),
    )
    saver.save_checkpoint(1, 0.5)
    load_weights(found := network(), tmp_path / "model_best.pth.tar")
    torch.testing.assert_close(found.state_dict(), dict(STATE))


def test_what_lightning_saves_is_read():
    """A file of Lightning 2.6.6: of a task that has saved an `argparse.Namespace` with paths, an
    enum and a class in it as its hyperparameters, and has our `network` as its ``net``.
    """
    load_weights(found := network(), Path(__file__).parent / "files" / "lightning.ckpt")
    for i, tensor in enumerate(found.state_dict().values()):
        assert torch.equal(tensor.double(), torch.full_like(tensor, i).double())


def test_buffers_that_a_model_makes_itself_may_be_there_or_not(tmp_path):
    made = network()
    made.register_buffer("mask", torch.ones(2), persistent=False)
    for state in (STATE, {**STATE, "mask": torch.zeros(2)}):
        torch.save(state, tmp_path / "x.pt")
        load_weights(made, tmp_path / "x.pt")
        assert torch.equal(made[0].weight, STATE["0.weight"])
        assert torch.equal(made.mask, torch.ones(2))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_hugging_face_is_read(tmp_path, name):
    spec = "torch.nn:Linear?in_features=2&out_features=3"
    how = dict(model=spec, dataset="digits", classes=10, channels=1, recipe=PLAIN)
    state = nn.Linear(2, 3).state_dict()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"a folder, expected a file, or model.safetensors or pyt"):
        load_foreign(tmp_path, **how)
    (save_file if name.endswith("s") else torch.save)(state, tmp_path / name)
    found = load_foreign(tmp_path, **how)
    assert found.path == tmp_path / name
    assert torch.equal(found.model.weight, state["weight"])


def test_safetensors(tmp_path):
    save_file(under("module."), tmp_path / "x.safetensors")
    model = network()
    load_weights(model, tmp_path / "x.safetensors")
    assert torch.equal(model[0].weight, STATE["0.weight"])


def test_a_checkpoint_says_what_it_is_of(tmp_path):
    spec = "timm:convnext_atto?depths=(1,1,1,1)&dims=(8,8,8,8)"
    from models.factory import build_model

    state = build_model(spec, classes=5, channels=1).half().state_dict()
    torch.save(state, tmp_path / "x.pt")
    found = load_foreign(
        tmp_path / "x.pt", model=spec, dataset="digits", classes=5, channels=1, recipe=PLAIN
    )
    assert found.architecture == {"model": spec}
    assert (found.dataset, found.images, found.history) == ("digits", None, {})
    assert not found.model.training
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}


MISFITS = {
    "missing": ({**STATE, "3.bias": None}, r"1 missing \(3.bias\)"),
    "many missing": ({"0.weight": STATE["0.weight"]}, r"7 missing \(0.bias, 1.weight \.\.\.\)"),
    "unexpected": ({**STATE, "4.bias": torch.ones(3)}, r"1 unexpected \(4.bias\)"),
    "misshapen": (
        {**STATE, "3.weight": torch.ones(7, 4), "3.bias": torch.ones(7)},
        r"3.weight is float32 \(7, 4\), expected float32 \(5, 4\); 3.bias is",
    ),
    "integers": ({**STATE, "3.bias": torch.ones(5, dtype=torch.int8)}, r"3.bias is int8 \(5,\)"),
    "complex": ({**STATE, "3.bias": torch.ones(5) * 1j}, r"3.bias is complex64 \(5,\)"),
    "empty": ({**STATE, "3.bias": torch.ones(5, device="meta")}, "of a kind that is not read"),
    "another model": (
        under("layer.x"),
        r"its 9 tensors \(layer.x0.weight, .*expected 9 \(0.weight",
    ),
    "long names": ({"a" * 9999 + "\n": torch.ones(1)}, r"its 1 tensors \(a{76} \.\.\.\)"),
    "deep names": ({"a." * 99_999 + "b": torch.ones(1)}, "have other names"),
    "no tensors": ({"epoch": 3}, "there are no tensors in it"),
    "not a dictionary": ([1, 2], "there are no tensors in it"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_said_in_one_line(tmp_path, case):
    content, complaint = MISFITS[case]
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if value is not None}
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=complaint) as error:
        load_weights(network(), tmp_path / "x.pt")
    assert str(error.value).startswith(f"{tmp_path / 'x.pt'}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_files_that_cannot_be_read(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(InputError, match="there is no such file, expected the weights of --model"):
        read_tensors(path)
    for content in (b"", b"\xff" * 64, b"PK\x03\x04" + bytes(99)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: not a") as error:
            read_tensors(path)
        assert "\n" not in str(error.value)


def test_dictionaries_in_one_another_are_read_once(tmp_path):
    """Each twice in the next one: a million ways to the innermost."""
    content = STATE
    for _ in range(6):
        content = {str(i): content for i in range(10)}
    torch.save(content, tmp_path / "x.pt")
    assert len(read_tensors(tmp_path / "x.pt")) == len(STATE)
