"""The exceptions that have a name: what a person's input can cause, and what torchrun's can."""

import re
import sys
from collections.abc import Sequence

LONGEST = 1000  # characters of a message


class InputError(ValueError):
    """An option or a file is not usable.

    The message is one line that names the option or the file, what was found and what was expected.
    Commands print it and exit with code 2; in a notebook it is an ordinary ``ValueError``. Whatever
    strange names and texts it quotes, it stays one line and does not reach a terminal as commands.

    See Also
    --------
    Check : what says that an operator, and not the input, is wrong.

    Examples
    --------
    >>> import torch
    >>> from lossgeometry import trace
    >>> try:
    ...     trace(torch.eye(9), matvecs=2)
    ... except InputError as error:
    ...     print(error)
    matvecs: 2, expected at least 6
    """

    def __init__(self, message: str) -> None:
        line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+", " ", message)
        super().__init__(line if len(line) <= LONGEST else f"{line[:LONGEST]}...")


class LostProcessError(RuntimeError):
    """Another process of those that torchrun started has ended, or cannot be reached."""


def raise_left_out(errors: Sequence[InputError]) -> None:
    """What could not be used, once the rest is done: a line for each, the last of them raised."""
    for error in errors[:-1]:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        raise errors[-1]


def shown(value: object) -> str:
    """A value that a file holds, for a message: short and on one line, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= 80 else f"{value[:80]!r}..."
    return repr(value) if isinstance(value, int | float | None) else f"a {type(value).__name__}"


def one_line(message: object, width: int = 240) -> str:
    """What somebody else's error says, cut to what fits into an `InputError`."""
    text = " ".join(str(message).split())
    return text if len(text) <= width else f"{text[: width - 4]} ..."
