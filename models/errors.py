"""The exceptions that have a name: what a person's input can cause, and what torchrun's can."""


class InputError(ValueError):
    """An option or a file is not usable.

    The message is one line that names the option or the file, what was found and what was expected.
    Commands print it and exit with code 2; in a notebook it is an ordinary ``ValueError``.
    """


class LostProcessError(RuntimeError):
    """Another process of those that torchrun started has ended, or cannot be reached."""
