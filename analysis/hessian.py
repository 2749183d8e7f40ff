"""``python -m analysis.hessian``: Hessian spectra of checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tyro.conf import arg

from analysis.options import MeasurementOptions
from lossgeometry.errors import InputError
from models.cli import run

if TYPE_CHECKING:
    from torch import Tensor

    from analysis.measurements.schema import Measurement
    from analysis.objective import Objective
    from lossgeometry.running.distributed import Team
    from models.checkpoint import Checkpoint


TRACE_MATVECS = 60
_SETTINGS = (  # that decide the result
    *("objective", "split", "batch_size", "seed", "k", "batches", "tol"),
    *("density_batches", "probes", "steps", "layers", "float64"),
)
_SPECTRUM = (  # what is stored of a `MaxEigenvalueSpectrum`
    *("eigenvalues", "residuals", "errors", "converged", "matvecs", "together"),
    *("nep", "nep_standard_error", "ape", "ape_standard_error"),
)


@dataclass(frozen=True)
class Options(MeasurementOptions):
    """Measure the Hessian of a checkpoint's training objective.

    For each of many mini-batches of augmented training images, the eigenvalues of largest magnitude
    of the Hessian of NLL + L2 (the max eigenvalue spectrum of Park and Kim 2022), with NEP, the
    share of negative ones, and APE, the mean of the positive ones. For some of the mini-batches
    taken together, the density of all eigenvalues and the trace. Several snapshots of one training
    are also drawn against the epoch:

      python -m analysis.hessian --ckpt checkpoints/csan8.pt checkpoints/csan8/*.pt
    """

    at_least: ClassVar = ("batches", "layers")  # what was measured of more than asked for will do

    k: Annotated[int, arg(help="eigenvalues for each mini-batch")] = 5
    batches: Annotated[
        int, arg(help="mini-batches; what is stored of more of them counts, too")
    ] = 40
    tol: Annotated[float, arg(help="relative error of the eigenvalues")] = 1e-3
    density_batches: Annotated[
        int, arg(help="mini-batches that spectral density and trace are of, taken together")
    ] = 4
    probes: Annotated[int, arg(help="random vectors for the spectral density")] = 4
    steps: Annotated[int, arg(help="Lanczos steps for the spectral density")] = 40
    layers: Annotated[
        bool, arg(help="also the top eigenvalues of each layer's block of the Hessian")
    ] = False
    float64: Annotated[bool, arg(help="compute in double precision")] = False
    compile: Annotated[
        bool,
        arg(
            help="compile Hessian-vector products: a minute or two for each checkpoint, which "
            "networks of a million parameters repay with some thousand products"
        ),
    ] = False
    memory: Annotated[
        float | None,
        arg(
            metavar="GIB",
            help="budget for what Hessian-vector products have in common and for their threads; "
            "default: 2, on a GPU half of what is free",
        ),
    ] = None


def main(options: Options) -> None:
    """Measure each checkpoint, print a table, draw, and name the files."""
    from analysis.drawing import hessians
    from analysis.measurements import labels
    from analysis.tables import print_table
    from lossgeometry.running.devices import choose_device
    from lossgeometry.running.distributed import join

    options.require(k=1, batches=1, density_batches=1, probes=2, steps=2)
    if options.memory is not None and not 0 <= options.memory < math.inf:
        raise InputError(f"memory: {options.memory} found, expected 0 GiB or more")
    if not 0 <= options.tol < 1:
        raise InputError(f"tol: {options.tol} found, expected a relative error from 0 to below 1")
    team = join(choose_device(options.device).type)
    if options.density_batches > options.batches:
        raise InputError(
            f"density-batches: {options.density_batches} found, expected at most the "
            f"{options.batches} of --batches"
        )
    measurements = [measure(checkpoint, options, team) for checkpoint in options.open()]
    if team.rank:
        return
    names = labels.names(measurements)
    print_table(
        f"Hessian of {labels.objective(measurements[0])}; ± one standard error",
        [
            "checkpoint",
            labels.kind(measurements),
            "epoch",
            "NEP %",
            "APE",
            "smallest",
            "largest",
            "trace",
        ],
        [row(name, m) for name, m in zip(names, measurements, strict=True)],
    )
    for name, m in zip(names, measurements, strict=True):
        report(name, m)
    origin = labels.origin(measurements)
    for path in [
        *hessians.draw_hessians(measurements, options.out),
        *hessians.draw_hessian_comparison(measurements, options.out, origin=origin),
        *hessians.draw_hessian_training(measurements, options.out, origin=origin),
        *hessians.draw_layers(measurements, options.out),
    ]:
        print(f"wrote {path}")


def measure(checkpoint: Checkpoint, options: Options, team: Team) -> Measurement:
    """Spectra of a checkpoint, stored, or as they were stored before.

    Raises `InputError` if the Hessian fails its own check: its eigenvalues would be no one's.
    """
    import numpy as np

    from analysis.measurements.files import store, stored
    from analysis.tables import working
    from lossgeometry import Hessian, max_eigenvalue_spectrum, spectral_density, trace

    settings = {key: getattr(options, key) for key in _SETTINGS}
    group = options.group("hessian")
    unfinished = f"unfinished/{group}"
    common: dict[str, Any] = dict(checkpoint=checkpoint, options=settings)
    images = partial(options.fingerprints, checkpoint)
    begun = None
    if not options.force:
        found = team.first(lambda: stored(group, **common, data=images, at_least=options.at_least))
        if found:
            more = found.options["batches"] > options.batches
            of = f", of {found.options['batches']} mini-batches" if more else ""
            print(f"{found.path}:/{group} is there already{of}; --force measures it again")
            return found
        begun = team.first(lambda: stored(unfinished, **common, data=images))
        if begun:
            print(f"{begun.path}:/{group} was interrupted; going on from there")

    objective = options.build(checkpoint, options.batches)
    common["data"] = {options.split: objective.fingerprint}
    if options.float64:
        objective = objective.double()
    how: dict[str, Any] = dict(
        weight_decay=objective.weight_decay,
        seed=options.seed,
        memory=None if options.memory is None else int(options.memory * 2**30),
        compile=options.compile,
        team=team,
    )
    together = objective.batches[: options.density_batches]
    hessian = Hessian(objective.model, objective.loss, together, **how)
    with working("checking the Hessian"):
        check = hessian.check()
    hessian = hessian.on(together, seed=options.seed)  # the other keeps what the check was made of
    wrong = InputError(
        f"{checkpoint.path}: its Hessian-vector products are wrong: {check}; try "
        + ("another version of PyTorch" if options.float64 else "--float64")
    )
    if check.verdict == "wrong":
        raise wrong
    spectrum = max_eigenvalue_spectrum(
        objective.model,
        objective.loss,
        objective.batches,
        k=options.k,
        tol=options.tol,
        resume=begun.arrays if begun else None,
        save=partial(store, unfinished, **common),
        **how,
    )
    if check.verdict == "undecided" and check.smooth and spectrum.eigenvalues.isfinite().all():
        raise wrong  # there is no number for the products, yet there are eigenvalues
    with working("spectral density and trace"):
        density = spectral_density(
            hessian, probes=options.probes, steps=options.steps, seed=options.seed
        )
        whole = trace(hessian, matvecs=TRACE_MATVECS, seed=options.seed)
    grid = density.grid()
    smoothed = density.estimate(grid)
    arrays = {
        **{key: getattr(spectrum, key) for key in _SPECTRUM},
        "density/nodes": density.nodes,
        "density/weights": density.weights,
        "density/grid": grid,
        "density/density": smoothed.estimate,
        "density/standard_error": smoothed.standard_error,
        "density/systematic_error": smoothed.systematic_error,
        "density/bandwidth": density.bandwidth,
        "trace": whole.estimate,
        "trace_standard_error": whole.standard_error,
        "check/symmetry": check.symmetry,
        "check/finite_difference": check.finite_difference,
        "check/tolerance": check.tolerance,
    }
    if options.layers:
        del hessian  # the budget is for one at a time
        # Compiling for each layer anew would not pay.
        arrays |= by_layer(objective, together, options, **how | {"compile": False})
    final = {name: np.asarray(array) for name, array in arrays.items()}
    return team.first(lambda: store(group, final, in_place_of=unfinished, **common))


def by_layer(
    objective: Objective, batches: list[tuple[Tensor, Tensor]], options: Options, **how: Any
) -> dict[str, Any]:
    """Top eigenvalues of the diagonal block of each layer, all `batches` taken together.

    `how` is for `Hessian`. Layers of fewer than k parameters have NaN, and not converged, for what
    they lack.
    """
    import numpy as np
    from tqdm import tqdm

    from lossgeometry import Hessian, eigsh, per_layer

    parts = per_layer(Hessian, objective.model, objective.loss, batches, **how)
    names, eigenvalues, converged = [], [], []
    for name, block in tqdm(parts, desc="layers", unit="layer", leave=False, disable=None):
        k = min(options.k, block.shape[0])
        found = eigsh(block, k, tol=options.tol, seed=options.seed)
        names.append(name.encode())
        lacking = (0, options.k - k)
        eigenvalues.append(np.pad(found.eigenvalues, lacking, constant_values=np.nan))
        converged.append(np.pad(found.converged, lacking))
    return {
        "layers/names": np.array(names),
        "layers/eigenvalues": np.stack(eigenvalues),
        "layers/converged": np.stack(converged),
    }


def row(name: str, measurement: Measurement) -> list[str]:
    """Line of the table."""
    from analysis.measurements import labels

    arrays = measurement.arrays

    def estimate(key: str, digits: str, scale: float = 1.0) -> str:
        error = arrays[f"{key}_standard_error"]
        return f"{scale * arrays[key]:{digits}} ± {scale * error:{digits}}"

    return [
        name,
        labels.label(measurement),
        labels.epoch(measurement),
        estimate("nep", ".1f", 100) if arrays["nep"] else f"0 of {arrays['eigenvalues'].size}",
        estimate("ape", ".2f"),
        f"{arrays['eigenvalues'].min():.3g}",
        f"{arrays['eigenvalues'].max():.3g}",
        estimate("trace", ".1f"),
    ]


def report(name: str, measurement: Measurement) -> None:
    """Say what the numbers are worth, and where they are."""
    import numpy as np

    arrays = measurement.arrays
    unknown = int((~np.isfinite(arrays["eigenvalues"])).sum())
    if unknown:
        print(f"{name}: not a number for {unknown} of {arrays['eigenvalues'].size} eigenvalues")
    else:
        symmetry, difference, allowed = (
            float(arrays[f"check/{key}"]) for key in ("symmetry", "finite_difference", "tolerance")
        )
        jumps = "" if difference <= allowed else " (they say nothing: the gradient jumps)"
        print(
            f"{name}: Hessian {'not fully ' if jumps else ''}checked, asymmetry {symmetry:.1e}, "
            f"off finite differences {difference:.1e}{jumps}, allowed {allowed:.1e}"
        )
        together = int(arrays.get("together", 1))
        how = "one by one" if together == 1 else f"{together} at a time"
        worth = ""
        if "errors" in arrays:
            size = np.abs(arrays["eigenvalues"])
            relative = np.divide(arrays["errors"], size, where=size > 0, out=np.zeros_like(size))
            worth = f", eigenvalues off by an estimated {relative.max():.1e} at most"
        print(
            f"{name}: {len(arrays['eigenvalues'])} mini-batches solved {how}, "
            f"{arrays['matvecs'].mean():.1f} products each{worth}"
        )
        if unconverged := int((~arrays["converged"]).sum()):
            print(f"{name}: {unconverged} eigenvalues have not converged")
        if "layers/converged" in arrays:
            wanted = np.isfinite(arrays["layers/eigenvalues"])
            if unconverged := int((wanted & ~arrays["layers/converged"]).sum()):
                print(f"{name}: {unconverged} eigenvalues of layers have not converged")
    print(f"stored in {measurement.path}:/{measurement.name}")


if __name__ == "__main__":
    run(main, Options)
