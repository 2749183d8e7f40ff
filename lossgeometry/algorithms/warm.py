"""Largest eigenvalues of an operator that has changed a little since they were last found."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lossgeometry.algorithms.eigensolver import Eigenpairs, SymmetricOperator
from lossgeometry.algorithms.krylov import orthogonalise
from lossgeometry.symmetry import require_small_asymmetry

NOISE = 0.1  # of the start, relative to the old eigenvectors: for what was orthogonal to them


def follow(
    A: SymmetricOperator, previous: Tensor, *, tol: float, maxiter: int, seed: int = 0
) -> Eigenpairs:
    """Largest eigenvalues, from the space of the `previous` eigenvectors (P, m).

    Rayleigh and Ritz's procedure in that space, which grows by the largest of the residuals. Where
    `eigsh` starts from the sum of old vectors and has to tell them apart again, each of them is
    here from the beginning; and where `eigsh` makes sure that nothing is missing, this trusts them
    to have been the right ones, of which the last stands guard: it is in the space for the
    eigenvalue that may become one of the others.

    Parameters
    ----------
    A
        As of `eigsh`.
    previous
        The eigenvectors to follow and, last, that of the eigenvalue after them.
    tol
        Relative error of the first ``m - 1`` that is enough.
    maxiter
        Largest number of products, at least m.
    seed
        Of a little noise, so that what was orthogonal to the old vectors does not stay unseen.

    Returns
    -------
    Eigenpairs
        All m, descending. An eigenvalue is at most its error away from one of `A`, and its error
        reaches as far as any smaller Ritz value may, within its own residual. Of an operator that
        returns NaN or infinity they are NaN.
    """
    P, m = previous.shape
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(m, P, generator=generator).to(previous) * (NOISE / math.sqrt(P))
    waiting = list(previous.T + noise)
    basis, products = torch.empty(2, min(maxiter, P), P, dtype=A.dtype, device=A.device)
    for size in range(1, len(basis) + 1):
        row = basis[size - 1].copy_(waiting.pop(0))
        _, norm = orthogonalise(row, basis[: size - 1])
        row /= norm.to(row)
        products[size - 1] = A @ row
        if waiting:
            continue
        T = (basis[:size] @ products[:size].T).double().cpu().numpy()
        if not np.isfinite(T).all():
            break
        scale = float(np.abs(T).max())
        require_small_asymmetry(float(np.abs(T - T.T).max()), scale, A.dtype)
        ascending, rotation = np.linalg.eigh((T + T.T) / 2)
        values = ascending[::-1].copy()
        S = torch.from_numpy(rotation.T[::-1].copy()).to(basis)
        vectors = S @ basis[:size]
        left = S @ products[:size] - torch.from_numpy(values).to(basis)[:, None] * vectors
        residuals = torch.linalg.vector_norm(left, dim=1, dtype=torch.float64).cpu().numpy()
        rounding = 10 * torch.finfo(A.dtype).eps * scale
        reach = values + residuals + rounding
        errors = np.maximum.accumulate(reach[::-1])[::-1][:m] - values[:m]
        converged = errors <= tol * np.abs(values[:m])
        largest = int(residuals[:m].argmax())
        if converged[: m - 1].all() or residuals[largest] <= rounding:
            break  # what is rounding has no direction of its own
        waiting = [left[largest]]
    if not np.isfinite(T).all():
        nan = torch.full((m,), math.nan, dtype=torch.float64)
        none = torch.zeros(m, dtype=torch.bool)
        return Eigenpairs(nan, torch.full_like(previous, math.nan), nan, nan, none, size)
    return Eigenpairs(
        eigenvalues=torch.from_numpy(values[:m]),
        eigenvectors=vectors[:m].T,
        residuals=torch.from_numpy(residuals[:m]),
        errors=torch.from_numpy(errors),
        converged=torch.from_numpy(converged),
        matvecs=size,
    )
