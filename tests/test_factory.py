"""Specs of models: what they build, and what is said of those that build nothing."""

import sys

import pytest
import torch
from torch import nn

from lossgeometry import InputError
from models.factory import build_model

MODULE = """
from torch import nn

def plain(): return nn.Linear(2, 3)
def sized(num_classes, in_chans, width=1, act="relu"):
    model = nn.Conv2d(in_chans, num_classes, width)
    model.act = act
    return model
def broken(): raise RuntimeError("two\\nlines")
def other(): return "a model"
class Wrapped(nn.Linear):
    def __init__(self, num_classes=7): super().__init__(1, num_classes)
    @staticmethod
    def small(): return Wrapped(2)
constant = 3
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_module.py").write_text(MODULE)
    (tmp_path / "my_package" / "script.py").write_text("import sys; sys.exit(3)")
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("spec", "size", "classes"),
    [
        ("torchvision:shufflenet_v2_x0_5", 32, 5),
        ("torchvision:shufflenet_v2_x0_5?num_classes=4", 32, 4),
        ("timm:vit_tiny_patch16_224?img_size=16&patch_size=8&depth=1&embed_dim=24", 16, 5),
        ("timm:resnet10t?in_chans=3", 32, 5),
        ("timm:convnext_atto?depths=(1,1,1,1)&dims=[8,8,8,8]", 32, 5),
    ],
)
def test_models_of_packages_have_the_classes_of_the_dataset(spec, size, classes):
    model = build_model(spec, classes=5, channels=3).eval()
    assert model(torch.zeros(1, 3, size, size)).shape == (1, classes)


def test_channels_of_the_dataset():
    spec = "timm:vit_tiny_patch16_224?img_size=16&patch_size=8&depth=1&embed_dim=24"
    assert build_model(spec, classes=5, channels=1)(torch.zeros(1, 1, 16, 16)).shape == (1, 5)


def test_a_factory_of_the_current_folder_gets_what_it_accepts(package):
    assert build_model("my_package.my_module:plain", classes=5, channels=3).out_features == 3
    model = build_model("my_package.my_module:sized?width=3&act=gelu", classes=5, channels=3)
    assert (model.out_channels, model.in_channels, model.kernel_size) == (5, 3, (3, 3))
    assert model.act == "gelu"
    assert build_model("my_package.my_module:Wrapped", classes=5, channels=3).out_features == 5
    assert (
        build_model("my_package.my_module:Wrapped.small", classes=5, channels=3).out_features == 2
    )
    assert isinstance(build_model("torch.nn:Identity", classes=5, channels=3), nn.Identity)


DEEP = "(" * 100_000


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("", "'' found, expected torchvision:NAME"),
        ("resnet18", "'resnet18' found, expected torchvision:NAME, timm:NAME or MODULE:FACTORY"),
        ("timm:", "'timm:' found"),
        (":resnet18", "':resnet18' found"),
        ("timm:?depth=1", "found, expected"),
        ("timm:resnet10t?depth", "'depth' found in"),
        ("timm:resnet10t?a=1&a=2", "'a=2' found in"),
        ("timm:resnet10t?1a=1", "'1a=1' found in"),
        ("timm:resnet10t?nothing=1", "cannot be built: TypeError: .*nothing"),
        ("timm:vit_tiny_patch16_224?depth=__import__('os')", "cannot be built: TypeError"),
        (f"timm:vit_tiny_patch16_224?depth={DEEP}", "cannot be built: TypeError"),
        ("timm:nonesuch", "cannot be built: RuntimeError: Unknown model"),
        ("torchvision:nonesuch", "cannot be built: ValueError: Unknown model nonesuch"),
        ("torchvision:resnet18?in_chans=1", "cannot be built: TypeError"),
        ("torchvision:resnet18\n?x", "found in 'torchvision:resnet18.n.x'"),
        ("nowhere.at_all:build", "ModuleNotFoundError: No module named 'nowhere'"),
        ("..:build", "cannot be built: TypeError"),
        ("my_package.my_module:nothing", "AttributeError: .*has no attribute 'nothing'"),
        ("my_package.my_module:constant", "TypeError: 3 is not a callable object"),
        ("my_package.my_module:sized?height=3", "unexpected keyword argument 'height'"),
        ("my_package.my_module:broken", "RuntimeError: two lines"),
        ("my_package.my_module:other", "gives a str, expected a torch.nn.Module"),
        ("my_package.script:build", "SystemExit: 3"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(package, spec, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        build_model(spec, classes=5, channels=3)
    assert str(error.value).startswith("model: ")
    assert "\n" not in str(error.value)


def test_without_timm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="timm is not installed, expected pip install timm"):
        build_model("timm:resnet10t", classes=5, channels=3)
