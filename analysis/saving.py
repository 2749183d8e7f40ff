"""Unfinished results, saved now and then so that a killed run loses little."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

SAVE_EVERY = 10.0  # seconds

State = TypeVar("State")


class Saver(Generic[State]):
    """Saves a state that is being filled: every `SAVE_EVERY` seconds, and when interrupted.

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
        if kind is not None and self._save is not None and self._unsaved:
            self._save(self._state)

    def now_and_then(self) -> None:
        """Save what has been added to the state, if it is time."""
        self._unsaved = True
        if self._save is not None and time.monotonic() - self._saved >= SAVE_EVERY:
            self._save(self._state)
            self._saved, self._unsaved = time.monotonic(), False
