"""The table of a benchmark: printed, and written to a file, line by line."""

import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

Row = tuple[str, str, float, float]  # work, against, ratio, ratio to reach


def write_table(path: Path, rows: Iterable[Row], *, packages: Iterable[str], threads: int) -> None:
    """Print each row as soon as it is known, and write those so far to `path`."""
    lines = [
        f"{platform.processor() or platform.machine()}, {threads} threads, Python "
        f"{platform.python_version()}, " + ", ".join(f"{p} {version(p)}" for p in packages),
        "",
        "| work | against | ratio | to reach |",
        "|---|---|---:|---:|",
    ]
    print("\n".join(lines), flush=True)
    for work, against, ratio, goal in rows:
        lines.append(f"| {work} | {against} | {ratio:.2f} | {goal:g} |")
        print(lines[-1], flush=True)
        path.write_text("\n".join([*lines, ""]))
