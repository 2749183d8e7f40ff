"""Commands of two checkouts by turns: ``python -m tests.benchmarks.bench_commands OTHER``.

OTHER is the folder of another checkout, of the commit before, say. Each side measures copies of the
shipped checkpoints from nothing, and then finds what it has stored. The table has the ratios of
medians over the turns, and the largest difference of what is stored, relative to its array.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np

from tests.benchmarks.table import Row, write_table

HERE = Path(__file__).resolve().parents[2]
COMMANDS = {
    "landscape": ("analysis.landscape",),
    "hessian csan8": ("analysis.hessian", "--ckpt", "checkpoints/csan8.pt"),
}
HOW = ("from nothing", "stored")
GOALS = {("landscape", HOW[0]): 1.35, ("hessian csan8", HOW[0]): 1.1}


def spend(command: tuple[str, ...], checkout: Path, folder: Path) -> tuple[float, float]:
    """Seconds of wall time and of CPU time."""
    start, before = time.perf_counter(), os.times()
    subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    wall, after = time.perf_counter() - start, os.times()
    return wall, sum(after[2:4]) - sum(before[2:4])


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """All that is stored."""
    found = {}
    for path in sorted(folder.rglob("*.h5")):
        with h5py.File(path) as file:
            file.visititems(
                lambda name, item: (
                    found.update({f"{path.name}:/{name}": item[()]})  # noqa: B023
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
    return found


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest relative to the largest number of its array; infinite for other names."""
    if one.keys() != other.keys():
        return np.inf
    largest = 0.0
    for name, array in one.items():
        if array.dtype.kind == "f" and array.shape == other[name].shape:
            size = np.nanmax(np.abs(array), initial=1e-300)
            largest = max(largest, float(np.nanmax(np.abs(array - other[name]), initial=0) / size))
        elif not np.array_equal(array, other[name]):
            return np.inf
    return largest


def compare(other: Path, turns: int, commands: Iterable[str]) -> Iterator[Row]:
    """Rows of the table: medians of the times of the other checkout over those of this one."""
    sides = {"other": other.resolve(), "here": HERE}
    for name in commands:
        spent: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for turn in range(turns):
            stored = {}
            for side in sorted(sides, reverse=turn % 2 == 1):
                with tempfile.TemporaryDirectory() as scratch:
                    folder = Path(scratch, "checkpoints")
                    folder.mkdir()
                    for path in HERE.glob("checkpoints/csan?.pt"):
                        shutil.copy(path, folder)
                    for how in HOW:
                        seconds = spend(COMMANDS[name], sides[side], Path(scratch))
                        spent.setdefault((how, side), []).append(seconds)
                    stored[side] = arrays(folder)
        apart = f"numbers {difference(stored['other'], stored['here']):.0e} apart"
        for how in HOW:
            one, here = (np.median(spent[how, side], axis=0) for side in ("other", "here"))
            for i, what in enumerate(("wall", "CPU")):
                work = f"{name}, {how}, {here[i]:.1f} s of {what} time, {apart}"
                yield work, "the other checkout", one[i] / here[i], GOALS.get((name, how), 1.0)


def main() -> None:
    """Alternate, compare, and write commands.md."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_commands")
    parser.add_argument("other", type=Path, help="folder of another checkout")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("commands.md"))
    options = parser.parse_args()
    rows = compare(options.other, options.turns, options.commands)
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    write_table(options.out, rows, packages=("torch", "numpy", "h5py"), threads=threads)


if __name__ == "__main__":
    main()
