"""What every command line of the project has in common: option names and error handling."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import tyro

from lossgeometry.errors import InputError, LostProcessError
from lossgeometry.running.memory import is_out_of_memory, keep_freed_memory


def arg(*, help: str, metavar: str | None = None) -> Any:
    """What ``--help`` says of an option, and its default, unless that is nothing."""
    return tyro.conf.arg(
        help=help,
        metavar=metavar,
        help_behavior_hint=lambda text: "" if text in ("", "None") else f"(default: {text})",
    )


Device = Annotated[
    Literal["auto", "cpu", "cuda"], arg(help="where to compute; auto takes a GPU if there is one")
]
Seed = Annotated[int, arg(help="every random choice derives from it")]
DataRoot = Annotated[
    Path | None,
    arg(metavar="DIR", help="folder of the datasets; default: $LOCALITY_DATA, then data/"),
]
Force = Annotated[bool, arg(help="compute again what is already stored")]
Minutes = Annotated[
    float | None,
    arg(
        metavar="M",
        help="stop after so many minutes, at the end of an epoch; the same command goes on",
    ),
]

Options = TypeVar("Options")

SOON = 15.0  # seconds


def run(
    main: Callable[[Options], None], options_type: type[Options], *, alone: bool = False
) -> None:
    """Parse ``sys.argv`` into the dataclass `options_type`, call `main` with it, and exit.

    The docstring of `options_type` is what ``--help`` explains. Exit codes: 0 when done, 2 for bad
    input, a full disk or too little memory (one line on stderr), 130 after Ctrl-C or SIGTERM.

    Of the processes that ``torchrun`` starts only the first prints. All of them call `main`, or,
    with `alone`, the first.
    """
    keep_freed_memory()
    rank = int(os.environ["RANK"]) if under_torchrun() else 0
    with _signals():
        try:
            with _silence() if rank else contextlib.nullcontext():
                options = parse(options_type)
                if rank == 0 or not alone:
                    main(options)
        except InputError as error:
            _fail(str(error), rank)
        except OSError as error:  # a file that cannot be read or written
            if error.filename is None:
                raise
            _fail(f"{error.filename}: {error.strerror}", rank)
        except LostProcessError as error:
            _wait_for_the_end()  # so that torchrun finds one process to blame
            _fail(f"{error}; what has been saved is kept", rank)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            _fail(f"not enough memory, expected smaller batches ({reason})", rank)
        except KeyboardInterrupt:
            _end_bars()
            if rank == 0:
                print(
                    "interrupted; what has been saved is kept, the same command goes on from there",
                    file=sys.stderr,
                )
            sys.exit(130)


def deadline_in(minutes: float | None) -> float:
    """When the time of the option ``--minutes`` is up, as `time.monotonic` counts.

    Raises `InputError` if it is not positive.
    """
    if minutes is None:
        return math.inf
    if not minutes > 0:
        raise InputError(f"minutes: {minutes} found, expected more than 0")
    return time.monotonic() + 60 * minutes


def under_torchrun() -> bool:
    """Whether ``torchrun`` has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def parse(options_type: type[Options], arguments: Sequence[str] | None = None) -> Options:
    """Parse `arguments`, by default those of ``sys.argv``, into the dataclass `options_type`.

    Raises `InputError` if they do not fit.
    """
    spec = sys.modules["__main__"].__spec__
    module = spec.name if spec else sys.argv[0]
    complaint = io.StringIO()
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--version" in arguments:
        print(f"locality-landscapes {metadata.version('locality-landscapes')}")
        sys.exit(0)
    _require_known(arguments, [field.name for field in fields(options_type)])  # type: ignore[arg-type]
    try:
        with contextlib.redirect_stderr(complaint):
            options = tyro.cli(
                options_type,
                prog=f"python -m {module}",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
        _require_values(arguments, options)
        return options
    except SystemExit as stop:
        if stop.code != 2:
            raise
    # tyro complains in a box of several lines, of which the first paragraph says what is wrong.
    inside = re.sub(r"[╭╮╰╯│]", " ", complaint.getvalue()).split("\n", 1)[1]
    raise InputError(" ".join(re.split("─{9,}", inside)[0].split()))


def _require_known(arguments: Sequence[str], names: Sequence[str]) -> None:
    """Raise `InputError` for a mistyped option, before one that is missing is complained about."""
    known = ["--help", "--version", *(f"--{name.replace('_', '-')}" for name in names)]
    for argument in arguments:
        if "\0" in argument:
            raise InputError(f"{argument!r} found, expected an option without NUL bytes")
        option = argument.partition("=")[0].replace("_", "-")
        if option.startswith("--") and not option.startswith("--tyro-") and option not in known:
            meant = get_close_matches(option, known, 1) or ["one of those that --help lists"]
            raise InputError(f"{option}: there is no such option, expected {meant[0]}")


def _require_values(arguments: Sequence[str], options: object) -> None:
    """Raise `InputError` for an option of several values that is given without one."""
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        name = argument.removeprefix("--")
        several = isinstance(getattr(options, name.replace("-", "_"), None), tuple)
        if argument.startswith("--") and following.startswith("--") and several:
            raise InputError(f"{name}: no value found, expected at least one")


def _fail(message: str, rank: int) -> NoReturn:
    """Print one line and exit with code 2.

    What is wrong for one process is so for all, in general: the first says it, while the others
    wait to be ended. What is wrong for another alone is said by that one.
    """
    _end_bars()
    if rank == 0 or not _wait_for_the_end():
        print(f"error: {message}", file=sys.stderr)
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun repeats what is in there
            now = {"timestamp": str(int(time.time()))}
            content = {"message": {"message": f"error: {message}", "extraInfo": now}}
            Path(path).write_text(json.dumps(content))
    sys.exit(2)


def _end_bars() -> None:
    """End the progress bars that an exception has left, so that what is said has its own line."""
    bars = sys.modules["tqdm"].tqdm if "tqdm" in sys.modules else None
    for bar in list(getattr(bars, "_instances", ())):
        bar.close()


def _wait_for_the_end() -> bool:
    """Whether torchrun ends this process soon, as it does when another one has failed."""
    try:
        time.sleep(SOON)
    except KeyboardInterrupt:
        return True
    return False


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM be the same as Ctrl-C, and the first of them be the last.

    After Ctrl-C in a terminal, processes of torchrun are interrupted by the terminal and by
    torchrun; the second time they would be in the middle of saving.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
