"""Unfinished results, saved now and then so that a killed run loses little; whole files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np

from lossgeometry.errors import InputError

SAVE_EVERY = 10.0  # seconds; 0: whenever something has been done

State = TypeVar("State")
Entry = TypeVar("Entry")


class Saver(Generic[State]):
    """Saves a state that is being filled: every `SAVE_EVERY` seconds, and when interrupted.

    Where saving takes long, it is done less often, so that it takes a quarter of the time at most.

    Parameters
    ----------
    save : callable or None
        Called with the state; None saves nothing.
    state
        What is filled.
    """

    def __init__(self, save: Callable[[State], object] | None, state: State) -> None:
        self._save, self._state = save, state
        self._saved = time.monotonic()
        self._takes = 0.0  # seconds, of which a large state must not take all
        self._unsaved = False

    def __enter__(self) -> None:
        """Watch for exceptions."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Save what there is if something ends the work early."""
        if kind is not None:
            self.now()

    def now_and_then(self) -> None:
        """Save what has been added to the state, if it is time."""
        self._unsaved = True
        interval = SAVE_EVERY and max(SAVE_EVERY, 3 * self._takes)
        if time.monotonic() - self._saved >= interval:
            self.now()

    def now(self) -> None:
        """Save what has been added to the state, if anything has."""
        if self._save is not None and self._unsaved:
            begun = time.monotonic()
            self._save(self._state)
            self._saved, self._unsaved = time.monotonic(), False
            self._takes = self._saved - begun


class Progress:
    """What the steps of a longer piece of work have done so far: arrays by the names "STEP/NAME".

    Parameters
    ----------
    arrays : mapping of str to array, optional
        What `save` received when the same work was interrupted.
    save : callable, optional
        Called with the arrays of all steps begun; they are filled further afterwards.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray] | None = None,
        save: Callable[[dict[str, np.ndarray]], object] | None = None,
    ) -> None:
        self._arrays = dict(arrays or {})
        self._save = save

    def of(self, step: str) -> dict[str, Any]:
        """The arguments `resume` and `save` of a step."""
        keep = self._save
        if keep is None:
            return {"resume": above(step, self._arrays)}

        def save(arrays: Mapping[str, np.ndarray]) -> None:
            self._arrays |= below(step, arrays)
            keep(self._arrays)

        return {"resume": above(step, self._arrays), "save": save}


FRESH = Progress()  # that is not saved


def filled(
    blank: Mapping[str, np.ndarray], saved: Mapping[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """Copies of the arrays that were saved, or of those `blank` if none were.

    Raises `InputError` unless they have the names, shapes and kinds of those.
    """
    saved = saved or blank
    for name, expected in blank.items():
        found = saved.get(name)
        if found is None:
            raise InputError(f"resume: no {name} found, expected it; begin anew with --force")
        if (found.shape, found.dtype.kind) != (expected.shape, expected.dtype.kind):
            raise InputError(
                f"resume: {found.dtype} {found.shape} found for {name}, expected "
                f"{expected.dtype} {expected.shape}; begin anew with --force"
            )
    return {name: np.array(saved[name]) for name in blank}


def below(folder: str, arrays: Mapping[str, Entry]) -> dict[str, Entry]:
    """The arrays, or what there is of each, by the names "FOLDER/NAME"."""
    return {f"{folder}/{key}": array for key, array in arrays.items()}


def above(folder: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverse of `below`: those of `arrays` that are in the folder."""
    start = f"{folder}/"
    return {k.removeprefix(start): array for k, array in arrays.items() if k.startswith(start)}


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file, whole or not at all; its folder is made if it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
