"""A folder in which a command runs in a process of its own, and what is wrong there afterwards."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import torch
from filelock import FileLock
from PIL import Image

from lossgeometry.running import saving
from models.cli import run
from tests.faults.commands import COMMANDS


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
    """Work that a group of unfinished work holds: entries of what says what is done."""
    flags = [np.frombuffer(v, bool) for k, v in group.items() if k.endswith(("done", "evaluated"))]
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
