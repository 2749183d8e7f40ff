"""What a study does: its trainings, its measurements, its figures and claims."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from analysis.drawing.everything import draw_all
from analysis.measurements.files import measurement_file
from analysis.plan import COMMANDS, Plan, Training, stacks
from analysis.tables.claims import print_answers
from analysis.verdicts import judge
from lossgeometry.errors import InputError, raise_left_out
from models.cli import parse
from models.train import train_all

TRAIN = "models.train"
TOGETHER = ("robustness",)  # measures that make their images once for all checkpoints of a command
Command = tuple[str, tuple[str, ...]]  # module and arguments


def carry_out(
    plan: Plan,
    parts: Sequence[str],
    *,
    processes: int,
    together: bool,
    compile: bool,
    deadline: float,
) -> None:
    """Do what is left to do of some `parts` of a study: "train", "measure", "figures".

    In so many `processes` at once, or all networks of a grid `together` as one program. Nothing is
    begun after the `deadline`.
    """
    if "train" in parts:
        wanted, every = to_train(plan), len(plan.trainings)
        print(f"{every - len(wanted)} of {every} trainings are there already")
        if together:
            train_stacks(wanted, deadline, compile=compile)
        else:
            run_all([(TRAIN, t.arguments) for t in wanted], plan, processes, deadline)
        if deadline < math.inf and (left := to_train(plan)):
            print(f"time is up with {len(left)} trainings left; the same command goes on")
            return
    if "measure" in parts:
        run_all(measuring_commands(plan, processes), plan, processes, deadline)
        if time.monotonic() > deadline:
            print("time is up; the same command goes on with what is left to measure and to draw")
            return
    if "figures" in parts:
        report(plan)


def to_train(plan: Plan) -> list[Training]:
    """The trainings that are not there yet, in the order of the study."""
    return [t for t in plan.trainings if t.state() in ("to do", "begun")]


def train_stacks(wanted: Sequence[Training], deadline: float, *, compile: bool) -> None:
    """Train the networks of one shape of each grid as one program."""
    for stack in stacks(wanted):
        print(f"{len(stack)} as one program:", *(t.options.out for t in stack), flush=True)
        train_all(
            [replace(t.options, compile=compile or t.options.compile) for t in stack], deadline
        )
        if time.monotonic() > deadline or any(t.state() == "begun" for t in stack):
            return


def measuring_commands(plan: Plan, processes: int) -> list[Command]:
    """For each measurement, a command for every checkpoint that lacks it.

    Where checkpoints are measured better together, there are as many commands as processes. Raises
    `InputError` if a network is missing.
    """
    commands = []
    for measure in plan.measures:
        wanted = [p for t in plan.trainings if measure in t.measures for p in measure.missing(t)]
        for path in wanted:
            if not path.exists():
                raise InputError(
                    f"{path}: there is no such checkpoint to measure, expected --only measure "
                    "after the trainings"
                )
        shares = min(processes, len(wanted)) if measure.command in TOGETHER else len(wanted)
        for i in range(shares):
            own = wanted[i::shares]
            force = ("--force",) if any(map(measure.replaces, own)) else ()
            arguments = ("--ckpt", *map(str, own), *measure.arguments, *force)
            commands.append((COMMANDS[measure.command], arguments))
    return commands


def run_all(commands: Sequence[Command], plan: Plan, processes: int, deadline: float) -> None:
    """Run commands: one after another in this process, or so many at once in their own.

    What a measurement prints and draws is left out: the tables and figures of everything come at
    the end. After the `deadline` no command is begun, and trainings stop by themselves. Raises
    `InputError` if a command fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        jobs: list[Command] = []
        for i, (module, arguments) in enumerate(commands):
            extra = () if module == TRAIN else ("--out", str(Path(scratch, f"figures{i}")))
            jobs.append((module, (*arguments, *extra)))
        if processes == 1:
            _run_here(jobs, plan.threads, deadline)
        else:
            threads = plan.threads or max((os.cpu_count() or 1) // processes, 1)
            _run_at_once(jobs, processes, threads, Path(scratch), deadline)


def _announce(number: int, jobs: Sequence[Command]) -> str:
    """Print which command comes now, without the scratch folder, and return it."""
    module, arguments = jobs[number]
    words = arguments if module == TRAIN else arguments[:-2]
    line = " ".join(["python -m", module.removesuffix(".__main__"), *words])
    tqdm.write(f"[{number + 1}/{len(jobs)}] {line}")  # above the bar, if there is one
    sys.stdout.flush()
    return line


def _run_here(jobs: Sequence[Command], threads: int | None, deadline: float) -> None:
    """One after another, with their progress bars."""
    torch.set_num_threads(threads or torch.get_num_threads())
    for number, (name, arguments) in enumerate(jobs):
        if time.monotonic() > deadline:
            return
        _announce(number, jobs)
        module = importlib.import_module(name)
        with contextlib.redirect_stdout(sys.stdout if name == TRAIN else io.StringIO()):
            module.main(parse(module.Options, (*arguments, *_minutes(name, deadline))))


def _minutes(module: str, deadline: float) -> tuple[str, ...]:
    """The option that lets a training stop in time."""
    if module != TRAIN or deadline == math.inf:
        return ()
    return ("--minutes", str(max(deadline - time.monotonic(), 1) / 60))


def _run_at_once(
    jobs: Sequence[Command], processes: int, threads: int, scratch: Path, deadline: float
) -> None:
    """In processes of their own; if one fails, the others are ended, what they saved is kept."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    waiting = list(range(len(jobs)))
    running: dict[subprocess.Popen[bytes], tuple[str, Path]] = {}
    bar = tqdm(total=len(jobs), unit="command", leave=False, disable=None)
    try:
        while waiting or running:
            if time.monotonic() > deadline:
                waiting.clear()
            while waiting and len(running) < processes:
                number = waiting.pop(0)
                module, arguments = jobs[number]
                line, log = _announce(number, jobs), scratch / f"{number}.log"
                command = [sys.executable, "-m", module.removesuffix(".__main__"), *arguments]
                command += _minutes(module, deadline)
                with log.open("wb") as file:
                    process = subprocess.Popen(
                        command,
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        preexec_fn=end_with_parent,
                    )
                running[process] = line, log
            for process in [p for p in running if p.poll() is not None]:
                line, log = running.pop(process)
                if process.returncode:
                    said = log.read_text(errors="replace").strip().splitlines()
                    reason = said[-1] if said else f"exit code {process.returncode}"
                    raise InputError(f"{line}: {reason.removeprefix('error: ')}")
                bar.update()
            time.sleep(0.02)
    finally:
        bar.close()
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def end_with_parent() -> None:
    """Let Linux end this process with its parent: it would be in the way of the next start."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def report(plan: Plan) -> None:
    """Draw every figure of the study's folder, and print its claims."""
    left_out: list[InputError] = []
    for path in draw_all(plan.folder, plan.figures, left_out=left_out):
        print(f"wrote {path}")
    checkpoints = [p for t in plan.trainings for m in t.measures for p in m.checkpoints(t)]
    files = [measurement_file(path) for path in dict.fromkeys(checkpoints)]
    for study, answers in judge(files, left_out).items():
        print_answers(study, answers)
    raise_left_out(left_out)
