"""``python -m tests.faults``: what is left of files when processes are killed and systems fail.

The real commands run on tiny checkpoints, as children of one process that has imported everything.
Some are killed (SIGKILL) at a random moment or in the middle of a random operation on files, others
meet a full disk, a clock that goes backwards, a damaged file and so on. After every fault each file
must be readable, what was finished must be the same to the byte, and progress must not have gone
back; in the end, the results must equal those of an undisturbed run to the byte. Every choice
derives from a seed.
"""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path

import h5py
import torch

from tests.faults.commands import COMMANDS
from tests.faults.trial import Trial


def inject_all(trial: Trial, kills: int, times: int) -> None:
    """So many kills over all commands, and the other faults so often for each command."""
    for i, command in enumerate(trial.commands):
        trial.kills(command, len(range(i, kills, len(trial.commands))))
        print(f"{command}: killed", file=sys.stderr, flush=True)
    for command in trial.commands:
        trial.failing_calls(command, 2 * times)
        for inject in (trial.small_disk, trial.damage, trial.two_at_once, trial.images_written):
            inject(command, times)
        trial.clock(command, 1)
        if command != "study":
            trial.other_images(command, times)
        if command not in ("train", "study"):
            trial.held_lock(command, 2 * times)
        if command == "nll":
            trial.little_memory(command, times)
        print(f"{command}: done", file=sys.stderr, flush=True)


def main() -> None:
    """Inject everything, print a table, and exit with 1 if anything was lost or corrupt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="in all, over the commands")
    parser.add_argument("--times", type=int, default=5, help="each other fault, for each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with the table
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(options.seed, Path(folder), options.commands)
        try:
            inject_all(trial, options.kills, options.times)
        finally:  # also what was done until it was interrupted
            print(trial.table())
    print(
        f"\nPython {platform.python_version()}, PyTorch {torch.__version__}, h5py "
        f"{h5py.version.version}, HDF5 {h5py.version.hdf5_version}, {platform.system()}; "
        f"seed {options.seed}; {(time.monotonic() - began) / 60:.0f} min"
    )
    sys.exit(1 if any(trial.wrong.values()) else 0)


if __name__ == "__main__":
    main()
