"""The Hessian max eigenvalue spectrum: the leading eigenvalues of many mini-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from analysis.curvature.eigensolver import Eigenpairs, eigsh
from analysis.curvature.frozen import Data, LossFunction, as_batches
from analysis.curvature.hessian import Hessian
from analysis.curvature.power_iteration import power_iteration
from models.errors import InputError
from models.seeds import derive_seed

Solver = Literal["lanczos", "pyhessian"]


@dataclass(frozen=True)
class MaxEigenvalueSpectrum:
    """Eigenvalues of largest magnitude of every mini-batch, and what they say together.

    Standard errors are over mini-batches, the eigenvalues of one being dependent. A mini-batch
    whose Hessian is not finite has NaN eigenvalues, and so have NEP and APE.
    """

    eigenvalues: Tensor  # (n_batches, k) float64, largest magnitude first
    residuals: Tensor  # (n_batches, k) float64, ‖H x - λ x‖
    errors: Tensor  # (n_batches, k) float64, estimated error of each eigenvalue
    converged: Tensor  # (n_batches, k) bool
    matvecs: Tensor  # (n_batches,) int64, Hessian-vector products
    nep: float  # negative max eigenvalue proportion, the share of eigenvalues below zero
    nep_standard_error: float
    ape: float  # average of the positive max eigenvalues; NaN if there are none
    ape_standard_error: float


def max_eigenvalue_spectrum(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Data,
    k: int = 5,
    *,
    weight_decay: float = 0.0,
    params: str | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    solver: Solver = "lanczos",
    compile: bool = False,
    progress: Callable[[list[Any]], Iterable[Any]] | None = None,
) -> MaxEigenvalueSpectrum:
    """Top-`k` Hessian eigenvalues by magnitude of each mini-batch (Park and Kim 2022, Section 2).

    The objective is ``loss_fn`` plus ``weight_decay/2 * |theta|^2`` on the batches as they are: to
    measure the landscape a network is trained on, give augmented batches, its weight decay and the
    model in training mode. Each solve starts from the eigenvectors of the previous mini-batch.

    Parameters
    ----------
    model, loss_fn, weight_decay, params
        As of `Hessian`.
    batches
        One ``(x, y)`` or an iterable of them, typically of 16 images.
    k
        Eigenvalues for each mini-batch.
    tol
        Relative error of the eigenvalues; for "pyhessian" the relative change at which it stops.
    seed
        Of the start vectors and of what is random in the forward pass.
    solver
        "lanczos", or "pyhessian": power iteration with deflation by the PyHessian package, the
        protocol of the paper, which works in evaluation mode whatever the mode of the model.
    compile
        As of `Hessian`, once for all mini-batches of the size of the first.
    progress
        Wraps the list of mini-batches, as `tqdm.tqdm` does.

    Raises
    ------
    InputError
        No batches, `k` or `solver` out of range.
    """
    if solver not in get_args(Solver):
        raise InputError(f"solver: {solver!r}, expected one of {', '.join(get_args(Solver))}")
    drawn = as_batches(batches)
    pairs: list[Eigenpairs] = []
    H: Hessian | None = None
    for batch in drawn if progress is None else progress(drawn):
        batch_seed = derive_seed(seed, len(pairs))
        options: dict[str, Any] = {
            "weight_decay": weight_decay,
            "params": params,
            "seed": batch_seed,
        }
        if solver == "lanczos":
            H = (
                H.on(batch, seed=batch_seed)
                if H
                else Hessian(model, loss_fn, batch, compile=compile, **options)
            )
            v0 = _start(pairs[-1] if pairs else None, H, batch_seed)
            pairs.append(eigsh(H, k, tol=tol, v0=v0, seed=batch_seed))
        else:
            pairs.append(power_iteration(model, loss_fn, batch, k, tol=tol, **options))
    eigenvalues = torch.stack([pair.eigenvalues for pair in pairs])
    missing = torch.where(eigenvalues.isnan(), eigenvalues, 0.0)
    negative = (eigenvalues < 0) + missing
    positive = (eigenvalues > 0) + missing
    nep, nep_standard_error = _ratio_of_sums(negative.sum(1), torch.full((len(pairs),), k))
    ape, ape_standard_error = _ratio_of_sums((eigenvalues * positive).sum(1), positive.sum(1))
    return MaxEigenvalueSpectrum(
        eigenvalues=eigenvalues,
        residuals=torch.stack([pair.residuals for pair in pairs]),
        errors=torch.stack([pair.errors for pair in pairs]),
        converged=torch.stack([pair.converged for pair in pairs]),
        matvecs=torch.tensor([pair.matvecs for pair in pairs]),
        nep=nep,
        nep_standard_error=nep_standard_error,
        ape=ape,
        ape_standard_error=ape_standard_error,
    )


def _start(previous: Eigenpairs | None, H: Hessian, seed: int) -> Tensor | None:
    """Previous eigenvectors, and a random vector lest what is new be orthogonal to them."""
    if previous is None or not previous.eigenvalues.isfinite().all():
        return None
    generator = torch.Generator().manual_seed(derive_seed(seed, 0))
    random = torch.randn(H.shape[0], generator=generator, dtype=torch.float64)
    random = (random / random.norm()).to(H.device, H.dtype)
    return torch.cat([previous.eigenvectors, random[:, None]], dim=1)


def _ratio_of_sums(numerators: Tensor, denominators: Tensor) -> tuple[float, float]:
    """``sum(a) / sum(b)`` over (n,) mini-batches and its standard error by the delta method."""
    n, total = len(numerators), denominators.sum()
    ratio = numerators.sum() / total
    deviations = (numerators - ratio * denominators).square().sum()
    factor = n / (n - 1) if n > 1 else float("nan")  # one mini-batch tells nothing about spread
    return float(ratio), float((factor * deviations).sqrt() / total)
