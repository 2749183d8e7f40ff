"""Curvature while a network trains."""

import multiprocessing
import random

import h5py
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from lossgeometry import (
    CurvatureHistory,
    CurvatureTracker,
    Hessian,
    InputError,
    Preconditioned,
    eigsh,
    flatness,
    line,
    random_directions,
    stability_threshold,
)
from tests.dense import dense, flat


def digits(n=200):
    found = load_digits()
    images = torch.tensor(found.data[:n], dtype=torch.float32)
    return (images - images.mean()) / images.std(), torch.tensor(found.target[:n])


def squared_error(outputs, targets):
    return 0.5 * (outputs - F.one_hot(targets, 10)).square().sum(1).mean()


def network(width=16):
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))


def train(model, optimizer, batch, steps, *trackers):
    for _ in range(steps):
        optimizer.zero_grad()
        squared_error(model(batch[0]), batch[1]).backward()
        optimizer.step()
        for tracker in trackers:
            tracker.step()


@pytest.mark.parametrize("k", [1, 3])
def test_stated_errors_cover_the_truth_at_few_products(k):
    """Over a training whose largest eigenvalues cross, against the dense matrix."""
    images, labels = digits(100)
    batch = F.avg_pool2d(images.view(-1, 8, 8), 2).flatten(1), labels
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10))
    optimizer = SGD(model.parameters(), lr=0.2)
    tracker, found = CurvatureTracker(model, squared_error, batch, every=25, k=k), []
    for _ in range(20):
        train(model, optimizer, batch, 25, tracker)
        H = dense("hessian", model, squared_error, *batch).double()
        found.append(torch.linalg.eigvalsh(H).flip(0)[:k].numpy())
    history = tracker.result()
    off = np.abs(history.eigenvalues - np.array(found))
    assert (off <= history.errors + 1e-5 * np.array(found)).all()
    assert (history.errors < 0.1 * history.eigenvalues[:, :1]).all()
    assert np.median(history.errors / history.eigenvalues) < 0.02
    assert history.matvecs[1:].mean() <= 6 * k


def test_rows_are_what_their_names_say():
    batch, model, kept = digits(), network(), []
    optimizer = Adam(model.parameters(), lr=1e-3)
    (direction,) = random_directions(model, 1, seed=0)
    tracker = CurvatureTracker(
        model,
        squared_error,
        batch,
        every=5,
        k=2,
        weight_decay=0.1,
        trace=12,
        direction=direction,
        log=kept.append,
    )
    train(model, optimizer, batch, 14, tracker)
    train(model, optimizer, batch, 1)
    tracker.step()
    H, history = Hessian(model, squared_error, batch, weight_decay=0.1), tracker.result()
    assert history.steps.tolist() == [5, 10, 15]
    assert history.eigenvalues.shape == history.errors.shape == (3, 2)
    g = H.gradient()
    weights = flat(p.detach() for p in model.parameters())
    loss = squared_error(model(batch[0]), batch[1]).item() + 0.05 * float(weights @ weights)
    assert history.loss[-1] == pytest.approx(loss, rel=1e-5)
    assert history.gradient_norm[-1] == pytest.approx(float(g.norm()), rel=1e-5)
    assert history.gradient_curvature[-1] == pytest.approx(float(g @ (H @ g) / (g @ g)), rel=1e-4)
    dense_trace = float((H @ torch.eye(H.shape[0])).trace())
    assert abs(history.trace[-1] - dense_trace) < 6 * history.trace_error[-1] + 1e-3 * dense_trace
    assert np.isnan(history.threshold).all()
    xs = np.linspace(-1, 1, 21)
    flat_now = flatness(
        xs, line(model, {"loss": squared_error}, batch, direction, xs)["loss"][None]
    )
    assert history.width[-1] == pytest.approx(flat_now.width[0])
    assert history.sharpness[-1] == pytest.approx(flat_now.sharpness[0])
    assert kept[-1]["step"] == 15
    assert kept[-1]["eigenvalue_2"] == history.eigenvalues[-1, 1]
    assert all(isinstance(value, (int, float)) for row in kept for value in row.values())


class Noisy(nn.Module):
    """Dropout, batch normalisation and a running count."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        self.first, self.norm = nn.Linear(64, 16), nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        return self.last(F.dropout(F.relu(self.norm(self.first(x))), self.rate, self.training))


def noisy_training(tracked, precondition, tmp_path):
    """State after a training with shuffling, augmentation by three generators, and Adam."""
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    data, model = digits(), Noisy(0.0 if precondition else 0.3)
    loader = DataLoader(TensorDataset(*data), batch_size=32, shuffle=True)
    optimizer = Adam(model.parameters(), lr=1e-2)
    if tracked:
        (direction,) = random_directions(model, 1, seed=0)
        tracker = CurvatureTracker(
            model,
            F.cross_entropy,
            DataLoader(TensorDataset(*data), batch_size=50, shuffle=True),
            every=3,
            k=2,
            precondition=optimizer if precondition else None,
            trace=6,
            direction=direction,
            path=tmp_path / "rows.h5",
        )
    for _ in range(2):
        for x, y in loader:
            x = x + 0.1 * np.random.randn() + 0.1 * random.random() + 0.1 * torch.randn(64)  # noqa: NPY002
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if tracked:
                tracker.step()
    gradients = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    moments = {
        f"{i}{n}": t for i, s in optimizer.state_dict()["state"].items() for n, t in s.items()
    }
    streams = {
        "torch": torch.rand(1),
        "numpy": torch.tensor(np.random.rand()),  # noqa: NPY002
        "python": torch.tensor(random.random(), dtype=torch.float64),
    }
    assert model.training
    return model.state_dict() | gradients | moments | streams


@pytest.mark.parametrize("precondition", [False, True])
def test_a_training_with_it_is_the_training_without_it(precondition, tmp_path):
    alone = noisy_training(False, precondition, tmp_path)
    watched = noisy_training(True, precondition, tmp_path)
    assert alone.keys() == watched.keys()
    for name, tensor in alone.items():
        assert torch.equal(tensor, watched[name]), name
    assert len(CurvatureHistory.load(tmp_path / "rows.h5").steps) == 4


def unending(path, checkpoint, told):
    torch.manual_seed(0)
    batch, model = digits(), network(8)
    optimizer = SGD(model.parameters(), lr=0.1)
    how = dict(every=5, path=path, log=lambda row: told.send(row["step"]))
    tracker = CurvatureTracker(model, squared_error, batch, **how)
    train(model, optimizer, batch, 10, tracker)
    torch.save([model.state_dict(), optimizer.state_dict()], checkpoint)
    train(model, optimizer, batch, 100_000, tracker)


def test_a_killed_training_goes_on_with_its_rows(tmp_path):
    path, checkpoint = tmp_path / "rows.h5", tmp_path / "checkpoint.pt"
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    training = fork.Process(target=unending, args=[path, checkpoint, theirs])
    training.start()
    theirs.close()
    while ours.recv() < 40:
        pass
    training.kill()
    training.join()
    before = CurvatureHistory.load(path)
    assert before.steps[-1] >= 40

    batch, model = digits(), network(8)
    optimizer = SGD(model.parameters(), lr=0.1)
    for thing, state in zip((model, optimizer), torch.load(checkpoint), strict=True):
        thing.load_state_dict(state)
    how = dict(every=5, path=path)
    with pytest.raises(InputError, match=r"start=N keeps its rows"):
        CurvatureTracker(model, squared_error, batch, **how)
    with pytest.raises(InputError, match="k: 2, expected 1"):
        CurvatureTracker(model, squared_error, batch, k=2, start=10, **how)
    assert len(CurvatureHistory.load(path).steps) == len(before.steps)
    tracker = CurvatureTracker(model, squared_error, batch, start=10, **how)
    train(model, optimizer, batch, 20, tracker)
    after = CurvatureHistory.load(path)
    assert after.steps.tolist() == [5, 10, 15, 20, 25, 30]
    np.testing.assert_array_equal(after.eigenvalues[:2], before.eigenvalues[:2])
    np.testing.assert_allclose(after.loss, before.loss[:6], rtol=1e-6)
    assert (
        np.abs(after.eigenvalues - before.eigenvalues[:6]) <= after.errors + before.errors[:6]
    ).all()


def test_a_training_that_diverges_leaves_holes_and_may_come_back():
    batch, model = digits(), network()
    tracker = CurvatureTracker(model, squared_error, batch, every=1)
    good = model[0].weight.detach().clone()
    tracker.step()
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    tracker.step()
    with torch.no_grad():
        model[0].weight.copy_(good)
    tracker.step()
    tracker.step()
    history = tracker.result()
    assert np.isnan(history.eigenvalues[:, 0]).tolist() == [False, True, False, False]
    assert history.eigenvalues[3, 0] == pytest.approx(history.eigenvalues[0, 0], rel=0.02)


def test_as_many_eigenvalues_as_there_are_parameters():
    x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    tracker = CurvatureTracker(nn.Linear(2, 1, bias=False), F.mse_loss, (x, y), every=1, k=2)
    for _ in range(3):
        tracker.step()
    np.testing.assert_allclose(tracker.result().eigenvalues, [[4.0, 1.0]] * 3, rtol=1e-5)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_fewer_directions_have_curvature_than_are_followed(k):
    """What is left of them is rounding, of which no vectors are made."""
    torch.manual_seed(0)
    x = torch.zeros(64, 40, dtype=torch.float64)
    x[:, 0] = x[::2, 1] = 1
    data, model = (
        (x, torch.zeros(64, 1, dtype=torch.float64)),
        nn.Linear(40, 1, bias=False).double(),
    )
    tracker = CurvatureTracker(model, F.mse_loss, data, every=1, k=k)
    for _ in range(5):
        tracker.step()
    expected = torch.linalg.eigvalsh(2 * x.T @ x / 64).flip(0)[:k]
    found = tracker.result()
    np.testing.assert_allclose(found.eigenvalues, expected.expand(5, k), rtol=0.02, atol=1e-12)
    assert found.matvecs[1:].max() <= k + 4


def test_the_picture_has_the_threshold():
    batch, model = digits(), network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    tracker = CurvatureTracker(model, squared_error, batch, every=2, precondition=optimizer)
    train(model, optimizer, batch, 6, tracker)
    ax = tracker.plot()
    eigenvalue, threshold = (curve.get_ydata() for curve in ax.lines)
    np.testing.assert_array_equal(eigenvalue, tracker.result().eigenvalues[:, 0])
    np.testing.assert_array_equal(threshold, [stability_threshold(optimizer)] * 3)


def test_gradients_of_rounding_alone():
    """Those of a bias in front of a batch normalisation: Adam divides by their size."""
    batch, model = digits(50), Noisy(0.0)
    optimizer = Adam(model.parameters(), lr=1e-2)
    tracker = CurvatureTracker(model, squared_error, batch, every=2, precondition=optimizer)
    train(model, optimizer, batch, 6, tracker)
    truth = Hessian(model.double(), squared_error, (batch[0].double(), batch[1]))
    expected = eigsh(Preconditioned(truth, optimizer), 1, which="LA", tol=1e-5).eigenvalues
    found = tracker.result()
    assert abs(found.eigenvalues[-1, 0] - float(expected)) <= found.errors[-1, 0]


def test_what_cannot_be_measured_does_not_end_the_training():
    """Because second derivatives are wrong, here those of a factor that counts ten times."""

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(context, x, factor):
            context.save_for_backward(x, factor)
            return x * factor

        @staticmethod
        def backward(context, gradient):
            x, factor = context.saved_tensors
            return gradient * factor, 10 * (gradient * x).sum(0)

    class Scaled(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.factor = nn.Parameter(torch.ones(sizes[1]))

        def forward(self, x):
            return Times.apply(super().forward(x), self.factor)

    batch, model = digits(), nn.Sequential(Scaled(64, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = SGD(model.parameters(), lr=0.1)
    tracker = CurvatureTracker(model, squared_error, batch, every=1)
    with pytest.warns(UserWarning, match="no eigenvalues: A: not symmetric"):
        train(model, optimizer, batch, 2, tracker)
    history = tracker.result()
    assert np.isnan(history.eigenvalues).all()
    assert np.isfinite(history.loss).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every: 0, expected at least 1"),
        ({"k": 0}, "k: 0, expected 1 to"),
        ({"loss_fn": None, "direction": {}}, "direction: expected a loss_fn"),
    ],
)
def test_says_what_it_cannot_use(options, message):
    with pytest.raises(InputError, match=message):
        CurvatureTracker(
            **{"model": network(), "loss_fn": squared_error, "probe": digits()} | options
        )


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["x"] = 1
    with pytest.raises(InputError, match="expected a saved CurvatureHistory"):
        CurvatureHistory.load(path)
    path.write_text("no HDF5")
    with pytest.raises(InputError, match=r"other\.h5"):
        CurvatureTracker(network(), squared_error, digits(), path=path, start=0)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: SGD(p, lr=0.1),
        lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    ],
    ids=["gradient descent", "Nesterov"],
)
def test_edge_of_stability(make_optimizer):
    """Cohen et al., arXiv 2103.00065: with full batches, the curvature rises to it and stays."""
    layers = (nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    batch, model = digits(), nn.Sequential(*layers)
    optimizer = make_optimizer(model.parameters())
    tracker = CurvatureTracker(model, squared_error, batch, every=25, precondition=optimizer)
    train(model, optimizer, batch, 800, tracker)
    sharpness = tracker.result().eigenvalues[:, 0]
    assert sharpness[0] < 0.9 * stability_threshold(optimizer)
    assert sharpness[-8:].mean() == pytest.approx(stability_threshold(optimizer), rel=0.05)
