"""Numbers of ``python -m analysis.hessian`` against the dense Hessian and against pyhessian."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import hessian
from analysis.cuts import eigenvector_cut
from analysis.drawing import hessians
from analysis.measurements.files import load
from analysis.objective import build_objective
from analysis.spectra import by_layer
from analysis.tables.hessians import report
from lossgeometry import Hessian
from lossgeometry.errors import InputError
from lossgeometry.operators.checking import Check
from lossgeometry.seeds import derive_seed
from models import load_checkpoint, load_dataset
from models.recipes import PRESETS
from models.train import Options, untrained
from tests.dense import flat, rows

K, SIZE, BATCHES, SEED = 5, 2, 2, 7


def options_for(path):
    return hessian.Options(
        ckpt=(path,),
        k=K,
        batch_size=SIZE,
        batches=BATCHES,
        density_batches=BATCHES,
        tol=1e-10,
        float64=True,
        seed=SEED,
        out=path.parent,
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A small checkpoint, half a step into training, and what the command stores about it."""
    folder = tmp_path_factory.mktemp("hessian")
    path = folder / "small.pt"
    start = untrained(Options(out=path, window=3, dim=3, depth=2), load_dataset("digits"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in start.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    start.save(path)
    hessian.main(options_for(path))
    return path, load(path.with_suffix(".h5"), "hessian/train")


def frozen_loss(model, x, y, seed):
    """NLL + L2 of the recipe on one mini-batch, with stochastic depth drawn from `seed`."""
    recipe = PRESETS["digits"].recipe
    torch.manual_seed(seed)
    nll = torch.nn.functional.cross_entropy(model(x), y, label_smoothing=recipe.label_smoothing)
    return nll + recipe.weight_decay / 2 * sum(p.square().sum() for p in model.parameters())


def dense_hessian(model, x, y, seed):
    """By double backward."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(frozen_loss(model, x, y, seed), parameters, create_graph=True)
    return rows(flat(gradient), parameters)


def alone(batch):
    """Seed of a mini-batch that has a Hessian of its own."""
    return derive_seed(derive_seed(SEED, batch), 0)


def objective_of(path):
    checkpoint = load_checkpoint(path)
    dataset = load_dataset("digits")
    how = dict(batch_size=SIZE, batches=BATCHES, seed=SEED)
    return build_objective(checkpoint, dataset, **how).double()


@pytest.fixture(scope="module")
def each(measured):
    """The Hessian of each mini-batch, dense."""
    objective = objective_of(measured[0])
    seeded = [(x, y, alone(i)) for i, (x, y) in enumerate(objective.batches)]
    return [dense_hessian(objective.model, *own) for own in seeded]


@pytest.fixture(scope="module")
def together(measured):
    """The Hessian of all mini-batches taken together, dense."""
    objective = objective_of(measured[0])
    seeded = [(x, y, derive_seed(SEED, i)) for i, (x, y) in enumerate(objective.batches)]
    return torch.stack([dense_hessian(objective.model, *own) for own in seeded]).mean(0)


def test_eigenvalues_are_those_of_the_dense_hessian(measured, each):
    path, measurement = measured
    assert objective_of(path).model.blocks[1].drop_path1.p > 0
    for eigenvalues, matrix in zip(measurement.arrays["eigenvalues"], each, strict=True):
        torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-10 * float(matrix.norm()))
        exact = torch.linalg.eigvalsh((matrix + matrix.T) / 2).numpy()
        exact = exact[np.argsort(-np.abs(exact))[:K]]
        np.testing.assert_allclose(eigenvalues, exact, rtol=1e-8)


def test_dense_hessian_agrees_with_finite_differences_of_the_gradient(measured, each):
    objective = objective_of(measured[0])
    model, (x, y), matrix = objective.model, objective.batches[0], each[0]
    direction = torch.randn(len(matrix), dtype=torch.float64)
    step = 1e-6
    gradients, parameters = [], list(model.parameters())
    start = flat(parameters).detach()
    for there in (start + step * direction, start - step * direction):
        torch.nn.utils.vector_to_parameters(there, parameters)
        loss = frozen_loss(model, x, y, alone(0))
        gradients.append(flat(torch.autograd.grad(loss, parameters)))
    difference = (gradients[0] - gradients[1]) / (2 * step)
    error = (difference - matrix @ direction).norm() / difference.norm()
    assert error < 1e-7


def test_eigenvalues_are_those_of_pyhessian(measured):
    from pyhessian import hessian as pyhessian

    path, measurement = measured
    objective = objective_of(path)
    model = objective.model
    eigenvalues = measurement.arrays["eigenvalues"]
    for batch, (x, y) in enumerate(objective.batches[:1]):

        class Objective(
            torch.nn.Module
        ):  # pyhessian takes an outputs-targets criterion: all in one
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, inputs, batch=batch, y=y):
                self.model.train()  # pyhessian forces evaluation mode
                return frozen_loss(self.model, inputs, y, alone(batch))

        wrapped = Objective()
        theirs, _ = pyhessian(wrapped, lambda out, _: out, data=(x, y), cuda=False).eigenvalues(
            maxIter=1000, tol=1e-8, top_n=2
        )
        np.testing.assert_allclose(eigenvalues[batch][:2], theirs, rtol=1e-5)


def test_density_and_trace_agree_with_the_dense_hessian(measured, together):
    arrays = measured[1].arrays
    error = abs(arrays["trace"] - float(together.trace()))
    assert error <= 4 * arrays["trace_standard_error"]
    nodes, weights = arrays["density/nodes"], arrays["density/weights"]
    exact = torch.linalg.eigvalsh(together).numpy()
    assert nodes.min() >= exact[0] - 1e-8
    assert nodes.max() <= exact[-1] + 1e-8
    np.testing.assert_allclose(nodes.max(1), exact[-1], rtol=1e-6)
    np.testing.assert_allclose(weights.sum(1), 1)


@pytest.mark.parametrize("check", [Check(1.0, 0.0, 1e-8), Check(0.0, float("nan"), 1e-8)])
def test_eigenvalues_of_wrong_products_are_not_reported(measured, monkeypatch, check):
    path, _ = measured
    stored = path.with_suffix(".h5").read_bytes()
    monkeypatch.setattr(Hessian, "check", lambda self: check)
    with pytest.raises(
        InputError, match=r"small\.pt: .*products are wrong: asymmetric by .*1\.0e-08"
    ):
        hessian.main(replace(options_for(path), force=True))
    assert path.with_suffix(".h5").read_bytes() == stored
    with pytest.raises(InputError, match=r"directions: .*products are wrong"):
        eigenvector_cut(objective_of(path), seed=0, span=1.0)


def test_what_was_measured_with_layers_is_not_measured_again_without(tmp_path, measured, capsys):
    source, _ = measured
    path = Path(shutil.copy(source, tmp_path / "again.pt"))
    for layers in (True, False):
        small = dict(k=1, tol=1e-3, batches=1, density_batches=1, probes=2, steps=4)
        hessian.main(replace(options_for(path), layers=layers, **small, out=tmp_path))
    assert "is there already" in capsys.readouterr().out
    assert (tmp_path / "hessian_again_layers.png").exists()
    found = load(path.with_suffix(".h5"), "hessian/train")
    assert found.options["layers"]


def test_layers_have_the_eigenvalues_of_their_blocks(measured, together):
    objective = objective_of(measured[0])
    how = dict(weight_decay=objective.weight_decay, seed=SEED)
    found = by_layer(objective, objective.batches, k=K, tol=1e-10, **how)
    names = [name for name, _ in objective.model.named_parameters()]
    sizes = [p.numel() for p in objective.model.parameters()]
    owner = np.repeat([name.rpartition(".")[0] or name for name in names], sizes)
    for name, values, converged in zip(
        found["layers/names"], found["layers/eigenvalues"], found["layers/converged"], strict=True
    ):
        inside = owner == name.decode()
        exact = np.linalg.eigvalsh(together.numpy()[np.ix_(inside, inside)])
        exact = exact[np.argsort(-np.abs(exact))[:K]]
        assert converged.sum() == len(exact)
        np.testing.assert_allclose(values[: len(exact)], exact, rtol=1e-7, atol=1e-12)
        assert np.isnan(values[len(exact) :]).all()


def test_eigenvalues_of_layers_that_have_not_converged_are_not_drawn(measured, capsys):
    path, measurement = measured
    arrays = dict(measurement.arrays)
    arrays["layers/names"] = np.array([b"head"])
    arrays["layers/eigenvalues"] = np.array([[3.0, 2.0, np.nan]])
    arrays["layers/converged"] = np.array([[True, False, False]])
    some = replace(measurement, arrays=arrays)
    report("small", some)
    assert "small: 1 eigenvalues of layers have not converged" in capsys.readouterr().out
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hessians.plots, "plot_layers", lambda names, e, ax: drawn.append(e))
        hessians.draw_layers([some], path.parent)
    np.testing.assert_array_equal(drawn, [[[3.0, np.nan, np.nan]]])
