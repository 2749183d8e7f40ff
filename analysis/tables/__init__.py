"""Tables and signs of life on the terminal; what is in which table. Most need no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others are numbers."""
    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # A terminal is as wide as it is; a file has room for everything.
    (console if console.is_terminal else Console(width=200)).print(table)


def working(text: str) -> Status:
    """Show that something is going on, for as long as the context lasts, if anyone is watching."""
    return Console(stderr=True).status(text)
