"""``python -m tests.fuzz``: feed hostile and broken input to everything that reads files.

Every input has to end in success or in an `InputError` of one line, in time, without much memory
and without a change on disk. Input number i depends on the seed and i alone. Inputs are read in a
process of their own, so that a crash of a library is counted, too; what failed is saved.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import multiprocessing.sharedctypes
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

OUTCOMES = ("refused", "accepted", "tracebacks", "hangs", "memory", "disk", "crashes")
PATIENCE = 10.0  # seconds of computing for one input; waiting counts for a twelfth
MEMORY = 2**32  # bytes that are there to be taken
MODEST = 2**28  # bytes that reading may take


class Timeout(BaseException):
    """An input took too long."""


def _interrupt(*_: object) -> None:
    raise Timeout


class Shared:
    """What the process that reads tells the one that watches."""

    def __init__(self, targets: int) -> None:
        raw = multiprocessing.sharedctypes.RawArray
        self.counts = raw(ctypes.c_int64, targets * len(OUTCOMES))
        self.slowest = raw(ctypes.c_double, targets)
        self.seconds = raw(ctypes.c_double, targets)
        self.now = raw(ctypes.c_double, 2)  # the input, and when it was begun

    def count(self, target: int, outcome: str, by: int = 1) -> None:
        """Count an outcome."""
        self.counts[target * len(OUTCOMES) + OUTCOMES.index(outcome)] += by


def chosen(targets: list[Any], seed: int, i: int) -> tuple[int, bytes]:
    """Input number `i`: its target and its bytes."""
    rng = random.Random(f"{seed} {i}")
    number = rng.choices(range(len(targets)), [t.weight for t in targets])[0]
    return number, targets[number].make(rng)


def attempt(read: Any, content: bytes) -> tuple[str, str]:
    """Outcome of one input, and the traceback if there is one."""
    from lossgeometry.errors import InputError

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        read(content)
        outcome, detail = "accepted", ""
    except InputError as error:
        outcome, detail = "refused", ""
        if "\n" in str(error) or len(str(error)) > 10_000:
            outcome, detail = "tracebacks", f"not one short line: {str(error)[:2000]!r}"
        if isinstance(error.__cause__, MemoryError):
            outcome, detail = "memory", traceback.format_exc()
    except Timeout:
        outcome, detail = "hangs", traceback.format_exc()
    except OSError as error:
        outcome = "tracebacks" if error.filename is None else "refused"
        detail = traceback.format_exc()
    except Exception:
        outcome, detail = "tracebacks", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if grown > MODEST:
        return "memory", f"{grown} bytes"
    return outcome, detail


def work(shared: Shared, seed: int, first: int, last: int, kept: Path, folder: Path) -> None:
    """Read inputs `first` to `last` in `folder`, one after another."""
    import torch

    from tests.fuzz.targets import all_targets, shorten

    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    shorten()
    targets = all_targets()
    os.chdir(folder)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _interrupt)
    for i in range(first, last):
        shared.now[:] = i, time.monotonic()
        number, content = chosen(targets, seed, i)
        began = time.process_time()
        shared.now[:] = i, time.monotonic()
        outcome, detail = attempt(targets[number].read, content)
        took = time.process_time() - began
        left = {name for name in os.listdir() if not name.startswith(("in.", "resume."))}
        if left:
            outcome, detail = "disk", f"left on disk: {left}"
            for name in left:
                shutil.rmtree(name) if os.path.isdir(name) else os.unlink(name)
        if outcome not in ("refused", "accepted"):
            keep(kept, f"{outcome}-{targets[number].name}-{i}", content, detail)
        shared.count(number, outcome)
        shared.seconds[number] += took
        shared.slowest[number] = max(shared.slowest[number], took)
    shared.now[:] = last, time.monotonic()


def keep(folder: Path, name: str, content: bytes, detail: str) -> None:
    """Save an input that failed, and how; at most some hundred."""
    folder.mkdir(parents=True, exist_ok=True)
    if len(list(folder.iterdir())) < 400:
        (folder / f"{name}.input").write_bytes(content)
        (folder / f"{name}.txt").write_text(detail)


def fuzz(inputs: int, seed: int, seconds: float, kept: Path, *, quiet: bool = False) -> Any:
    """Read so many inputs, or as many as the time allows; returns names, counts and times."""
    from tqdm import tqdm

    from tests.fuzz.targets import all_targets

    targets = all_targets()
    shared, context = Shared(len(targets)), multiprocessing.get_context("fork")
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    end, done = time.monotonic() + seconds, 0
    bar = tqdm(total=inputs, unit="input", disable=quiet)
    with tempfile.TemporaryDirectory(dir=where) as scratch:
        while done < inputs and time.monotonic() < end:
            folder = Path(scratch, str(done))
            folder.mkdir()
            shared.now[:] = done, time.monotonic()
            process = context.Process(
                target=work, args=(shared, seed, done, inputs, kept, folder), daemon=True
            )
            process.start()
            killed = False
            while process.is_alive():
                process.join(0.5)
                bar.update(int(shared.now[0]) - bar.n)
                late = time.monotonic() - shared.now[1] > 12 * PATIENCE
                if late or time.monotonic() > end:
                    killed = True
                    process.kill()
                    process.join()
            done = int(shared.now[0])
            if done < inputs and not (killed and not late):
                number, content = chosen(targets, seed, done)
                outcome = "hangs" if killed else "crashes"
                keep(
                    kept, f"{outcome}-{targets[number].name}-{done}", content, str(process.exitcode)
                )
                shared.count(number, outcome)
                done += 1
    bar.update(done - bar.n)
    bar.close()
    return targets, shared, done


def report(targets: list[Any], shared: Shared) -> str:
    """Table of what became of the inputs."""
    rows = [["target", "inputs", *OUTCOMES, "mean ms", "slowest ms"]]
    for n, target in enumerate(targets):
        counts = shared.counts[n * len(OUTCOMES) : (n + 1) * len(OUTCOMES)]
        total = sum(counts)
        times = [1000 * shared.seconds[n] / max(total, 1), 1000 * shared.slowest[n]]
        rows.append([target.name, f"{total:,}", *(f"{c:,}" for c in counts)])
        rows[-1] += [f"{t:.2f}" for t in times]
    sums = [sum(shared.counts[i :: len(OUTCOMES)]) for i in range(len(OUTCOMES))]
    rows.append(["all", f"{sum(sums):,}", *(f"{c:,}" for c in sums), "", ""])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> int:
    """Parse the options, read the inputs, print the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--kept", type=Path, default=Path(tempfile.gettempdir(), "fuzz-failures"))
    options = parser.parse_args()
    import h5py
    import numpy as np
    import torch

    began = time.monotonic()
    kept = options.kept.resolve()
    targets, shared, done = fuzz(options.inputs, options.seed, options.seconds, kept)
    print(report(targets, shared))
    bad = sum(shared.counts[i] for i in range(len(shared.counts)) if i % len(OUTCOMES) > 1)
    print(f"\n{done:,} inputs, seed {options.seed}, {time.monotonic() - began:.0f} s")
    print(
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, NumPy {np.__version__}, "
        f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"
    )
    if bad:
        print(f"{bad} failures, saved in {kept}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
