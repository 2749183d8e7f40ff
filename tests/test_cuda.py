"""A GPU gets the numbers of the CPU. Without one, none of this runs."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from analysis import hessian, nll
from analysis import landscape as landscape_command
from lossgeometry import (
    GGN,
    Fisher,
    Hessian,
    eigsh,
    max_eigenvalue_spectrum,
    random_directions,
    spectral_density,
    surface,
    trace,
)
from lossgeometry.algorithms.lockstep import HessianStack
from lossgeometry.operators.captured import make_recorder
from models import CSAN, load_checkpoint, load_dataset
from models import train as train_command
from models.data.augment import Augmentation
from models.data.datasets import ImageDataset
from models.recipes import PRESETS
from models.train import Options, untrained
from models.training import train, train_together

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CLASSES = 3
SIZES = ("--window", 3, "--dim", 6, "--depth", 2, "--epochs", 6, "--images", 96)


def csan():
    sizes = dict(image_size=4, channels=1, classes=CLASSES, patch_size=1, dim=6, depth=2, heads=3)
    return CSAN(**sizes, window=3, head_window=3)


def conv_net():
    model = torchvision.models.resnet18(num_classes=CLASSES)
    model.conv1 = nn.Conv2d(1, 64, 3)
    return model.eval()


def both(model, dtype=torch.float64, examples=7, size=4):
    """Model and batch on the CPU, and copies of them on the GPU."""
    batch = torch.randn(examples, 1, size, size, dtype=dtype), torch.arange(examples) % CLASSES
    model = model.to(dtype)
    return (model, batch), (copy.deepcopy(model).cuda(), tuple(t.cuda() for t in batch))


@pytest.mark.parametrize("preset", PRESETS)
def test_augmented_images_are_those_of_the_cpu_to_the_bit(preset):
    shape = (300, 8, 8, 1) if preset == "digits" else (300, 32, 32, 3)
    channels = torch.rand(2, shape[-1])
    images = torch.randint(256, shape, dtype=torch.uint8)
    images[::3] //= 5  # not all of the levels
    labels = torch.arange(len(images)) % CLASSES
    dataset = ImageDataset("noise", images, labels, ("a", "b", "c"), channels[0], channels[1])
    made = []
    for device in ("cpu", "cuda"):
        augment = Augmentation(PRESETS[preset].recipe, dataset, device)
        torch.manual_seed(3)
        drawn = [augment.draw(indices) for indices in torch.randperm(len(images)).split(50)]
        made.append(augment.apply(drawn))
    for own, other in zip(*made, strict=True):
        assert other.is_cuda
        assert torch.equal(other.cpu(), own)


def test_augmentation_does_not_wait_for_the_device():
    dataset = load_dataset("digits")
    augment = Augmentation(PRESETS["paper-cifar100"].recipe, dataset, "cuda")
    drawn = augment.draw(torch.arange(96))
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment.apply([drawn])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("operator", [Hessian, GGN, Fisher])
@pytest.mark.parametrize("make", [csan, conv_net])
def test_operators(operator, make):
    here, there = both(make())
    A, B = (operator(m, F.cross_entropy, data, weight_decay=0.1) for m, data in (here, there))
    V = torch.randn(A.shape[0], 3, dtype=torch.float64)
    torch.testing.assert_close((B @ V.cuda()).cpu(), A @ V, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((B @ V[:, 0].cuda()).cpu(), A @ V[:, 0], rtol=1e-10, atol=1e-10)


@pytest.fixture
def replays(monkeypatch):
    """A list that grows by one whenever something is replayed."""
    seen = []
    replay = torch.cuda.CUDAGraph.replay

    def count(graph):
        seen.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count)
    return seen


@pytest.mark.parametrize("operator", [Hessian, GGN, Fisher])
@pytest.mark.parametrize("make", [csan, conv_net])
def test_captured_products_are_the_eager_ones(operator, make, replays):
    _, (model, data) = both(make())
    captured, eager = (
        operator(model, F.cross_entropy, data, weight_decay=0.1, micro_batch=3, capture=capture)
        for capture in (True, False)
    )
    for vectors in (1, 4):
        for turn in range(4):
            V = torch.randn(eager.shape[0], vectors, dtype=torch.float64).cuda()
            replays.clear()
            expected = eager @ V
            assert not replays
            torch.testing.assert_close(captured @ V, expected, rtol=1e-10, atol=1e-10)
            assert replays or turn == 0


def test_captured_products_of_other_data(replays):
    """Each of several operators keeps its own, in memory that they share."""
    _, (model, (x, y)) = both(csan())
    H = Hessian(model, F.cross_entropy, (x, y))
    others = [H.on((x.flip(0) * scale, y)) for scale in (1, 2)]
    V = torch.randn(3, H.shape[0], dtype=torch.float64).cuda()
    expected = [
        Hessian(model, F.cross_entropy, (x.flip(0) * scale, y), capture=False) @ V.T
        for scale in (1, 2)
    ]
    for _ in range(2):
        found = [torch.stack([A @ v for v in V], dim=1) for A in others]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        H @ V[0]
    assert replays


def test_captured_products_of_several_mini_batches(replays):
    _, (model, _) = both(csan())
    batches = [both(csan())[1][1] for _ in range(3)]
    captured, eager = (
        HessianStack(model, F.cross_entropy, batches, weight_decay=0.1, recorder=recorder)
        for recorder in (make_recorder(torch.device("cuda")), None)
    )
    for _ in range(4):
        V = torch.randn(3, eager.shape[0], dtype=torch.float64).cuda()
        torch.testing.assert_close(captured.products(V), eager.products(V), rtol=1e-10, atol=1e-10)
    assert len(replays) == 3


class Waits(torch.autograd.Function):
    """Twice the input, by a backward pass that looks at a number."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, slope):
        return 2 * slope if slope.sum().item() < torch.inf else slope


def test_what_waits_for_the_gpu_is_not_captured(replays):
    class Waiting(nn.Module):
        def forward(self, x):
            return Waits.apply(x)

    layers = nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), Waiting(), nn.Linear(8, CLASSES)
    _, (model, data) = both(nn.Sequential(*layers))
    H = Hessian(model, F.cross_entropy, data)
    expected = Hessian(model, F.cross_entropy, data, capture=False)
    v = torch.randn(H.shape[0], dtype=torch.float64).cuda()
    with pytest.warns(UserWarning, match="not replayed as a CUDA graph: called a synchronizing"):
        torch.testing.assert_close(H @ v, expected @ v)
    for _ in range(3):
        torch.testing.assert_close(H @ v, expected @ v)
    assert not replays
    assert torch.cuda.get_sync_debug_mode() == 0


def test_convolutions_are_not_rounded_to_tf32():
    smooth = nn.Sequential(  # a ReLU near its kink may change sides in another precision
        *(layer for c in (1, 16, 32, 32) for layer in (nn.LazyConv2d(max(c, 16), 3), nn.Tanh())),
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    )
    smooth(torch.randn(1, 1, 16, 16))
    (_, _), (model, (x, y)) = both(smooth, torch.float32, examples=16, size=16)
    allowed = torch.backends.cudnn.allow_tf32
    H = Hessian(model, F.cross_entropy, (x, y))
    v = torch.randn(H.shape[0]).cuda()
    exact = Hessian(copy.deepcopy(model).double(), F.cross_entropy, (x.double(), y)) @ v.double()
    assert ((H @ v).double() - exact).norm() < 1e-5 * exact.norm()
    assert H.check().ok
    assert torch.backends.cudnn.allow_tf32 == allowed


def test_algorithms():
    here, there = both(csan())
    for k in (1, 4):
        found, expected = (
            eigsh(Hessian(m, F.cross_entropy, data), k=k, tol=1e-8) for m, data in (there, here)
        )
        torch.testing.assert_close(found.eigenvalues.cpu(), expected.eigenvalues.cpu())
        assert found.converged.all()
    found, expected = (
        spectral_density(Hessian(m, F.cross_entropy, data), probes=3, steps=9)
        for m, data in (there, here)
    )
    np.testing.assert_allclose(found.nodes, expected.nodes, rtol=1e-6, atol=1e-9)
    found, expected = (
        trace(Hessian(m, F.cross_entropy, data), matvecs=30) for m, data in (there, here)
    )
    assert found.estimate == pytest.approx(expected.estimate, rel=1e-8)


def test_spectrum_in_lockstep_is_that_of_one_by_one():
    (model, _), (there, _) = both(csan())
    batches = [both(csan())[0][1] for _ in range(5)]
    expected = max_eigenvalue_spectrum(model, F.cross_entropy, batches, k=3, tol=1e-8)
    for together, allowed in ((4, {4}), (None, {1, 4})):  # None: what is seen to be faster
        found = max_eigenvalue_spectrum(
            there, F.cross_entropy, batches, k=3, tol=1e-8, together=together
        )
        assert found.batches_at_a_time in allowed
        np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-6, atol=1e-9)


def test_compiled_products():
    _, (model, batch) = both(csan(), torch.float32)
    H = Hessian(model, F.cross_entropy, batch)
    compiled = Hessian(model, F.cross_entropy, batch, compile=True)
    v = torch.randn(H.shape[0]).cuda()
    torch.testing.assert_close(compiled @ v, H @ v, rtol=1e-4, atol=1e-5)


def test_surfaces_along_the_same_directions():
    here, there = both(conv_net())
    metrics = {"nll": F.cross_entropy, "error": lambda o, y: (o.argmax(1) != y).double().mean()}
    found, expected = (
        surface(
            m, metrics, data, random_directions(m, seed=3), np.linspace(-1, 1, 3), np.array([0, 1])
        )
        for m, data in (there, here)
    )
    for name in metrics:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9)


def test_too_little_memory_halves_the_batches(capsys):
    _, (model, (x, y)) = both(conv_net(), torch.float32, examples=1024, size=32)
    reference = Hessian(model, F.cross_entropy, (x, y), micro_batch=32)
    v = torch.randn(reference.shape[0]).cuda()
    expected = reference @ v
    del reference
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(3 * 2**30 / total)
        H = Hessian(model, F.cross_entropy, (x, y), micro_batch=1024)
        torch.testing.assert_close(H @ v, expected, rtol=1e-3, atol=1e-4)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "not enough memory for 1024 examples" in capsys.readouterr().err


@pytest.mark.parametrize("compile", [False, True])
def test_networks_together_end_as_each_alone_and_go_on_to_the_bit(tmp_path, compile):
    data = load_dataset("digits").first(96), load_dataset("digits", "test").first(32)

    def trained(name, kinds, **options):
        starts, outs = [], []
        for window, head_window in kinds:
            outs.append(tmp_path / name / f"{window}{head_window}.pt")
            sizes = dict(dim=12, depth=2, epochs=6, images=96)
            own = Options(out=outs[-1], window=window, head_window=head_window, **sizes)
            starts.append(untrained(own, data[0]))
        found = train_together(starts, outs, *data, device="cuda", **options)
        return [dict(network.model.state_dict()) for network in found]

    kinds = [(3, 1), (8, 1), (5, 3)]
    alone = [trained("alone", [kind])[0] for kind in kinds]
    together = trained("together", kinds, compile=compile)
    for one, other in zip(together, alone, strict=True):
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=1e-2, atol=1e-3)
    for _ in range(5):  # an epoch each, and the last one
        trained("pieces", kinds, compile=compile, deadline=0.0)
    for one, other in zip(trained("pieces", kinds, compile=compile), together, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("compile", [False, True])
def test_a_training_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, compile):
    data = load_dataset("digits").first(64), load_dataset("digits", "test").first(32)

    def trained(name):
        out = tmp_path / f"{name}.pt"
        options = Options(out=out, window=3, dim=6, depth=2, epochs=7, images=64)
        start = untrained(options, data[0])
        return train(start, out, *data, device="cuda", bf16=compile, compile=compile)

    whole = trained("whole")
    assert whole.history["train_nll"][-1] < whole.history["train_nll"][0]
    assert all(p.device.type == "cpu" for p in whole.model.parameters())

    states, replace = [], os.replace

    def interrupt(source, target):
        if Path(target).name == "resume.pt":  # the compiler replaces files, too
            states.append(target)
            if len(states) == 4:
                raise Interrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(Interrupt):
            trained("parts")
    state = torch.load(tmp_path / "parts/resume.pt", weights_only=True)
    assert state["epoch"] == 3  # the state after the fourth was not written
    parts = trained("parts")
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("command", "few", "arrays"),
    [
        (hessian, ("--batches", 4), ["eigenvalues", "trace"]),
        (landscape_command, ("--points", 5, "--lines", 2), ["surface/nll", "line/nll"]),
        (nll, (), ["train/nll", "test/nll"]),
    ],
)
def test_commands(call_module, tmp_path, monkeypatch, command, few, arrays):
    monkeypatch.chdir(tmp_path)
    assert call_module(train_command, *SIZES, "--out", "cpu.pt", "--device", "cpu")[0] == 0
    Path("cuda.pt").write_bytes(Path("cpu.pt").read_bytes())
    found = {}
    for device in ("cpu", "cuda"):
        code, _, err = call_module(command, "--ckpt", f"{device}.pt", "--device", device, *few)
        assert code == 0, err
        with h5py.File(f"{device}.h5") as file:
            found[device] = {}
            file.visititems(
                lambda name, item, values=found[device]: (
                    values.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
                )
            )
    assert any(name.endswith(array) for array in arrays for name in found["cpu"])
    for name, values in found["cpu"].items():
        if any(name.endswith(array) for array in arrays):
            np.testing.assert_allclose(found["cuda"][name], values, rtol=2e-3, atol=1e-4)


def test_processes_talk_by_nccl(tmp_path):
    alone, team = (tmp_path / f"{name}.pt" for name in ("alone", "team"))
    for out, launcher in ((alone, []), (team, ["torch.distributed.run", "--nproc-per-node", "1"])):
        command = [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), "models.train"]
        command += [*map(str, SIZES), "--device", "cuda"]
        subprocess.run([*command, "--out", str(out)], check=True)
    for one, other in zip(
        *(load_checkpoint(out).model.parameters() for out in (alone, team)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
