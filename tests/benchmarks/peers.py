"""Eigenvalues of mini-batches by other packages, all as (n, K), largest magnitude first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
K = 5


def pyhessian_spectrum(
    model: nn.Module, batches: list[Batch], tol: float, max_iter: int
) -> np.ndarray:
    """Power iteration with deflation."""
    from pyhessian import hessian

    found = []
    for i, batch in enumerate(batches):
        torch.manual_seed(i)
        model.zero_grad()
        peer = hessian(model, F.cross_entropy, data=batch, cuda=batch[0].is_cuda)
        found.append(peer.eigenvalues(maxIter=max_iter, tol=tol, top_n=K)[0])
        model.zero_grad()
    return by_magnitude(found)


def eigenthings_spectrum(model: nn.Module, batches: list[Batch], steps: int) -> np.ndarray:
    """Lanczos of a fixed number of steps."""
    from hessian_eigenthings import lanczos

    found = []
    for i, batch in enumerate(batches):
        result = lanczos(eigenthings_operator(model, [batch]), k=K, max_iter=steps, seed=i)
        found.append(result.eigenvalues.cpu().numpy())
    return by_magnitude(found)


def eigenthings_operator(model: nn.Module, batches: list[Batch]) -> object:
    """The peer's Hessian."""
    from hessian_eigenthings import HessianOperator, supervised_loss

    return HessianOperator(model, batches, supervised_loss(F.cross_entropy))


def curvlinops_spectrum(model: nn.Module, batches: list[Batch], tol: float) -> np.ndarray:
    """ARPACK."""
    found = []
    for i, batch in enumerate(batches):
        A = curvlinops_operator(model, [batch]).to_scipy()
        v0 = np.random.default_rng(i).standard_normal(A.shape[0]).astype(np.float32)
        found.append(scipy_eigsh(A, K, tol=tol, v0=v0, return_eigenvectors=False))
    return by_magnitude(found)


def curvlinops_operator(model: nn.Module, batches: list[Batch]) -> object:
    """The peer's Hessian."""
    from curvlinops import HessianLinearOperator

    parameters = list(model.parameters())
    return HessianLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, batches, check_deterministic=False
    )


def by_magnitude(rows: list[Sequence[float]]) -> np.ndarray:
    """(n, k), each row with the largest magnitude first."""
    found = np.array(rows, dtype=float)
    return np.take_along_axis(found, np.argsort(-np.abs(found), axis=1), axis=1)
