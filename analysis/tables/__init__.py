"""Tables and signs of life on the terminal; what is in which table. Most need no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table

Content = tuple[str, list[str], list[list[str]]]  # of a table: title, columns, rows

BETWEEN = 3  # characters from one column to the next


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others are numbers.

    In a narrow terminal rows take several lines, broken between words: no number is cut.
    """
    console = Console()
    # A terminal is as wide as it is; a file has room for everything.
    at_most = console.width if console.is_terminal else 200
    widths = _widths(list(zip(columns, *rows, strict=True)), at_most - BETWEEN * len(columns))
    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False)
    for i, (column, width) in enumerate(zip(columns, widths, strict=True)):
        table.add_column(column, justify="right" if i else "left", width=width)
    for row in rows:
        table.add_row(*row)
    Console(width=max(at_most, sum(widths) + BETWEEN * len(columns))).print(table)


def _widths(columns: Sequence[Sequence[str]], at_most: int) -> list[int]:
    """Of the columns, so many characters together, or as few as their words take."""
    widths = [max(map(len, column)) for column in columns]
    least = [max(map(_longest_word, column)) for column in columns]
    while sum(widths) > at_most and widths != least:
        spare = [width - needed for width, needed in zip(widths, least, strict=True)]
        widths[spare.index(max(spare))] -= 1
    return widths


def _longest_word(cell: str) -> int:
    """Characters that must stand in one line, the indentation of the first being one of them."""
    indentation = len(cell) - len(cell.lstrip())
    return indentation + max(map(len, cell.split()), default=0)


def working(text: str) -> Status:
    """Show that something is going on, for as long as the context lasts, if anyone is watching."""
    return Console(stderr=True).status(text)
