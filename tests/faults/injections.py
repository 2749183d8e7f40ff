"""Faults of a process at one of its operations on files."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path


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
