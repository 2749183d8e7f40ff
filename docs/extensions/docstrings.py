"""Docstrings as the reference page wants them: fields described, bars left alone."""

import dataclasses
import inspect
import re
from typing import Any

from sphinx.application import Sphinx

FIELD = re.compile(r"^    (\w+): .*?  # (.+)$", re.MULTILINE)
RULE = re.compile(r"\s*-{3,}")


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
    for field in dataclasses.fields(it):
        section += [field.name, f"    {comments.get(field.name, '')}"]
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
    app.connect("autodoc-process-docstring", describe_fields, priority=400)
    app.connect("autodoc-process-docstring", escape_bars, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
