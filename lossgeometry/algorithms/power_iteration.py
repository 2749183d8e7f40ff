"""PyHessian's eigenvalues, the protocol of Park and Kim (2022), for comparison."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lossgeometry.algorithms.eigensolver import Eigenpairs
from lossgeometry.errors import InputError
from lossgeometry.objective import LossFunction
from lossgeometry.operators.hessian import Hessian
from lossgeometry.parameters import flatten, select_parameters
from lossgeometry.seeds import seeded


def power_iteration(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: tuple[Tensor, Tensor],
    k: int,
    *,
    weight_decay: float = 0.0,
    params: str | None = None,
    tol: float = 1e-3,
    seed: int = 0,
) -> Eigenpairs:
    """Top-`k` Hessian eigenvalues of one mini-batch by PyHessian's power iteration with deflation.

    It works on a copy of the model in evaluation mode, and stops at 100 products or when two
    successive estimates of an eigenvalue differ by less than `tol`, which is no bound of its
    error: residuals are computed here, by `k` more products. For the parameters see `Hessian`.
    """
    try:
        import pyhessian
    except ImportError as error:
        raise InputError(
            "solver: pyhessian is not installed, expected pip install pyhessian"
        ) from error

    model = copy.deepcopy(model).eval()
    selected = select_parameters(model, params)
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name in selected)

    def objective(outputs: Tensor, targets: Tensor) -> Tensor:
        penalty = sum(parameter.square().sum() for parameter in selected.values())
        return loss_fn(outputs, targets) + weight_decay / 2 * penalty

    device = next(model.parameters()).device
    batch = (batch[0].to(device), batch[1].to(device))
    with seeded(device, seed), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.. with create_graph")
        hessian = pyhessian.hessian(model, objective, data=batch, cuda=device.type == "cuda")
        products: list[Tensor] = []
        hessian.gradsH[0].register_hook(products.append)
        values, vectors = hessian.eigenvalues(maxIter=100, tol=tol, top_n=k)
    matvecs = len(products)
    for parameter in model.parameters():
        parameter.grad = None  # it holds its own graph, a cycle that would never be freed

    H = Hessian(model, loss_fn, batch, weight_decay=weight_decay, params=params, seed=seed)
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    X = torch.stack([flatten(vector) for vector in vectors], dim=1)
    residuals = (H @ X).double().cpu() - X.double().cpu() * eigenvalues
    norms = torch.linalg.vector_norm(residuals, dim=0)
    return Eigenpairs(
        eigenvalues=eigenvalues,
        eigenvectors=X,
        residuals=norms,
        errors=norms,
        converged=norms <= tol * eigenvalues.abs(),
        matvecs=matvecs,
    )
