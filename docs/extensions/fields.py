"""The fields of a dataclass, each with the comment on its line, as the section Attributes."""

import dataclasses
import inspect
import re
from typing import Any

from sphinx.application import Sphinx

FIELD = re.compile(r"^    (\w+): .*?  # (.+)$", re.MULTILINE)


def describe(app: Sphinx, what: str, name: str, it: Any, options: Any, lines: list[str]) -> None:
    """Add the section to the lines of a docstring, before those that follow the attributes."""
    if what != "class" or not dataclasses.is_dataclass(it):
        return
    comments: dict[str, str] = {}
    for base in reversed(it.__mro__[:-1]):
        if dataclasses.is_dataclass(base):
            comments |= FIELD.findall(inspect.getsource(base))
    fields = [field.name for field in dataclasses.fields(it)]
    section = ["", "Attributes", "----------"]
    for field in fields:
        section += [field, f"    {comments.get(field, '')}"]
    rules = [i for i, line in enumerate(lines) if re.fullmatch("-{3,}", line.strip())]
    place = rules[0] - 1 if rules else len(lines)
    lines[place:place] = [*section, ""]


def setup(app: Sphinx) -> dict[str, Any]:
    """Come before napoleon, which formats the section."""
    app.connect("autodoc-process-docstring", describe, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
