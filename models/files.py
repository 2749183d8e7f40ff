"""Files that are written whole or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from lossgeometry.errors import InputError

ANNOUNCE, PATIENCE = 2.0, 600.0  # seconds of waiting: until it is said, until it is given up

Result = TypeVar("Result")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there replaces `path` at the end.

    The content is on disk before the name is, and after an exception `path` is as it was. The
    folder is made if it is missing. What killed processes left of earlier attempts is removed.

    Raises
    ------
    OSError
        If it cannot be written; names `path`.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _present(path):
            handle, name = tempfile.mkstemp(
                dir=path.parent, prefix=f".{path.name}.", suffix=".partial"
            )
            os.close(handle)
            try:
                yield Path(name)
                _to_disk(Path(name))
                os.chmod(name, 0o644)  # mkstemp's files are private
                os.replace(name, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
            _to_disk(path.parent)  # else the old file may be back after a power failure


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep out other processes that lock `path`, too; where it has to wait for one, it says so.

    Raises `InputError` if that takes longer than `PATIENCE`.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        patiently(lambda: lock.acquire(timeout=0), Timeout, path)
    try:
        yield
    finally:
        lock.release()


def patiently(attempt: Callable[[], Result], busy: type[Exception], path: Path) -> Result:
    """Result of `attempt`, made again as long as it raises `busy`: another process has `path`.

    Waiting is announced on stderr. Raises `InputError` after `PATIENCE` seconds.
    """
    began, announced = time.monotonic(), False
    while True:
        try:
            return attempt()
        except busy as error:
            waited = time.monotonic() - began
            if waited >= PATIENCE:
                raise InputError(
                    f"{path}: in use by another process for more than {PATIENCE:.0f} s, expected "
                    "it to be done; end that process, and give this command again"
                ) from error
        if waited >= ANNOUNCE and not announced:
            print(f"{path}: in use by another process, waiting for it", file=sys.stderr)
            announced = True
        time.sleep(0.02)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make errors of the system name `path`, whatever file they were about."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextlib.contextmanager
def _present(path: Path) -> Iterator[None]:
    """Hold a shared lock on the folder of `path`; if nobody else does, tidy up there first.

    The system takes the lock from a process that is killed: temporary files of `path` in a folder
    that nobody holds belong to no one.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # somebody else does, or there are no locks here
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in path.parent.glob(f".{glob.escape(path.name)}.????????.partial"):
                left.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_SH)
        yield
    finally:
        os.close(folder)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some systems do not sync folders
            raise
    finally:
        os.close(descriptor)
