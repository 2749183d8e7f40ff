"""One HTML file that stands alone: sections of texts, tables and charts that answer to a hand.

A chart is one or more panels of traces in the format of plotly.js, and the controls above them.
What is shown when is said by each panel and trace: `when` maps names of controls to the option that
has to be chosen. How panels are laid out, coloured and drawn, is in ``page.js``.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from lossgeometry.errors import InputError
from lossgeometry.running.saving import write_whole

DASHES = {  # of lines, by plotly's names: lengths of strokes and gaps
    "solid": "",
    "dash": "7 4",
    "dot": "2 3",
    "dashdot": "7 3 2 3",
    "longdash": "11 4",
    "longdashdot": "11 3 2 3",
}


@dataclass(frozen=True)
class Mark:
    """A text with the colour, and the line, that stand for it in charts."""

    text: str
    color: str | None = None  # "#rrggbb"
    dash: str = "solid"  # of `DASHES`


@dataclass(frozen=True)
class Control:
    """What decides which traces are shown."""

    name: str
    kind: Literal["switches", "choice", "slider"]  # any of the options, or one of them
    options: Sequence[Mark]
    chosen: Sequence[str] = ()  # at first, of switches; none: all. Else the first of a choice,
    #                             and the last of a slider
    on_paper: str | None = None  # which of a choice is printed


@dataclass(frozen=True)
class Panel:
    """Traces that share their axes."""

    title: str
    traces: Sequence[Mapping[str, Any]]  # plotly's; ours are "color", "when", "band", "floor"
    axes: Mapping[str, Any]  # plotly's {"x": ..., "y": ...}, or {"scene": ...} in three dimensions
    when: Mapping[str, str] = field(default_factory=dict)
    coloraxis: Mapping[str, Any] | None = None  # all panels that are shown together have the same
    notes: Sequence[Mapping[str, Any]] = ()  # plotly's annotations
    square: bool = False  # one scale for both axes
    width: int = 300  # pixels, at least, for panels to stand side by side
    height: int = 300
    side: int = 58  # pixels on the left, for the names of ticks
    foot: int = 52  # and below


@dataclass(frozen=True)
class Chart:
    """Panels, and the controls above them."""

    title: str
    panels: Sequence[Panel]
    controls: Sequence[Control] = ()
    note: str = ""  # what is to be known to read it


@dataclass(frozen=True)
class Table:
    """The first column is text, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Mark]]


@dataclass(frozen=True)
class Section:
    """A heading, and what stands below it; a text is a paragraph."""

    title: str
    blocks: Sequence[Block]


Block: TypeAlias = "Section | Chart | Table | str"


def write_page(path: str | Path, title: str, blocks: Sequence[Block]) -> Path:
    """Write a page, whole or not at all, and return its path.

    plotly.js is in it, once, so that it needs no network. Needs plotly.

    Raises
    ------
    InputError
        If plotly is not installed.
    """
    path = Path(path)
    own = resources.files(__package__)
    body = "".join(map(_block, blocks))
    sections = [block for block in blocks if isinstance(block, Section)]
    links = "".join(f'<a href="#{_id(s.title)}">{html.escape(s.title)}</a>' for s in sections)
    page = _PAGE.format(
        title=html.escape(title),
        style=own.joinpath("page.css").read_text(encoding="utf-8"),
        links=f"<nav>{links}</nav>" if len(sections) > 1 else "",
        body=body,
        plotly=_plotly() if "<figure" in body else "",
        script=own.joinpath("page.js").read_text(encoding="utf-8"),
    )
    write_whole(path, page.encode())
    return path


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<button type="button" id="theme">light or dark</button>
{links}
</header>
<main>
{body}</main>
<noscript><p>Charts need JavaScript; texts and tables do not.</p></noscript>
<script>{plotly}</script>
<script>
{script}</script>
</body>
</html>
"""


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError("plotly is not installed, expected pip install plotly") from error
    return str(get_plotlyjs())


def _id(title: str) -> str:
    return re.sub(r"[^\w-]+", "-", title.lower()).strip("-") or "section"


def _block(block: Block, level: int = 2) -> str:
    if isinstance(block, str):
        return f"<p>{html.escape(block)}</p>\n"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Chart):
        return _chart(block)
    within = "".join(_block(inner, level + 1) for inner in block.blocks)
    head = f"<h{level}>{html.escape(block.title)}</h{level}>"
    place = f' id="{_id(block.title)}"' if level == 2 else ""  # what is linked to
    return f"<section{place}>\n{head}\n{within}</section>\n"


def _table(table: Table) -> str:
    def row(cells: Iterable[str | Mark]) -> str:
        """On a narrow screen the columns' names stand before the cells."""
        text = ""
        for column, cell in zip(table.columns, cells, strict=True):
            shown = _mark(cell) if isinstance(cell, Mark) else html.escape(cell)
            shown = shown.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
            text += f'<td data-column="{html.escape(column)}">{shown}</td>'
        return f"<tr>{text}</tr>\n"

    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = "".join(map(row, table.rows))
    caption = f"<caption>{html.escape(table.title)}</caption>"
    return f"<table>{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>\n"


def _mark(mark: Mark) -> str:
    """With a piece of its line."""
    text = html.escape(mark.text)
    if mark.color is None:
        return text
    line = f'<line x1="0" y1="5" x2="26" y2="5" stroke-dasharray="{DASHES[mark.dash]}"/>'
    return f'<span><svg style="--own: {mark.color}">{line}</svg>{text}</span>'


def _chart(chart: Chart) -> str:
    note = f"<small>{html.escape(chart.note)}</small>" if chart.note else ""
    controls = "".join(map(_control, chart.controls))
    form = f"<form>{controls}</form>"
    content = _json({"panels": [vars(panel) for panel in chart.panels]})
    return (
        f"<figure>\n<figcaption>{html.escape(chart.title)}{note}</figcaption>\n{form}\n"
        f'<div class="plot"></div>\n<script type="application/json">{content}</script>\n</figure>\n'
    )


def _control(control: Control) -> str:
    name, texts = html.escape(control.name), [option.text for option in control.options]
    if control.kind == "slider":
        last = len(texts) - 1
        return (
            f'<label class="slider">{name} <input type="range" name="{name}" min="0" max="{last}" '
            f'value="{last}" data-options="{html.escape(json.dumps(texts))}">'
            f"<output>{html.escape(texts[-1])}</output></label>"
        )
    if control.kind == "switches":
        kind, chosen = "checkbox", set(control.chosen or texts)
    else:
        kind, chosen = "radio", {texts[0]}
    inputs = ""
    for option in control.options:
        checked = " checked" if option.text in chosen else ""
        paper = " data-paper" if option.text == control.on_paper else ""
        inputs += (
            f'<label><input type="{kind}" name="{name}" value="{html.escape(option.text)}"'
            f"{checked}{paper}>{_mark(option)}</label>"
        )
    return f"<fieldset><legend>{name}</legend>{inputs}</fieldset>"


def _json(value: dict[str, Any]) -> str:
    """For a script element: every array once, as float32, and what refers to them.

    NaN and infinity are drawn as holes.
    """
    numbers: dict[str, int] = {}

    def refer(array: object) -> dict[str, int]:
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{type(array).__name__} found, expected an array")
        data = base64.b64encode(array.astype("<f4").tobytes()).decode()
        text = json.dumps({"shape": array.shape, "data": data})
        return {"$": numbers.setdefault(text, len(numbers))}

    rest = json.dumps(value, default=refer, separators=(",", ":"), allow_nan=False)
    return f'{{"arrays":[{",".join(numbers)}],{rest[1:]}'.replace("<", "\\u003c")
