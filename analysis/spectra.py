"""What is measured of the Hessian of an objective."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from analysis.measurements.recording import Recording
from analysis.objective import Objective
from analysis.tables import working
from lossgeometry import (
    Hessian,
    eigsh,
    max_eigenvalue_spectrum,
    per_layer,
    spectral_density,
    trace,
)
from lossgeometry.errors import InputError
from lossgeometry.running.saving import below
from lossgeometry.storing import to_arrays

TRACE_MATVECS = 60


def spectra(
    objective: Objective,
    recording: Recording,
    *,
    k: int,
    tol: float,
    density_batches: int,
    probes: int,
    steps: int,
    layers: bool,
    seed: int,
    memory: int | None,
    compile: bool,
) -> dict[str, Any]:
    """Arrays of a measurement "hessian": of each mini-batch, and of the first ones taken together.

    The parameters are those of `max_eigenvalue_spectrum` and `spectral_density`, and whether to add
    what `by_layer` finds. Progress is kept in `recording`. Raises `InputError` if the Hessian fails
    its own check: its eigenvalues would be no one's.
    """
    how: dict[str, Any] = dict(weight_decay=objective.weight_decay, seed=seed, memory=memory)
    how |= dict(compile=compile, team=recording.team)
    model, loss, together = objective.model, objective.loss, objective.batches[:density_batches]
    hessian = Hessian(model, loss, together, **how)
    with working("checking the Hessian"):
        check = hessian.check()
    hessian = hessian.on(together, seed=seed)  # the other keeps what the check was made of
    double = hessian.dtype.itemsize > 4
    wrong = InputError(
        f"{recording.checkpoint.path}: its Hessian-vector products are wrong: {check}; try "
        + ("another version of PyTorch" if double else "--float64")
    )
    if check.verdict == "wrong":
        raise wrong
    progress: dict[str, Any] = dict(resume=recording.begun or None, save=recording.save)
    spectrum = max_eigenvalue_spectrum(
        model, loss, objective.batches, k=k, tol=tol, **progress, **how
    )
    if check.verdict == "undecided" and check.smooth and spectrum.eigenvalues.isfinite().all():
        raise wrong  # there is no number for the products, yet there are eigenvalues
    density = spectral_density(hessian, probes=probes, steps=steps, seed=seed)  # with a bar
    with working("trace"):
        whole = trace(hessian, matvecs=TRACE_MATVECS, seed=seed)
    arrays = {
        **to_arrays(spectrum),
        **below("density", to_arrays(density)),
        **below("check", to_arrays(check)),
        "trace": whole.estimate,
        "trace_standard_error": whole.standard_error,
    }
    if layers:
        del hessian  # the budget is for one at a time
        # Compiling for each layer anew would not pay.
        arrays |= by_layer(objective, together, k=k, tol=tol, **how | {"compile": False})
    return arrays


def by_layer(
    objective: Objective,
    batches: list[tuple[Tensor, Tensor]],
    *,
    k: int,
    tol: float,
    seed: int,
    **how: Any,
) -> dict[str, Any]:
    """Top eigenvalues of the diagonal block of each layer, all `batches` taken together.

    `how` is for `Hessian`. Layers of fewer than k parameters have NaN, and not converged, for what
    they lack.
    """
    parts = per_layer(Hessian, objective.model, objective.loss, batches, seed=seed, **how)
    names, eigenvalues, converged = [], [], []
    for name, block in tqdm(parts, desc="layers", unit="layer", leave=False, disable=None):
        own = min(k, block.shape[0])
        found = eigsh(block, own, tol=tol, seed=seed)
        names.append(name.encode())
        lacking = (0, k - own)
        eigenvalues.append(np.pad(found.eigenvalues, lacking, constant_values=np.nan))
        converged.append(np.pad(found.converged, lacking))
    return {
        "layers/names": np.array(names),
        "layers/eigenvalues": np.stack(eigenvalues),
        "layers/converged": np.stack(converged),
    }
