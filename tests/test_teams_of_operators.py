"""Curvature shared by processes: the numbers of one process to rounding, on each the same bits."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lossgeometry import (
    GGN,
    Fisher,
    Hessian,
    eigsh,
    max_eigenvalue_spectrum,
    spectral_density,
    trace,
)
from lossgeometry.running.distributed import ALONE
from tests.teams import run_team

OPERATORS = (Hessian, GGN, Fisher)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)
    ).double()


def batches(sizes=(5, 3, 4, 4)):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 6, generator=generator).double(),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for size in sizes
    ]


def measure(team):
    """All that is shared, as NumPy arrays by name."""
    found = {}
    model = network()
    for operator in OPERATORS:
        for name, data in (("ragged", batches()), ("one batch", batches((7,)))):
            A = operator(model, F.cross_entropy, data, weight_decay=0.1, team=team)
            v = torch.linspace(-1, 1, A.shape[0], dtype=torch.float64)
            found[f"{operator.__name__} of {name}"] = A @ torch.stack([v, v**2], dim=1)
        check = A.check()
        assert check.ok
        found[f"{operator.__name__} checked"] = check.finite_difference < 1e-5
    H = Hessian(model.eval(), F.cross_entropy, batches(), micro_batch=2, team=team)
    found["gradient"] = H.gradient()
    E = eigsh(H, 4, tol=1e-9, ncv=12)
    assert E.converged.all()
    found["eigenvalues"] = E.eigenvalues
    found["eigenvectors"] = E.eigenvectors * E.eigenvectors[0].sign()
    found["density"] = spectral_density(H, probes=2, steps=5).nodes
    found["trace"] = trace(H, matvecs=30).estimate
    S = max_eigenvalue_spectrum(
        model.train(), F.cross_entropy, batches((6,) * 7), k=3, tol=1e-9, team=team
    )
    found["spectrum"] = S.eigenvalues
    return {name: np.asarray(array) for name, array in found.items()}


@pytest.mark.parametrize("size", [2, 3])
def test_whatever_the_number_of_processes(tmp_path, size):
    alone = measure(ALONE)
    first, *others = run_team(size, measure, folder=tmp_path)
    for name, array in alone.items():
        np.testing.assert_allclose(first[name], array, rtol=1e-8, atol=1e-10, err_msg=name)
        for other in others:
            assert other[name].tobytes() == first[name].tobytes(), name


def basis_size(team):
    """Entries of the Lanczos basis that this process holds."""
    from lossgeometry.algorithms.krylov import Basis

    H = Hessian(network(), F.cross_entropy, batches(), team=team)
    return Basis(H, 11, seed=0).room.numel()


def test_each_process_holds_its_share_of_the_basis(tmp_path):
    shares = run_team(3, basis_size, folder=tmp_path)
    assert sum(shares) == basis_size(ALONE)
    assert max(shares) <= basis_size(ALONE) // 3 + 11
