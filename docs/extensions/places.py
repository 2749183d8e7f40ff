"""Markdown files of the repository, as pages: their links lead to pages, numbers stay whole."""

import re
from typing import Any

from sphinx.application import Sphinx

TABLE = re.compile(r"\]\((?:\.\./)?tests/benchmarks/(\w+)\.md\)")
FIGURE = re.compile(r"(\]\(|src=\")figures/")
NETWORKS = re.compile(r"\]\((?:\.\./)?tests/networks/README\.md\)")
PAGE = re.compile(r"\]\(docs/(\w+\.md)")
ROW = re.compile(r"^\|.*", re.MULTILINE)


def to_pages(app: Sphinx, *where: Any) -> None:
    """Change a file that is read or included."""
    *_, content = where
    for link, page in {
        TABLE: r"](#bench-\1)",
        NETWORKS: "](#bench-networks)",
        FIGURE: r"\1../figures/",
        PAGE: r"](/\1",
    }.items():
        content[0] = link.sub(page, content[0])
    content[0] = ROW.sub(
        lambda row: row[0].replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"), content[0]
    )


def setup(app: Sphinx) -> dict[str, Any]:
    """See to what is read and to what is included."""
    app.connect("source-read", to_pages)
    app.connect("include-read", to_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
