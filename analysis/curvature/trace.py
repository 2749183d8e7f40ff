"""Trace, diagonal and Frobenius norm of a symmetric operator from products with random vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from analysis.curvature.eigensolver import SymmetricOperator
from models.errors import InputError

Method = Literal["hutchinson", "hutch++", "xtrace"]
DiagonalMethod = Literal["hutchinson", "xdiag"]
Value = TypeVar("Value", float, Tensor)


@dataclass(frozen=True)
class Estimate(Generic[Value]):
    """A stochastic estimate and its standard error."""

    estimate: Value
    standard_error: Value


def dot_columns(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of corresponding columns, float64."""
    return (a.double() * b.double()).sum(0)


def trace(
    A: SymmetricOperator, *, matvecs: int = 99, method: Method = "hutch++", seed: int = 0
) -> Estimate[float]:
    """Trace of a symmetric operator.

    Parameters
    ----------
    A
        Any object with ``shape``, ``dtype``, ``device`` and ``A @ V`` for (P, k) tensors.
    matvecs
        Products with `A`. P or more give the exact trace, from the unit vectors.
    method
        "hutchinson" (Hutchinson 1989): the mean of z·Az over random signs z; the standard error
        falls as 1 / sqrt(matvecs). "hutch++" (Meyer, Musco, Musco and Woodruff 2021, algorithm 1):
        a third of the products finds the range of `A` roughly, a third is its exact trace there,
        and a third is Hutchinson's on the rest; better where few eigenvalues are large. "xtrace"
        (Epperly, Tropp and Webber 2024, section 2.1): every vector is left out in turn of the range
        and used on the rest; better still, with (P, matvecs) numbers of memory.
    seed
        Of the random vectors.

    Raises
    ------
    InputError
        If the method is unknown, or too few products are allowed for a standard error: 2 for
        "hutchinson", 6 for "hutch++", 4 for "xtrace".
    """
    _require_method(method, get_args(Method))
    _require(matvecs, {"hutchinson": 2, "hutch++": 6, "xtrace": 4}[method])
    if matvecs >= A.shape[0]:
        return Estimate(float(_exact_diagonal(A).sum()), 0.0)
    if method == "hutch++":
        return _hutch_plus_plus(A, matvecs // 3, seed)
    if method == "xtrace":
        return _xtrace(A, matvecs // 2, seed)
    z = _signs(A, matvecs, seed)
    return _mean(dot_columns(z, A @ z))


def diagonal(
    A: SymmetricOperator,
    *,
    matvecs: int = 100,
    method: DiagonalMethod = "hutchinson",
    seed: int = 0,
) -> Estimate[Tensor]:
    """Diagonal of a symmetric operator, (P,) float64.

    Parameters
    ----------
    A, matvecs, seed
        As of `trace`; "hutchinson" is never exact.
    method
        "hutchinson" (Bekas, Kokiopoulou and Saad 2007): the mean of z * Az over random signs z, in
        the memory of a few vectors; the standard error of entry i is sqrt(the sum of squares of the
        rest of row i / matvecs). "xdiag" (Epperly, Tropp and Webber 2024, section 2.3): every
        vector is left out in turn of the range of `A` and used on the rest; better where few
        eigenvalues are large, with a few times (P, matvecs) numbers of memory.

    Raises
    ------
    InputError
        If the method is unknown, or too few products are allowed for a standard error: 2 for
        "hutchinson", 4 for "xdiag".
    """
    _require_method(method, get_args(DiagonalMethod))
    _require(matvecs, {"hutchinson": 2, "xdiag": 4}[method])
    if method == "xdiag":
        return _xdiag(A, matvecs, seed)
    generator = torch.Generator().manual_seed(seed)
    mean, squares = (torch.zeros(A.shape[0], dtype=torch.float64, device=A.device) for _ in "ab")
    for i in range(1, matvecs + 1):  # one at a time: any number of vectors in the memory of one
        z = _draw_signs(A, 1, generator)[:, 0]
        sample = z.double() * (A @ z).double()
        difference = sample - mean
        mean += difference / i
        squares += difference * (sample - mean)
    return Estimate(mean, (squares / (matvecs - 1) / matvecs).sqrt())


def frobenius_norm(A: SymmetricOperator, *, matvecs: int = 100, seed: int = 0) -> Estimate[float]:
    """Frobenius norm: the square root of the mean of ``|Az|^2`` over random signs z.

    The standard error is that of the mean, carried through the root to first order. Raises
    `InputError` if `matvecs` is less than 2.
    """
    _require(matvecs, 2)
    product = A @ _signs(A, matvecs, seed)
    square = _mean(dot_columns(product, product))
    norm = math.sqrt(square.estimate)
    return Estimate(norm, square.standard_error / (2 * norm) if norm else 0.0)


def _hutch_plus_plus(A: SymmetricOperator, k: int, seed: int) -> Estimate[float]:
    sketch, z = _signs(A, 2 * k, seed).split(k, dim=1)
    Q = torch.linalg.qr(A @ sketch).Q
    inside = float(dot_columns(Q, A @ Q).sum())
    z = z - Q @ (Q.T @ z)
    outside = _mean(dot_columns(z, A @ z))
    return Estimate(inside + outside.estimate, outside.standard_error)


def _xtrace(A: SymmetricOperator, k: int, seed: int) -> Estimate[float]:
    size = A.shape[0]
    omega = torch.randn(size, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    omega = (omega * math.sqrt(size) / omega.norm(dim=0)).to(A.device, A.dtype)  # on a sphere
    Y = A @ omega
    Q, R, S = _leave_one_out(Y)
    H = (Q.T @ (A @ Q)).double()
    W = (Q.T @ omega).double()
    inside = H.trace() - dot_columns(S, H @ S)
    P = W - S * dot_columns(S, W)  # Qᵀ times the part of ω_i within that range
    outside = dot_columns(omega, Y) - 2 * dot_columns(P, R) + dot_columns(P, H @ P)
    # Of a vector on a sphere it is known how long the part outside should be.
    outside = outside * (size - k + 1) / (size - dot_columns(P, P))
    return _mean(inside + outside)


def _xdiag(A: SymmetricOperator, matvecs: int, seed: int) -> Estimate[Tensor]:
    if matvecs >= A.shape[0]:
        exact = _exact_diagonal(A)
        return Estimate(exact, torch.zeros_like(exact))
    omega = _signs(A, matvecs // 2, seed)
    Q, R, S = _leave_one_out(A @ omega)
    AQ = A @ Q
    q = Q @ S.to(Q.dtype)  # q_i: what the range has of A ω_i alone
    # diag(P A) + ω_i * (I - P) A ω_i with P = Q Qᵀ - q_i q_iᵀ, where (I - Q Qᵀ) A ω_i = 0.
    changes = q * (omega * dot_columns(S, R).to(q.dtype) - AQ @ S.to(Q.dtype))
    spread = changes.double().std(1) / math.sqrt(changes.shape[1])
    return Estimate((Q * AQ).double().sum(1) + changes.double().mean(1), spread)


def _leave_one_out(Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``Y = QR``, and `S`: ``Q Qᵀ - q qᵀ`` with ``q = Q S_i`` projects on `Y` without column i.

    `Q` is (P, k) in the dtype of `Y`; `R` and `S` are (k, k) float64.
    """
    Q, R = torch.linalg.qr(Y)
    R = R.double()
    # Where Y has fewer dimensions than columns, any direction will do for those that it lacks.
    pivots = R.diagonal()
    least = torch.finfo(Y.dtype).eps * pivots.abs().max()
    pivots.masked_fill_(pivots.abs() <= least, float(least) or 1.0)
    identity = torch.eye(len(R), dtype=R.dtype, device=R.device)
    S = torch.linalg.solve_triangular(R, identity, upper=True).T
    return Q, R, S / S.norm(dim=0)


def _exact_diagonal(A: SymmetricOperator) -> Tensor:
    return (A @ torch.eye(A.shape[0], dtype=A.dtype, device=A.device)).diagonal().double()


def _signs(A: SymmetricOperator, n: int, seed: int) -> Tensor:
    """Random signs, (P, n)."""
    return _draw_signs(A, n, torch.Generator().manual_seed(seed))


def _draw_signs(A: SymmetricOperator, n: int, generator: torch.Generator) -> Tensor:
    bits = torch.randint(2, (A.shape[0], n), generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(A.device, A.dtype)


def _mean(samples: Tensor) -> Estimate[float]:
    error = samples.std() / math.sqrt(len(samples))
    return Estimate(float(samples.mean()), float(error))


def _require_method(method: str, known: tuple[str, ...]) -> None:
    if method not in known:
        raise InputError(f"method: {method!r}, expected one of {', '.join(known)}")


def _require(matvecs: int, least: int) -> None:
    if matvecs < least:
        raise InputError(f"matvecs: {matvecs}, expected at least {least}")
