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
import errno
import hashlib
import importlib
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import h5py
import numpy as np
import torch
from filelock import FileLock
from PIL import Image

from analysis import saving
from models import files, load_dataset
from models.cli import run
from models.train import Options, untrained

CKPT = ("--ckpt", "checkpoints/csan3.pt")
TINY = ("--dim", "6", "--depth", "1", "--epochs", "7", "--images", "40", "--dataset", "data.h5")
HESSIAN = ("--k=1", "--batches=3", "--batch-size=4", "--density-batches=1", "--steps=2")
LANDSCAPE = ("--batches=1", "--batch-size=8", "--points=3", "--line-points=5", "--lines=1")
STUDY = """
folder = "checkpoints"
figures = "figures"
[train]
dataset = "data.h5"
preset = "digits"
dim = 6
depth = 1
epochs = 6
images = 40
[[grid]]
window = [3, 8]
out = "checkpoints/study{window}.pt"
[[measure]]
command = "nll"
[[measure]]
command = "robustness"
images = 4
"""
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train": ("models.train", ("--out", "checkpoints/new.pt", "--preset", "digits", *TINY)),
    "hessian": ("analysis.hessian", (*CKPT, *HESSIAN)),
    "landscape": ("analysis.landscape.__main__", (*CKPT, *LANDSCAPE)),
    "robustness": ("analysis.robustness", (*CKPT, "--images", "8")),
    "nll": ("analysis.nll", CKPT),
    "study": ("analysis.study", ("study.toml",)),
}
WARM = (  # imported before the processes are forked, for it takes longer than what they do
    *(name for name, _ in COMMANDS.values()),
    *("analysis.claims", "analysis.figures", "analysis.outcomes", "analysis.plan"),
    *("analysis.curvature", "analysis.landscape.cuts", "analysis.landscape.report"),
    *(f"analysis.drawing.{name}" for name in ("claims", "hessians", "landscapes", "nll")),
    *("analysis.drawing.robustness", "models.corruptions", "matplotlib.backends.backend_agg"),
)
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def write_dataset(path: Path, seed: int = 0) -> None:
    """Some digits; `seed` decides their order."""
    order = np.random.default_rng(seed).permutation(300)
    digits = load_dataset("digits")
    with h5py.File(path, "w") as file:
        for split, part in (("train", order[:48]), ("test", order[48:72])):
            file[f"{split}/images"] = digits.images.numpy()[part]
            file[f"{split}/labels"] = digits.labels.numpy()[part]
        file.attrs["classes"] = [str(i) for i in range(10)]


def make_template(folder: Path) -> None:
    """What every scene begins with: a dataset, a study, and a checkpoint to measure."""
    write_dataset(folder / "data.h5")
    (folder / "study.toml").write_text(STUDY)
    options = Options(out=Path("csan3.pt"), window=3, dim=6, depth=1, preset="digits")
    dataset = load_dataset(folder / "data.h5")
    start = replace(untrained(options, dataset), dataset="data.h5")
    names = ("train_nll", "train_error", "test_nll", "test_error")
    start.history.update(epoch=[0.0], **{name: [0.5] for name in names})
    replace(start, epoch=start.recipe.epochs).save(folder / "checkpoints/csan3.pt")


class FileOperations:
    """Counts the operations on files that a process makes, and does something in one of them."""

    def __init__(self, at: int | None, act: Callable[[], None] = lambda: None) -> None:
        self.count, self.at, self.act = 0, at, act
        for module, name in (
            *((os, name) for name in ("fsync", "replace", "chmod", "unlink")),
            (tempfile, "mkstemp"),
        ):
            setattr(module, name, self._before(getattr(module, name)))
        write = Path.write_bytes

        def half_written(path: Path, content: bytes) -> int:
            if self._is_now():
                write(path, content[: len(content) // 2])
                self.act()
            return write(path, content)

        Path.write_bytes = half_written  # type: ignore[assignment, method-assign]

    def _before(self, function: Callable) -> Callable:
        def counted(*args, **kwargs):
            if self._is_now():
                self.act()
            return function(*args, **kwargs)

        return counted

    def _is_now(self) -> bool:
        self.count += 1
        return self.count == self.at


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(code: int) -> None:
    raise OSError(code, os.strerror(code))


@dataclass
class Scene:
    """A folder in which a command is run again and again, and what has been seen in it."""

    command: str
    folder: Path
    finished: dict[str, str] = field(default_factory=dict)  # {file or group: hash}
    progress: Counter = field(default_factory=Counter)  # {file: units of work}

    @classmethod
    def new(cls, command: str, template: Path, folder: Path) -> Scene:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        return cls(command, folder)

    def start(self, fault: Callable[[], object] = lambda: None) -> int:
        """Fork a process that runs the command; what it says goes to ``said``. Returns its id."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            os.chdir(self.folder)
            output = os.open(f"said{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            saving.SAVE_EVERY = 0.0
            module_name, arguments = COMMANDS[self.command]
            module = importlib.import_module(module_name)
            sys.argv = [module_name, *arguments]
            fault()
            run(module.main, module.Options)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def end(self, child: int) -> tuple[int, str]:
        """Exit code of a process, or minus its signal, and what it said."""
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = self.folder / f"said{child}"
        text = said.read_text(errors="replace") if said.exists() else ""
        said.unlink(missing_ok=True)
        return code, text

    def run(self, fault: Callable[[], object] = lambda: None) -> tuple[int, str]:
        return self.end(self.start(fault))

    def problems(self) -> list[str]:
        """What is damaged, lost, or has gone back since the last call."""
        found: list[str] = []
        now, work = {}, Counter()
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            try:
                if path.suffix == ".h5" and path.parent != self.folder:
                    for key, group in groups(path).items():
                        if key.startswith("unfinished"):
                            work[f"{name}:{key}"] += units(group)
                        else:
                            now[f"{name}:{key}"] = digest(group)
                elif path.name == "resume.pt":
                    work[name] = torch.load(path, weights_only=True)["epoch"]
                elif path.suffix == ".pt":
                    torch.load(path, weights_only=True)
                    now[name] = hashlib.sha256(path.read_bytes()).hexdigest()
                elif path.suffix == ".png":
                    with Image.open(path) as image:
                        image.load()
            except Exception as error:
                found.append(f"{name}: cannot be read ({error!r})")
        for name, known in self.finished.items():
            if now.get(name) != known:
                found.append(f"{name}: {'changed' if name in now else 'lost'}")
        for name, before in self.progress.items():
            end = name.replace("unfinished/", "").replace("/resume.pt", ".pt")
            if end not in now and work[name] < before:
                found.append(f"{name}: progress from {before} back to {work[name]}")
        self.finished, self.progress = now, work
        return found

    def results(self) -> dict[str, bytes]:
        """Everything but times, which no two runs share."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if path.suffix == ".h5" and path.parent != self.folder:
                for key, group in groups(path).items():
                    arrays = {k: v for k, v in group.items() if not k.startswith("@")}
                    arrays.pop("seconds", None)
                    found |= {f"{name}:{key}/{k}": v for k, v in arrays.items()}
            elif path.suffix == ".pt":
                content = torch.load(path, weights_only=True)
                content.get("history", {}).pop("seconds", None)
                tensors = content.pop("state_dict", {})
                found |= {f"{name}:{k}": v.numpy().tobytes() for k, v in tensors.items()}
                found[name] = repr(content).encode()
            elif path.name.endswith(".partial"):
                found[name] = b"left behind"
        return found


def groups(path: Path) -> dict[str, dict[str, bytes]]:
    """Arrays and, beginning with @, attributes of each measurement of a file."""
    found: dict[str, dict[str, bytes]] = {}
    with h5py.File(path) as file:
        measurements: list[str] = []
        file.visititems(lambda k, item: measurements.append(k) if "options" in item.attrs else None)
        for name in measurements:
            own = found[name] = {f"@{k}": str(v).encode() for k, v in file[name].attrs.items()}

            def add(key: str, item: object, own: dict[str, bytes] = own) -> None:
                if isinstance(item, h5py.Dataset):
                    own[key] = np.asarray(item[()]).tobytes()

            file[name].visititems(add)
    return found


def units(group: dict[str, bytes]) -> int:
    """Work that a group of unfinished work holds: entries of everything called done."""
    flags = [np.frombuffer(v, bool) for k, v in group.items() if k.split("/")[-1] == "done"]
    return 1 + int(sum(flag.sum() for flag in flags))


def digest(group: dict[str, bytes]) -> str:
    return hashlib.sha256(repr(sorted(group.items())).encode()).hexdigest()


def hold(path: Path, what: str) -> int:
    """Fork a process that has an HDF5 file open for writing, or its lock. Returns its id."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        held = h5py.File(path, "a") if what == "HDF5" else lock.acquire()
        os.write(writer, b"!")
        signal.pause()
        del held
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    return child


def release(holder: int) -> None:
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)


def one_line(said: str) -> bool:
    """Whether a command ended with one line of complaint that names a file or an option."""
    complaints = [line for line in said.splitlines() if line.startswith("error: ")]
    return len(complaints) == 1 and ": " in complaints[0][7:] and "Traceback" not in said


class Trial:
    """Injects faults into the commands and counts what came of it."""

    def __init__(self, seed: int, root: Path, commands: list[str] | None = None) -> None:
        self.rng = np.random.default_rng(seed)
        self.root, self.template = root, root / "template"
        self.template.mkdir()
        make_template(self.template)
        self.commands = commands or list(COMMANDS)
        for name in WARM:
            importlib.import_module(name)
        self.injected: Counter = Counter()  # {(command, fault): times}
        self.wrong: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.reference: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        self.operations: dict[str, int] = {}
        for command in self.commands:
            self._undisturbed(command)

    def _undisturbed(self, command: str) -> None:
        scene = self.scene(command)
        began = time.monotonic()

        def count() -> None:
            counter = FileOperations(None)
            exit_now = os._exit

            def report(code: int) -> None:
                Path("operations").write_text(str(counter.count))
                exit_now(code)

            os._exit = report  # type: ignore[assignment]

        code, said = scene.run(count)
        assert code == 0, said
        self.seconds[command] = time.monotonic() - began
        self.operations[command] = int((scene.folder / "operations").read_text())
        self.reference[command] = scene.results()

    def scene(self, command: str) -> Scene:
        return Scene.new(command, self.template, self.root / command)

    def count(self, command: str, fault: str, problems: list[str]) -> None:
        self.injected[command, fault] += 1
        self.wrong[command, fault] += problems
        for problem in problems:
            print(f"{command}, {fault}: {problem}", file=sys.stderr, flush=True)

    def complete(self, scene: Scene, reference: dict[str, bytes] | None = None) -> list[str]:
        """Let the command end, and compare with what it should have made."""
        code, said = scene.run()
        problems = scene.problems()
        if code:
            problems.append(f"does not go on: exit code {code}: {said[-1000:]}")
        expected, found = reference or self.reference[scene.command], scene.results()
        different = [k for k in {*expected, *found} if expected.get(k) != found.get(k)]
        if different:
            problems.append(f"other results than undisturbed: {sorted(different)[:5]}")
        return problems

    def operation(self, command: str) -> int:
        return int(self.rng.integers(1, self.operations[command] + 1))

    def kill_in_operation(self, scene: Scene) -> tuple[int, str]:
        at = self.operation(scene.command)
        return scene.run(lambda: FileOperations(at, kill_self))

    def kills(self, command: str, times: int, in_a_row: int = 6) -> None:
        """SIGKILL, at random moments and in random file operations."""
        hits = 0
        while hits < times:
            scene = self.scene(command)
            for _ in range(in_a_row):
                if hits == times:
                    break
                if self.rng.random() < 0.5:
                    fault = "killed in a file operation"
                    code, said = self.kill_in_operation(scene)
                else:
                    fault, child = "killed at a random moment", scene.start()
                    time.sleep(float(self.rng.uniform(0, self.seconds[command])))
                    os.kill(child, signal.SIGKILL)
                    code, said = scene.end(child)
                if code != -signal.SIGKILL:  # it was done before
                    if code:
                        self.count(command, fault, [f"exit code {code}: {said[-1000:]}"])
                    break
                hits += 1
                self.count(command, fault, scene.problems())
            self.wrong[command, fault] += self.complete(scene)

    def failing_calls(self, command: str, times: int) -> None:
        """A call of the system that fails: disk full, quota, read-only, input/output error."""
        for _ in range(times):
            scene, code = self.scene(command), ERRORS[self.rng.integers(len(ERRORS))]
            at = self.operation(command)
            self._refused(
                scene,
                f"{errno.errorcode[code]} in a file operation",
                lambda at=at, code=code: FileOperations(at, lambda: fail(code)),
                os.strerror(code),
            )

    def small_disk(self, command: str, times: int) -> None:
        """The kernel lets no file grow beyond a limit."""
        for _ in range(times):
            limit = int(2 ** self.rng.uniform(12, 17))
            self._refused(
                self.scene(command),
                "no room for a file",
                lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
                os.strerror(errno.EFBIG),
            )

    def _refused(
        self, scene: Scene, fault: str, inject: Callable[[], object], complaint: str
    ) -> None:
        code, said = scene.run(inject)
        problems = scene.problems()
        if code not in (0, 2) or (code == 2 and not (one_line(said) and complaint in said)):
            problems.append(f"exit code {code}, not one line that says why: {said[-1000:]}")
        self.count(scene.command, fault, problems + self.complete(scene))

    def damage(self, command: str, times: int) -> None:
        """A file that was written before is truncated, or a part of it is garbled."""
        for _ in range(times):
            scene = self.scene(command)
            self.kill_in_operation(scene)
            there = [p for p in sorted((scene.folder / "checkpoints").rglob("*")) if p.is_file()]
            there = [p for p in there if p.suffix in (".pt", ".h5")]
            path = there[self.rng.integers(len(there))]
            content = bytearray(path.read_bytes())
            truncated = self.rng.random() < 0.5
            at = int(self.rng.integers(len(content)))
            if truncated:
                del content[at:]
            else:
                content[at : at + 64] = self.rng.bytes(len(content[at : at + 64]))
            path.write_bytes(content)
            code, said = scene.run()
            problems = []
            if code not in (0, 2) or (code == 2 and not one_line(said)):
                problems.append(f"{path.name}: exit code {code}: {said[-1000:]}")
            if code == 2 and path.read_bytes() != content:
                problems.append(f"{path.name}: was refused, and changed all the same")
            if path.suffix == ".h5" and truncated and (code != 2 or path.name not in said):
                problems.append(f"{path.name}: truncated, not refused: {said[-500:]}")
            self.count(command, "truncated file" if truncated else "garbled file", problems)

    def held_lock(self, command: str, times: int) -> None:
        """Another process has the HDF5 file open for writing, or its lock; for long, or not."""
        for i in range(times):
            scene = self.scene(command)
            path = scene.folder / "checkpoints/csan3.h5"
            with h5py.File(path, "w"):
                pass
            for_long = self.rng.random() < 0.5

            def impatient(for_long: bool = for_long) -> None:
                files.ANNOUNCE, files.PATIENCE = 0.0, 0.2 if for_long else 60.0

            holder = hold(path, "HDF5" if i % 2 else "lock")
            child = scene.start(impatient)
            if not for_long:
                said = scene.folder / f"said{child}"
                while "waiting for it" not in (said.read_text() if said.exists() else ""):
                    time.sleep(0.01)
                release(holder)
            code, text = scene.end(child)
            if for_long:
                release(holder)
            problems = [] if code == (2 if for_long else 0) else [f"exit code {code}: {text}"]
            if "in use by another process" not in text or (for_long and not one_line(text)):
                problems.append(f"does not say what it waits for: {text}")
            self.count(command, "held lock", problems + self.complete(scene))

    def two_at_once(self, command: str, times: int) -> None:
        """The same command twice; a training is refused to the second."""
        for _ in range(times):
            scene = self.scene(command)
            first = scene.start()
            time.sleep(float(self.rng.uniform(0, self.seconds[command] / 2)))
            ends = [scene.end(child) for child in (scene.start(), first)]
            problems = scene.problems()
            for code, said in ends:
                busy = command in ("train", "study") and "being trained by another" in said
                if code and not (code == 2 and busy and one_line(said)):
                    problems.append(f"exit code {code}: {said[-1000:]}")
            self.count(command, "two at once", problems + self.complete(scene))

    def clock(self, command: str, times: int) -> None:
        """The clock is set back again and again."""
        for _ in range(times):
            seed = int(self.rng.integers(2**32))

            def set_back(seed: int = seed) -> None:
                rng, now = np.random.default_rng(seed), time.time

                def backwards() -> float:
                    return now() - rng.uniform(0, 1e6)

                time.time = backwards
                time.time_ns = lambda: int(1e9 * backwards())

            scene = self.scene(command)
            code, said = scene.run(set_back)
            problems = scene.problems() + ([f"exit code {code}: {said[-1000:]}"] if code else [])
            self.count(command, "clock set back", problems + self.complete(scene))

    def other_images(self, command: str, times: int) -> None:
        """The dataset is another one when a run that was killed is given again."""
        other = self.root / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(self.template, other)
        write_dataset(other / "data.h5", seed=1)
        expected = Scene.new(command, other, self.root / "expected")
        assert expected.run()[0] == 0
        for _ in range(times):
            scene = self.scene(command)
            self.kill_in_operation(scene)
            scene.problems()
            shutil.copy(other / "data.h5", scene.folder / "data.h5")
            begun = {k for k in (*scene.progress, *scene.finished) if "history" not in k}
            begun -= {"checkpoints/csan3.pt"}
            code, said = scene.run()
            problems = []
            if command == "train":
                state = any(name.endswith("resume.pt") for name in begun)
                done = "checkpoints/new.pt" in begun
                if state and not done and (code != 2 or "on other images" not in said):
                    problems.append(f"goes on with other images: {code} {said}")
            else:
                if code or (begun and "is of other images" not in said):
                    problems.append(f"is not measured anew: {code} {said}")
                scene.problems()
                problems += self.complete(scene, expected.results())
            self.count(command, "dataset replaced", problems)

    def images_written(self, command: str, times: int) -> None:
        """Another process writes the dataset, in place, while it is read."""
        for _ in range(times):
            scene = self.scene(command)
            path = scene.folder / "data.h5"
            content = path.read_bytes()
            child = scene.start()
            until = time.monotonic() + float(self.rng.uniform(0, self.seconds[command]))
            while time.monotonic() < until:
                with path.open("wb") as file:
                    at = int(self.rng.integers(len(content)))
                    file.write(content[:at])
                    file.flush()
                    time.sleep(0.002)
                    file.write(content[at:])
                time.sleep(float(self.rng.uniform(0, 0.02)))
            code, said = scene.end(child)
            problems = scene.problems()
            if code not in (0, 2) or (code == 2 and not one_line(said)):
                problems.append(f"exit code {code}: {said[-1000:]}")
            self.count(command, "dataset written to", problems + self.complete(scene))

    def little_memory(self, command: str, times: int) -> None:
        """PyTorch has memory for a few images only."""
        from models.csan import CSAN

        for _ in range(times):
            most = int(self.rng.integers(1, 24))

            def short(most: int = most) -> None:
                forward = CSAN.forward

                def limited(model: CSAN, x: torch.Tensor) -> torch.Tensor:
                    if len(x) > most:
                        raise torch.OutOfMemoryError("CUDA out of memory.")
                    return forward(model, x)

                CSAN.forward = limited  # type: ignore[method-assign]

            scene = self.scene(command)
            code, said = scene.run(short)
            problems = scene.problems()
            if code or said.count("not enough memory") != 1:
                problems.append(f"exit code {code}: {said[-1000:]}")
            expected, found = self.reference[command], scene.results()
            for key, value in expected.items():
                if key.endswith("nll") and "history" not in key:
                    dtype = np.float32 if ":outcomes/" in key else np.float64
                    a, b = (np.frombuffer(v, dtype) for v in (value, found.get(key, b"")))
                    if a.shape != b.shape or not np.allclose(a, b, rtol=1e-5, atol=1e-6):
                        problems.append(f"{key}: other values than with enough memory")
            self.count(command, "out of memory", problems)

    def table(self) -> str:
        """Markdown: times and problems of each fault and command."""
        lines = ["| fault | command | injected | lost, corrupt or wrong |", "|---|---|---|---|"]
        for command, fault in sorted(self.injected, key=lambda key: key[::-1]):
            key = command, fault
            lines.append(f"| {fault} | {command} | {self.injected[key]} | {len(self.wrong[key])} |")
        total, wrong = sum(self.injected.values()), sum(map(len, self.wrong.values()))
        return "\n".join([*lines, f"| **all** | | **{total}** | **{wrong}** |"])


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
