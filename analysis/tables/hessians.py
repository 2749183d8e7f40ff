"""Tables of spectra, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.measurements import labels
from analysis.measurements.schema import Measurement
from analysis.tables import Content, print_table


def print_spectra(measurements: Sequence[Measurement]) -> None:
    """Table of all measurements, then of each what its numbers are worth."""
    print_table(*spectra_table(measurements))
    for name, m in zip(labels.names(measurements), measurements, strict=True):
        report(name, m)


def spectra_table(measurements: Sequence[Measurement]) -> Content:
    """NEP, APE, the extreme eigenvalues and the trace of each measurement."""
    title = f"Hessian of {labels.objective(measurements[0])}; ± one standard error"
    columns = ["checkpoint", labels.kind(measurements), "epoch"]
    columns += ["NEP %", "APE", "smallest", "largest", "trace"]
    names = labels.names(measurements)
    return title, columns, [_row(name, m) for name, m in zip(names, measurements, strict=True)]


def _row(name: str, measurement: Measurement) -> list[str]:
    """Line of the table."""
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
        together = int(arrays.get("batches_at_a_time", 1))
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
