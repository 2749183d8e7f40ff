"""Orthogonalisation against the bases of Krylov spaces."""

from __future__ import annotations

import torch
from torch import Tensor

from models.distributed import ALONE, Team


def orthogonalise(w: Tensor, basis: Tensor, team: Team = ALONE) -> tuple[Tensor, Tensor]:
    """Remove from vectors, in place, their components along orthonormal rows.

    The last two rows go first: but for rounding, and after a restart, they are all there is. Each
    pass corrects the rounding of the one before, so that the sum of their coefficients is exact to
    the rounding of what is left of `w`. Twice is enough (Giraud, Langou and Rozložník 2005).

    Parameters
    ----------
    w : (..., P) tensor
    basis : (..., j, P) tensor
    team : Team
        Processes that hold different entries of all these vectors, `P` each.

    Returns
    -------
    Coefficients (..., j) of the removed components and norms (...) of what is left, in float64.
    """
    total = torch.zeros(basis.shape[:-1], dtype=torch.float64, device=w.device)
    norm = torch.full(w.shape[:-1], torch.inf, dtype=torch.float64, device=w.device)
    for first in (max(0, basis.shape[-2] - 2), 0, 0):
        rows = basis[..., first:, :]
        # Several times faster than rows @ w on a CPU.
        coefficients = team.sum_(w[..., None, :] @ rows.mT)
        w -= (coefficients @ rows).squeeze(-2)
        total[..., first:] += coefficients.squeeze(-2)
        before, norm = norm, norm_of(w, team)
        if first == 0 and (norm > 0.5 * before).all():
            break
    return total, norm


def norm_of(w: Tensor, team: Team = ALONE) -> Tensor:
    """Norms (...) of vectors (..., P), in float64; see `orthogonalise`."""
    return team.sum_(torch.linalg.vector_norm(w, dim=-1, dtype=torch.float64).square()).sqrt()
