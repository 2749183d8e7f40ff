"""``python -m analysis.study``: trainings, measurements, figures and claims of a declared study."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional

from lossgeometry.errors import InputError
from models.cli import DataRoot, Device, Minutes, arg, deadline_in, run, under_torchrun


@dataclass(frozen=True)
class Options:
    """Make all trainings of a study, measure them, draw every figure, and judge the claims.

    What is there already is not made again, and what was interrupted goes on where it stopped: give
    the same command again. The studies are TOML files in studies/; their format is described in
    analysis/plan.py. Examples:

      python -m analysis.study digits --processes 2

      python -m analysis.study paper --dry-run
    """

    study: Annotated[
        Positional[str], arg(metavar="NAME|FILE.toml", help="one of studies/, or a file")
    ]
    processes: Annotated[int, arg(help="trainings or measurements at once")] = 1
    together: Annotated[
        Literal["auto", "yes", "no"],
        arg(help="train the networks of a grid as one program; auto: on a GPU, compiled"),
    ] = "auto"
    minutes: Minutes = None
    only: Annotated[Literal["train", "measure", "figures"] | None, arg(help="this part alone")] = (
        None
    )
    dry_run: Annotated[bool, arg(help="print the plan and what it costs, and do nothing")] = False
    rate: Annotated[
        float | None,
        arg(
            metavar="IMAGES/S",
            help="of training, for the times of --dry-run; default: measured in a few steps",
        ),
    ] = None
    device: Device = "auto"
    data_root: DataRoot = None


def main(options: Options) -> None:
    """Do what is left to do of the study."""
    if under_torchrun():
        raise InputError(
            "torchrun: found around a study, expected none; the processes of a study are those of "
            "--processes"
        )
    if not 1 <= options.processes <= 1024:
        raise InputError(f"processes: {options.processes} found, expected at least 1, at most 1024")
    if options.rate is not None and not 0 < options.rate < math.inf:
        raise InputError(f"rate: {options.rate} found, expected more than 0 images/s")

    from analysis.cost import print_plan
    from analysis.execution import carry_out
    from analysis.plan import load_plan
    from lossgeometry.running.devices import choose_device

    common: dict[str, str] = {} if options.device == "auto" else {"device": options.device}
    if options.data_root is not None:
        common["data_root"] = str(options.data_root)
    deadline = deadline_in(options.minutes)
    plan = load_plan(options.study, common)
    device = choose_device(options.device).type
    together = options.together == "yes" or (options.together == "auto" and device == "cuda")
    if options.dry_run:
        print_plan(plan, device, options.rate, together=together, minutes=options.minutes)
        return
    carry_out(
        plan,
        (options.only,) if options.only else ("train", "measure", "figures"),
        processes=options.processes,
        together=together,
        compile=device == "cuda",
        deadline=deadline,
    )


if __name__ == "__main__":
    run(main, Options)
