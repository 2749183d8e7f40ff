"""Docstrings and signatures as the reference wants them: types as they are written."""

import dataclasses
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from sphinx.application import Sphinx

FIELD = re.compile(r"^    (\w+): .*?  # (.+)$", re.MULTILINE)
RULE = re.compile(r"\s*-{3,}")


def spelled(annotation: str, names: Mapping[str, Any]) -> str:
    """A type as it is written, but for what a name does not say: whose path, any of which types."""

    def meaning(found: re.Match[str]) -> str:
        it = names.get(found[0])
        if isinstance(it, TypeVar) and it.__constraints__:
            return " | ".join(kind.__name__ for kind in it.__constraints__)
        return "pathlib.Path" if it is Path else found[0]

    return re.sub(r"(?<![\w.])\w+", meaning, annotation)


def keep_as_written(app: Sphinx, it: Any, bound: bool) -> None:
    """Take the annotations of a function for its signature, before they are evaluated."""
    function = getattr(it, "__func__", it)
    if not inspect.isfunction(function) or not function.__annotations__:
        return
    written = inspect.signature(function)
    shown = {
        name: spelled(annotation, function.__globals__)
        for name, annotation in function.__annotations__.items()
        if isinstance(annotation, str)
    }
    parameters = [
        parameter.replace(annotation=shown.get(name, parameter.annotation))
        for name, parameter in written.parameters.items()
    ]
    result = shown.get("return", written.return_annotation)
    function.__signature__ = written.replace(parameters=parameters, return_annotation=result)
    function.__annotations__ = {}


def describe_fields(
    app: Sphinx, what: str, name: str, it: Any, options: Any, lines: list[str]
) -> None:
    """Give a dataclass a section Attributes: each field with the comment on its line."""
    if what != "class" or not dataclasses.is_dataclass(it):
        return
    comments: dict[str, str] = {}
    for base in reversed(it.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= FIELD.findall(inspect.getsource(base))
    section = ["", "Attributes", "----------"]
    names = vars(sys.modules[it.__module__])
    for field in dataclasses.fields(it):
        kind = spelled(str(field.type), names)
        section += [f"{field.name} : {kind}", f"    {comments.get(field.name, '')}"]
    rules = [i for i, line in enumerate(lines) if RULE.fullmatch(line)]
    place = rules[0] - 1 if rules else len(lines)
    lines[place:place] = [*section, ""]


def escape_bars(app: Sphinx, what: str, name: str, it: Any, options: Any, lines: list[str]) -> None:
    """Let ``|x|`` be a norm: reStructuredText sees the name of a substitution."""
    for i, line in enumerate(lines):
        if ">>>" not in line:
            lines[i] = re.sub(r"(``.*?``)|\|", lambda found: found[1] or r"\|", line)


def setup(app: Sphinx) -> dict[str, Any]:
    """Come before napoleon, which formats the sections."""
    app.connect("autodoc-before-process-signature", keep_as_written, priority=400)
    app.connect("autodoc-process-docstring", describe_fields, priority=400)
    app.connect("autodoc-process-docstring", escape_bars, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
