"""Every fault, injected into any command at random moments, and counted."""

from __future__ import annotations

import errno
import importlib
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

from models import files
from tests.faults.commands import COMMANDS, ERRORS, WARM, make_template, write_dataset
from tests.faults.injections import FileOperations, fail, kill_self
from tests.faults.scene import Scene, hold, one_line, release


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
