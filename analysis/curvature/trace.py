"""Stochastic estimates of the trace, the diagonal and the Frobenius norm of an operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from analysis.curvature.eigensolver import SymmetricOperator
from models.errors import InputError

Method = Literal["hutchinson", "hutch++", "xtrace"]


@dataclass(frozen=True)
class StochasticEstimate:
    """An estimate, without bias but for `frobenius_norm`, and its standard error."""

    estimate: Tensor  # () or, of a diagonal, (P,); float64
    standard_error: Tensor  # the same shape; over the random vectors
    matvecs: int


def trace(
    A: SymmetricOperator, *, matvecs: int = 99, method: Method = "xtrace", seed: int = 0
) -> StochasticEstimate:
    """Trace of a symmetric operator.

    Parameters
    ----------
    A
        Any object with ``shape``, ``dtype``, ``device`` and ``A @ V`` for (P, k) tensors.
    matvecs
        Largest number of products with `A`; 2P of them give the exact trace.
    method
        "hutchinson" averages ``zᵀAz`` over random signs (error ~ 1/sqrt(matvecs)); "hutch++" (Meyer
        et al. 2021) and "xtrace" (Epperly, Tropp and Webber 2024, which uses every product twice)
        take the dominant part of the spectrum exactly and average over the rest (error ~ 1/matvecs
        or better). They keep (P, 2/3 matvecs) and (P, 2 matvecs) numbers.
    seed
        Of the random vectors.

    Raises
    ------
    InputError
        An unknown `method`, or fewer `matvecs` than its standard error needs: 2, 6 or 4.
    """
    if method not in get_args(Method):
        raise InputError(f"method: {method!r}, expected one of {', '.join(get_args(Method))}")
    least = {"hutchinson": 2, "hutch++": 6, "xtrace": 4}[method]
    if matvecs < least:
        raise InputError(f"matvecs: {matvecs}, expected at least {least} for {method}")
    generator = torch.Generator().manual_seed(seed)
    P = A.shape[0]
    if method != "hutchinson" and matvecs >= 2 * P:
        return StochasticEstimate(_exact_trace(A), torch.tensor(0.0, dtype=torch.float64), P)
    if method == "xtrace":
        return _xtrace(A, matvecs // 2, generator)
    rank = matvecs // 3 if method == "hutch++" else 0
    Q, Z = _dominant_space(A, rank, generator)
    G, AG = _complement_products(A, Q, matvecs - 2 * rank, generator)
    samples = _dot(G, AG)
    return _average(samples, _dot(Q, Z).sum(), matvecs)


def diagonal(A: SymmetricOperator, *, matvecs: int = 99, seed: int = 0) -> StochasticEstimate:
    """Diagonal of a symmetric operator, (P,), by Diag++ (Baston and Nakatsukasa 2022).

    ``A = QQᵀA + (I - QQᵀ)A``: the first diagonal is exact for an orthonormal `Q` of the dominant
    space, the second is the mean of ``z * (I - QQᵀ)Az`` over random signs `z`. For the parameters
    see `trace`; at least 6 `matvecs`.
    """
    if matvecs < 6:
        raise InputError(f"matvecs: {matvecs}, expected at least 6")
    generator = torch.Generator().manual_seed(seed)
    rank = matvecs // 3
    Q, Z = _dominant_space(A, rank, generator)
    signs = _signs(A, matvecs - 2 * rank, generator)
    rest = _project_out(Q, A @ signs)
    exact = (Q.double() * Z.double()).sum(1)
    return _average((signs.double() * rest.double()).T, exact, matvecs)


def frobenius_norm(A: SymmetricOperator, *, matvecs: int = 99, seed: int = 0) -> StochasticEstimate:
    """Frobenius norm of a symmetric operator, the root of the sum of its squared eigenvalues.

    ``‖A‖² = ‖AQ‖² + ‖A(I - QQᵀ)‖²``: the first is exact for an orthonormal `Q` of the dominant
    space, the second is the mean of ``‖A(I - QQᵀ)z‖²`` over random signs `z`. The square is
    estimated without bias; the standard error of its root is to first order. For the parameters see
    `trace`; at least 6 `matvecs`.
    """
    if matvecs < 6:
        raise InputError(f"matvecs: {matvecs}, expected at least 6")
    generator = torch.Generator().manual_seed(seed)
    rank = matvecs // 3
    Q, Z = _dominant_space(A, rank, generator)
    _, AG = _complement_products(A, Q, matvecs - 2 * rank, generator)
    square = _average(_dot(AG, AG), _dot(Z, Z).sum(), matvecs)
    norm = square.estimate.sqrt()
    error = torch.where(norm > 0, square.standard_error / (2 * norm), 0.0)
    return StochasticEstimate(norm, error, matvecs)


def _xtrace(A: SymmetricOperator, m: int, generator: torch.Generator) -> StochasticEstimate:
    """Mean over i of ``tr(PᵢAPᵢ) + c uᵢᵀAuᵢ`` with Pᵢ the projection on all Aω but that of ωᵢ.

    `u` is what Pᵢ leaves of ωᵢ, `c` makes it isotropic of the right length. With ``AΩ = QR`` the
    projection is ``Q(I - ssᵀ)Qᵀ``, with `s` the direction of column i of R⁻ᵀ, so that all follows
    from small matrices.
    """
    P = A.shape[0]
    omega = _gaussian(A, m, generator)
    Q, R = torch.linalg.qr(A @ omega)
    Z = A @ Q
    H, W, T = ((Q.T @ Z).double(), (Q.T @ omega).double(), (Z.T @ omega).double())
    R = R.double()
    size = R.diagonal().abs()
    if (size <= 10 * torch.finfo(A.dtype).eps * size.max()).any():
        # The products span the range of A, on which the trace is exact.
        exact = H.trace().cpu()
        return StochasticEstimate(exact, torch.zeros_like(exact), 2 * m)
    S = torch.linalg.solve_triangular(R.T, torch.eye(m).to(R), upper=False)
    S = S / torch.linalg.vector_norm(S, dim=0)
    sigma, HS, HW = _dot(S, W), H @ S, H @ W
    curvature = (
        -_dot(T, W)
        + _dot(W, HW)
        + sigma * (_dot(T, S) - _dot(W, HS) + _dot(S, R) - _dot(S, HW))
        + sigma**2 * _dot(S, HS)
    )
    length = _dot(omega, omega) - _dot(W, W) + sigma**2
    samples = H.trace() - _dot(S, HS) + (P - m + 1) * curvature / length
    return _average(samples, torch.zeros_like(samples[0]), 2 * m)


def _dominant_space(
    A: SymmetricOperator, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Orthonormal basis Q (P, rank) of the range of A times random signs, and AQ."""
    rank = min(rank, A.shape[0])
    if rank == 0:
        empty = torch.zeros(A.shape[0], 0, dtype=A.dtype, device=A.device)
        return empty, empty
    Q = torch.linalg.qr(A @ _signs(A, rank, generator)).Q
    return Q, A @ Q


def _complement_products(
    A: SymmetricOperator, Q: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    G = _project_out(Q, _signs(A, count, generator))
    return G, A @ G


def _project_out(Q: Tensor, vectors: Tensor) -> Tensor:
    return vectors - Q @ (Q.T @ vectors)


def _exact_trace(A: SymmetricOperator) -> Tensor:
    identity = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    return (A @ identity).double().trace().cpu()


def _signs(A: SymmetricOperator, count: int, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, (A.shape[0], count), generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(A.device, A.dtype)


def _gaussian(A: SymmetricOperator, count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(A.shape[0], count, generator=generator, dtype=torch.float64).to(
        A.device, A.dtype
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of the columns, accumulated in float64."""
    return torch.linalg.vecdot(a.double(), b.double(), dim=0)


def _average(samples: Tensor, exact: Tensor, matvecs: int) -> StochasticEstimate:
    """The exact part plus the mean over the first dimension of `samples`."""
    error = samples.std(0) / math.sqrt(len(samples))
    return StochasticEstimate((exact + samples.mean(0)).cpu(), error.cpu(), matvecs)
