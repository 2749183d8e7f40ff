"""Options in the text that names a model or a dataset: ``NAME?key=1&key=2``."""

from __future__ import annotations

import ast
from typing import Any

from lossgeometry.errors import InputError, shown


def split_spec(spec: str, what: str, expected: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of a spec, each value a Python literal or else a text.

    `what` it names and what is `expected` are for the `InputError` if it is malformed.
    """
    name, _, query = spec.partition("?")
    options: dict[str, Any] = {}
    for pair in query.split("&") if query else ():
        key, equals, text = pair.partition("=")
        if not key.isidentifier() or not equals or key in options:
            raise InputError(f"{what}: {shown(pair)} found in {shown(spec)}, {expected}")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # not a literal: a text
            options[key] = text
    return name, options
