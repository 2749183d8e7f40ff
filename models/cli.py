"""What every command line of the project has in common: option names and error handling."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro
from tyro.conf import arg

from models.errors import InputError

Device = Annotated[
    Literal["auto", "cpu", "cuda"], arg(help="where to compute; auto takes a GPU if there is one")
]
Seed = Annotated[int, arg(help="every random choice derives from it")]
DataRoot = Annotated[
    Path | None,
    arg(metavar="DIR", help="folder of the datasets; default: $LOCALITY_DATA, then data/"),
]
Force = Annotated[bool, arg(help="compute again what is already stored")]

Options = TypeVar("Options")


def run(main: Callable[[Options], None], options_type: type[Options]) -> None:
    """Parse ``sys.argv`` into the dataclass `options_type`, call `main` with it, and exit.

    The docstring of `options_type` is what ``--help`` explains. Exit codes: 0 when done, 2 for bad
    input (one line on stderr), 130 after Ctrl-C.
    """
    try:
        main(parse(options_type))
    except InputError as error:
        _fail(str(error))
    except OSError as error:  # a file that cannot be read or written
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("interrupted; what has been saved is kept", file=sys.stderr)
        sys.exit(130)


def parse(options_type: type[Options], arguments: Sequence[str] | None = None) -> Options:
    """Parse `arguments`, by default those of ``sys.argv``, into the dataclass `options_type`.

    Raises `InputError` if they do not fit.
    """
    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec else sys.argv[0]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                options_type,
                prog=f"python -m {module}",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code != 2:
            raise
    # tyro complains in a box of several lines, of which the first paragraph says what is wrong.
    inside = re.sub(r"[╭╮╰╯│]", " ", complaint.getvalue()).split("\n", 1)[1]
    raise InputError(" ".join(re.split("─{9,}", inside)[0].split()))


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
