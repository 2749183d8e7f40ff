"""Whether an operator is symmetric, as its products tell."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lossgeometry.errors import InputError


def require_symmetric(V: Tensor, AV: Tensor, dtype: torch.dtype) -> None:
    """Refuse an operator of which ``AV = A @ V`` is known and that is not symmetric.

    Of vectors of length 1 in random directions, the mean square of ``u·Av - v·Au`` is
    ``|A - Aᵀ|² / P²``, and that of ``|Av|`` is ``|A|² / P`` in Frobenius norms.

    Parameters
    ----------
    V, AV
        (P, k) of k > 1 random vectors of one length, or all P unit vectors, and their products.
    dtype
        In which the products were made.

    Raises
    ------
    InputError
        As of `require_small_asymmetry`.
    """
    P, k = V.shape
    V, AV = (block.to(torch.promote_types(dtype, torch.float32)) for block in (V, AV))
    pairs = V.T @ AV
    defect, length, scale = (
        float(torch.linalg.vector_norm(numbers, dtype=torch.float64))
        for numbers in (pairs - pairs.T, V[:, 0], AV)
    )
    require_small_asymmetry(defect * math.sqrt(P / (k - 1)), scale * length, dtype)


def require_small_asymmetry(defect: float, scale: float, dtype: torch.dtype) -> None:
    """Refuse a defect of symmetry beyond what rounding in products of this `dtype` explains.

    NaN is no defect: it is returned as what the operator is.

    Raises
    ------
    InputError
        If `defect` is more than is allowed, relative to `scale`, the norm of A.
    """
    allowed = allowed_asymmetry(dtype)
    if defect > allowed * scale:
        raise InputError(
            f"A: not symmetric: u·Av and v·Au differ by {defect / scale:.1e} of the norm of A, "
            f"expected at most {allowed:.1e}. Some second derivative is wrong, in every precision: "
            "write the layer that has it in other operations, or take the GGN, which has first "
            "derivatives only"
        )


def allowed_asymmetry(dtype: torch.dtype) -> float:
    """How far, relative to its norm, rounding in products of this `dtype` makes A asymmetric.

    Which is more than sqrt(eps): in float32, a ResNet-18 was seen to reach 6e-4.
    """
    return torch.finfo(dtype).eps ** (1 / 3)


def asymmetry(u: Tensor, Au: Tensor, v: Tensor, Av: Tensor) -> float:
    """``‖(A - Aᵀ)v‖ / ‖Av‖``, estimated with the rows of random `u` and `v`, all (n, P)."""
    Au, Av = Au.double(), Av.double()
    defect = ((u * Av).sum(1) - (v * Au).sum(1)).norm()
    return float(defect / Av.norm()) if defect else 0.0  # nothing out of nothing is no error
