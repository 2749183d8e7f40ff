"""The one exception that a person's input can cause."""


class InputError(ValueError):
    """An option or a file is not usable.

    The message is one line that names the option or the file, what was found and what was expected.
    Commands print it and exit with code 2; in a notebook it is an ordinary ``ValueError``.
    """
