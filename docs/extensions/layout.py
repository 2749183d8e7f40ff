"""The arrays in HDF5 files, as tables, in place of ``<!-- arrays of results -->``."""

import re
from collections.abc import Mapping
from typing import Any

from sphinx.application import Sphinx

from analysis.measurements.schema import MEASUREMENTS
from lossgeometry.layout import RESULTS, Form

PLACE = re.compile(r"<!-- arrays of (\w+) -->")


def table(title: str, description: str, forms: Mapping[str, Form]) -> str:
    """One kind of result or measurement."""
    rows = ["", "| array | type and axes | what it is | units |", "|---|---|---|---|"]
    for name, form in forms.items():
        what = form.description.replace("|", "\\|").replace("*", "\\*")
        rows.append(f"| `{name}` | `{form.shape}` | {what} | {form.units.replace('^2', '²')} |")
    return "\n".join([f"**{title}.** {description}", *rows, ""])


def show(app: Sphinx, page: str, content: list[str]) -> None:
    """Put the tables where a page wants them."""
    kinds = {
        "results": {name: ("", forms) for name, forms in RESULTS.items()},
        "measurements": MEASUREMENTS,
    }
    content[0] = PLACE.sub(
        lambda found: "\n".join(table(name, *kind) for name, kind in kinds[found[1]].items()),
        content[0],
    )


def setup(app: Sphinx) -> dict[str, Any]:
    """See to what is read."""
    app.connect("source-read", show)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
