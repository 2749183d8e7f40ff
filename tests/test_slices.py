import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lossgeometry import Slice, line, random_directions, surface
from lossgeometry.errors import InputError
from lossgeometry.running import saving

XS, YS = [-1.0, -0.3, 0.0, 0.7], [-0.5, 0.0, 2.0]


def half_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1).mean() / 2


def error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) != targets).float().mean()


METRICS = {"nll": F.cross_entropy, "error": error}


class Classifier(nn.Module):
    """Convolution, optional BatchNorm, dropout, tied weights."""

    def __init__(self, batch_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
        self.mix = nn.Linear(6, 6)
        self.mix_again = self.mix
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.dropout(self.mix_again(self.mix(x).tanh())))


def images(n: int = 70) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 5, 5), torch.randint(4, (n,))


def snapshot(model: nn.Module) -> list[object]:
    state = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [(m.training, getattr(m, "momentum", None)) for m in model.modules()]
    return [state, grads, modes, [p.requires_grad for p in model.parameters()], rng()]


def rng() -> Tensor:
    return torch.random.get_rng_state()


def assert_same(before: list[object], after: list[object]) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def moved(model: nn.Module, directions: list[dict[str, Tensor]], steps: list[float]) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for direction, step in zip(directions, steps, strict=True):
            for name, delta in direction.items():
                model.get_parameter(name).add_(step * delta)
    return model


def test_quadratic_loss_agrees_with_the_closed_form() -> None:
    model = nn.Linear(5, 3).double()
    x, y = torch.randn(40, 5).double(), torch.randn(40, 3).double()
    first, second = random_directions(model, seed=0, include="all")
    result = surface(model, {"loss": half_mse}, (x, y), [first, second], XS, YS, weight_decay=0.3)

    # With inputs (x, 1) the loss is 1/2 tr(W A W^T) - tr(W B) + c for W = [weight | bias].
    inputs = torch.cat([x, torch.ones(40, 1).double()], 1)
    A, B, c = inputs.T @ inputs / 40, inputs.T @ y / 40, y.square().sum() / 80
    W, D, E = (
        torch.cat([d["weight"], d["bias"][:, None]], 1)
        for d in (dict(model.named_parameters()), first, second)
    )
    for i, b in enumerate(YS):
        for j, a in enumerate(XS):
            at = (W + a * D + b * E).detach()
            loss = torch.trace(at @ A @ at.T) / 2 - torch.trace(at @ B) + c
            assert result["loss"][i, j] == pytest.approx(loss.item(), rel=1e-12)
            assert result["l2"][i, j] == pytest.approx(0.15 * at.square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("sizes", [[70], [1, 5, 64], [33, 37], [2] * 35])
def test_mean_over_all_examples_however_they_are_batched(sizes: list[int]) -> None:
    model = Classifier(batch_norm=True).eval()
    x, y = images()
    directions = random_directions(model, seed=1)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    result = surface(model, METRICS, iter(batches), directions, XS, YS)
    assert result["nll"].shape == (3, 4)
    for i, b in enumerate(YS):
        for j, a in enumerate(XS):
            outputs = moved(model, directions, [a, b])(x)
            assert result["error"][i, j] == pytest.approx(error(outputs, y).item(), abs=1e-6)
            nll = F.cross_entropy(outputs, y).item()
            assert result["nll"][i, j] == pytest.approx(nll, rel=1e-5)


def test_inputs_of_different_shapes_keep_their_batches() -> None:
    model = Classifier().eval()
    batches = [(torch.randn(3, 2, 5, 5), torch.tensor([0, 1, 2])),
               (torch.randn(1, 2, 8, 8), torch.tensor([3]))]  # fmt: skip
    result = line(model, METRICS, batches, random_directions(model, 1, seed=0)[0], [0])
    losses = torch.cat([F.cross_entropy(model(x), y, reduction="none") for x, y in batches])
    assert result["nll"][0] == pytest.approx(losses.mean().item(), rel=1e-6)


def test_training_mode_uses_the_given_batches_and_the_same_randomness_everywhere() -> None:
    model = Classifier(batch_norm=True, dropout=0.5).train()
    (x, y), still = images(), {"head.weight": torch.zeros(4, 6)}
    batches = list(zip(x.split(35), y.split(35), strict=True))
    same = line(model, METRICS, batches, still, [0, 1, 2])["nll"]
    assert same[0] == same[1] == same[2]
    assert line(model, METRICS, batches, still, [0], seed=0)["nll"][0] == same[0]
    assert line(model, METRICS, batches, still, [0], seed=1)["nll"][0] != same[0]
    halves = [line(model, METRICS, batches[i : i + 1], still, [0])["nll"][0] for i in (0, 1)]
    assert halves[0] != halves[1]
    # The first batch alone sees the dropout mask it has among others: masks belong to batches.
    model.dropout.p = 0
    expected = [F.cross_entropy(copy.deepcopy(model)(a), b).item() for a, b in batches]
    found = line(model, METRICS, batches, still, [0])["nll"][0]
    assert found == pytest.approx(np.mean(expected), rel=1e-6)


def test_batchnorm_statistics_are_kept_or_recalibrated_and_the_result_says_which() -> None:
    model = Classifier(batch_norm=True).eval()
    x, y = images()
    (direction,) = random_directions(model, 1, seed=2)
    kept = line(model, METRICS, (x, y), direction, XS)
    sizes = [40, 20, 10]
    calibration = list(zip(x.split(sizes), y.split(sizes), strict=True))
    found = line(model, METRICS, (x, y), direction, XS, recalibrate=calibration)
    assert (kept.settings["batchnorm"], found.settings["batchnorm"]) == (
        "kept",
        "recalibrated",
    )
    for j, a in enumerate(XS):
        point = moved(model, [direction], [a])
        features = [point.conv(batch).detach() for batch in x.split(sizes)]
        weights = torch.tensor(sizes) / 70
        point.norm.running_mean = sum(
            w * f.mean((0, 2, 3)) for w, f in zip(weights, features, strict=True)
        )
        point.norm.running_var = sum(
            w * f.var((0, 2, 3)) for w, f in zip(weights, features, strict=True)
        )
        assert found["nll"][j] == pytest.approx(F.cross_entropy(point(x), y).item(), rel=1e-5)
    assert not np.allclose(found["nll"], kept["nll"], rtol=1e-3)


class Fails(nn.Module):
    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("calls", [0, 3, 10**6])
def test_the_model_and_the_generator_are_as_before_also_after_an_exception(
    training: bool, calls: int
) -> None:
    model = Classifier(batch_norm=True, dropout=0.3).train(training)
    model.head.weight.requires_grad_(False)
    model(images()[0]).sum().backward()
    before = snapshot(model)
    data, directions = images(), random_directions(model, seed=0)
    generator = rng()
    before[-1] = generator
    arguments = (model, {"nll": Fails(calls)}, data, directions, XS, YS)
    if calls < 1000:
        with pytest.raises(KeyboardInterrupt):
            surface(*arguments, recalibrate=data)
    else:
        surface(*arguments, recalibrate=data)
    assert_same(before, snapshot(model))
    assert all(name in dict(model.named_parameters()) for name in directions[0])


def test_bfloat16_is_close_and_said_so() -> None:
    model = Classifier(batch_norm=True).eval()
    data, (direction,) = images(), random_directions(model, 1, seed=0)
    exact = line(model, METRICS, data, direction, XS)
    rough = line(model, METRICS, data, direction, XS, bf16=True)
    precisions = exact.settings["precision"], rough.settings["precision"]
    assert precisions == ("float32", "bfloat16")
    assert not np.array_equal(rough["nll"], exact["nll"])
    np.testing.assert_allclose(rough["nll"], exact["nll"], rtol=2**-6)  # 8 bits, some products


def test_nan_and_infinity_stay() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    data = torch.ones(4, 1).double(), torch.ones(4, 1).double()
    metrics = {"log": lambda outputs, _: outputs.mean().log()}
    values = line(model, metrics, data, {"weight": torch.ones(1, 1).double()}, [-2, -1, 0])["log"]
    assert np.isnan(values[0])
    assert values[1] == -np.inf
    assert values[2] == 0


def test_direction_of_a_tied_parameter_moves_both_uses() -> None:
    model = Classifier().eval()
    x, y = images()
    direction = {"mix.weight": torch.randn(6, 6)}
    found = line(model, METRICS, (x, y), direction, [0.5])["nll"][0]
    expected = F.cross_entropy(moved(model, [direction], [0.5])(x), y).item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_an_empty_direction_goes_nowhere() -> None:
    model, data = Classifier().eval(), images()
    (direction,) = random_directions(model, 1, seed=0)
    found = surface(model, METRICS, data, [direction, {}], XS, YS, weight_decay=0.1)
    expected = line(model, METRICS, data, direction, XS, weight_decay=0.1)
    for name in ("nll", "error", "l2"):
        np.testing.assert_array_equal(found[name], np.stack([expected[name]] * len(YS)))


@pytest.fixture
def saving_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SAVE_EVERY", 0)


class Killed(Exception):
    pass


def killed_after(points: int, kept: list[Slice]) -> Callable[[Slice], None]:
    def save(partial: Slice) -> None:
        if partial.evaluated.sum() <= points:
            kept.append(copy.deepcopy(partial))
        if partial.evaluated.sum() == points:
            raise Killed

    return save


@pytest.mark.usefixtures("saving_at_once")
@pytest.mark.parametrize("points", [1, 4, 11])
def test_a_killed_and_resumed_surface_is_bit_for_bit_the_uninterrupted_one(points: int) -> None:
    model = Classifier(batch_norm=True, dropout=0.2).train()
    data, directions = images(), random_directions(model, seed=0)
    arguments = (model, METRICS, data, directions, XS, YS)
    whole = surface(*arguments, weight_decay=0.1)
    kept: list[Slice] = []
    with pytest.raises(Killed):
        surface(*arguments, weight_decay=0.1, save=killed_after(points, kept))
    partial = kept[-1]
    assert partial.evaluated.sum() == points
    assert np.isnan(partial["nll"][~partial.evaluated]).all()

    resumed = surface(*arguments, weight_decay=0.1, resume=partial)
    for name in whole:
        assert resumed[name].tobytes() == whole[name].tobytes()
    assert resumed.settings == whole.settings


@pytest.mark.usefixtures("saving_at_once")
def test_what_is_done_is_not_evaluated_again() -> None:
    model, data = Classifier().eval(), images(12)
    directions = random_directions(model, seed=0)
    calls = 0

    def counted(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return error(outputs, targets)

    kept: list[Slice] = []
    arguments = (model, {"error": counted}, data, directions, XS, YS)
    with pytest.raises(Killed):
        surface(*arguments, save=killed_after(5, kept))
    assert calls == 5
    surface(*arguments, resume=kept[-1])
    assert calls == 12


@pytest.mark.usefixtures("saving_at_once")
def test_what_belongs_to_another_measurement_is_not_resumed() -> None:
    model = Classifier().eval()
    data, directions = images(), random_directions(model, seed=0)
    partial = surface(model, METRICS, data, directions, XS, YS)
    for message, arguments in {
        "xs was": (data, directions, [0, 1, 2, 3], YS),
        "directions was": (data, directions[::-1], XS, YS),
        "fingerprint was": (images(), directions, XS, YS),
    }.items():
        with pytest.raises(InputError, match=message):
            surface(model, METRICS, *arguments, resume=partial)


def test_bad_input_is_named() -> None:
    model, data = Classifier().eval(), images()
    directions = random_directions(model, seed=0)
    for message, arguments in {
        "metrics: none": ({}, data, directions, XS, YS),
        "metrics: 'l2'": ({"l2": error}, data, directions, XS, YS),
        "model: it has no parameters": (METRICS, data, directions, XS, YS),
        "data: no batches": (METRICS, [], directions, XS, YS),
        "directions: 1, expected 2": (METRICS, data, directions[:1], XS, YS),
        "'nothing' is not a parameter": (METRICS, data, [{"nothing": data[0]}, {}], XS, YS),
        r"shape \(2,\) for mix.bias": (METRICS, data, [{"mix.bias": torch.ones(2)}, {}], XS, YS),
        "xs: ": (METRICS, data, directions, [0, np.nan], YS),
        "ys: ": (METRICS, data, directions, XS, []),
    }.items():
        bad = nn.Identity() if message.startswith("model") else model
        with pytest.raises(InputError, match=message):
            surface(bad, *arguments, weight_decay=0.1)


def test_several_sets_of_examples_at_once() -> None:
    """Training and test images at the same weights: each as if it were alone."""
    model = Classifier(dropout=0.5).train()
    x, y = images()
    train, test = (x[:40], y[:40]), [(x[40:50], y[40:50]), (x[50:], y[50:])]
    directions = random_directions(model, seed=0)
    both = surface(model, METRICS, {"train": train, "test": test}, directions, XS, YS)
    assert list(both) == [f"{name}/{metric}" for name in ("train", "test") for metric in METRICS]
    for name, data in (("train", train), ("test", test)):
        alone = surface(model, METRICS, data, directions, XS, YS)
        for metric in METRICS:
            np.testing.assert_array_equal(both[f"{name}/{metric}"], alone[metric])
