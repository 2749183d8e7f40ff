"""Charts of a page: arrays in, `Chart` out.

What is compared in a chart has a name, and where it was measured several times over a training also
an epoch or step. Holes are left where values are not finite. No PyTorch is needed.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from lossgeometry.pages.page import DASHES, Chart, Control, Mark, Panel
from lossgeometry.plots.landscapes import shared_norm
from lossgeometry.plots.spectra import kernel_density
from lossgeometry.plots.style import STYLE, tell_apart

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f")
GRAY = "#7f7f7f"
VIEW, VIEWS = "view", ("surface", "contours")
FLOOR = 1e-7  # of the largest density: what is below it is not shown

Key: TypeAlias = tuple[str, str]  # a name, and the epoch or step; "" where there is but one


@dataclass(frozen=True)
class Legend:
    """What is compared in a chart, and how it is told apart: by colours and by kinds of lines."""

    keys: Sequence[Key]
    of: str  # what the names are of: window, checkpoint, ...
    over: str = "epoch"  # what the training is counted in
    colors: Mapping[str, str] = field(default_factory=dict)  # of names; of others the next ones
    shown: Sequence[str] = ()  # names that are switched on at first; none: all

    def mark(self, name: str) -> Mark:
        """The name with its colour and line."""
        names = list(dict.fromkeys(own for own, _ in self.keys))
        i = names.index(name)
        color = self.colors.get(name, COLORS[i % len(COLORS)])
        dash = list(DASHES)[i % len(DASHES)]
        return Mark(name, color, dash)

    def controls(self) -> list[Control]:
        """Switches for the names and a slider over the training, where there are several."""
        names = list(dict.fromkeys(name for name, _ in self.keys))
        times = sorted({time for _, time in self.keys}, key=_number)
        controls = []
        if len(names) > 1:
            marks = [self.mark(name) for name in names]
            controls.append(Control(self.of, "switches", marks, chosen=self.shown))
        if len(times) > 1:
            controls.append(Control(self.over, "slider", [Mark(time) for time in times]))
        return controls

    def when(self, key: Key) -> dict[str, str]:
        """What has to be chosen for `key` to be shown."""
        kept = {control.name for control in self.controls()}
        return {n: value for n, value in zip((self.of, self.over), key, strict=True) if n in kept}

    def caption(self, key: Key) -> str:
        """Name, and epoch or step."""
        return html.escape(", ".join(filter(None, [key[0], key[1] and f"{self.over} {key[1]}"])))


def _number(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return np.inf, text


@dataclass(frozen=True)
class Surface:
    """Losses on a grid of points in a plane."""

    xs: np.ndarray  # (nx,)
    ys: np.ndarray  # (ny,)
    losses: Mapping[str, np.ndarray]  # of (ny, nx)
    axes: tuple[str, str] = ("direction 1", "direction 2")
    way: np.ndarray | None = None  # (n, 2), of a training across the plane, from its start
    note: str = ""  # beside the name


def surfaces(
    title: str, legend: Legend, found: Mapping[Key, Surface], *, log: bool = True, note: str = ""
) -> Chart:
    """Surfaces to rotate, all as one is, or their contours, on one scale for each loss.

    Heights and colours are logarithms where `log` and all losses are positive. Printed are the
    contours.
    """
    losses = list(dict.fromkeys(loss for surface in found.values() for loss in surface.losses))
    panels = []
    for loss in losses:
        own = {key: surface for key, surface in found.items() if loss in surface.losses}
        norm = shared_norm([surface.losses[loss] for surface in own.values()], log=log)
        scaled = np.log10 if isinstance(norm, LogNorm) else np.asarray
        levels = np.asarray(norm.inverse(np.linspace(0, 1, 6)))
        ticks = dict(tickvals=scaled(levels).tolist(), ticktext=tell_apart(levels))
        low, *_, high = ticks["tickvals"]
        coloraxis = dict(
            cmin=low,
            cmax=high,
            colorscale=STYLE["image.cmap"].capitalize(),
            colorbar=dict(title=dict(text=html.escape(loss)), **ticks),
        )
        for key, surface in own.items():
            values = surface.losses[loss]
            values = np.where(np.isfinite(values), values, np.nan)
            with np.errstate(invalid="ignore"):
                heights = scaled(values)
            texts = [html.escape(text) for text in surface.axes]
            x, y = (dict(title=dict(text=text)) for text in texts)
            short = [
                text if len(text) < 16 else f"direction {i}" for i, text in enumerate(texts, 1)
            ]
            aside = [dict(title=dict(text=text)) for text in short]
            height = dict(title=dict(text=""), range=[low, high], **ticks)
            solid = dict(zip(("xaxis", "yaxis", "zaxis"), (*aside, height), strict=True))
            point = dict(
                x=surface.xs,
                y=surface.ys,
                z=heights,
                customdata=values,
                coloraxis="coloraxis",
                name=html.escape(key[0]),
                hovertemplate="%{x:.3f}, %{y:.3f}<br>" + html.escape(loss) + " %{customdata:.5g}",
            )
            gap = (high - low) / 14
            contours = dict(start=low + gap, end=high - gap, size=gap)
            flat = [dict(point, type="contour", contours=contours, line=dict(width=0.5))]
            flat += _way(surface.way)
            for view, traces, axes in zip(
                VIEWS,
                ([dict(point, type="surface")], flat),
                (dict(scene=solid), dict(x=x, y=y)),
                strict=True,
            ):
                panels.append(
                    Panel(
                        " ".join(filter(None, [legend.caption(key), html.escape(surface.note)])),
                        traces,
                        axes,
                        when={VIEW: view}
                        | ({"loss": loss} if losses[1:] else {})
                        | legend.when(key),
                        coloraxis=coloraxis,
                        square=True,
                        height=360,
                    )
                )
    views = Control(VIEW, "choice", [Mark(view) for view in VIEWS], on_paper=VIEWS[1])
    which = [Control("loss", "choice", [Mark(loss) for loss in losses])] if losses[1:] else []
    return Chart(title, panels, [views, *which, *legend.controls()], note)


def _way(steps: np.ndarray | None) -> list[dict[str, Any]]:
    """Over contours: where a training went, and the weights that the plane goes through."""
    seen: dict[str, Any] = dict(
        type="scatter", marker=dict(color="white", line=dict(color="black", width=1))
    )
    traces = []
    if steps is not None and len(steps):
        x, y = np.asarray(steps).T
        numbers = [f"snapshot {i}" for i in range(len(steps))]
        line = dict(color="white", width=1.5)
        about = dict(text=numbers, hovertemplate="%{text}<br>%{x:.3f}, %{y:.3f}<extra></extra>")
        traces.append(dict(seen, x=x, y=y, mode="lines+markers", line=line, **about))
    here = dict(x=np.zeros(1), y=np.zeros(1), mode="markers", hoverinfo="skip")
    cross = dict(symbol="cross", size=8, color="white", line=dict(color="black", width=1))
    return [*traces, dict(seen, **here | dict(marker=cross))]


@dataclass(frozen=True)
class Curve:
    """Values with their errors."""

    x: np.ndarray  # (n,)
    y: np.ndarray  # (n,)
    error: np.ndarray | None = None  # (n,), half of an interval
    dots: bool = False  # with bars; else a line with a band
    x_error: np.ndarray | None = None  # (n,)
    color: str | None = None  # where it is not that of its name


@dataclass(frozen=True)
class Plot:
    """Curves that share their axes."""

    title: str
    x: str
    y: str
    curves: Mapping[Key, Curve | Sequence[Curve]]
    log: bool = False  # of the ordinate
    places: Sequence[str] = ()  # names of 0, 1, ... on the abscissa, if it is of names
    joined: bool = True
    notes: Sequence[Mapping[str, Any]] = ()
    width: int = 300
    foot: int = 52
    axes: Mapping[str, Any] = field(default_factory=dict)  # what else plotly is to know of "x", "y"


def curves(title: str, legend: Legend, plots: Sequence[Plot], *, note: str = "") -> Chart:
    """Plots side by side, whose curves are switched on and off together."""
    panels = []
    for plot in plots:
        x: dict[str, Any] = dict(title=dict(text=html.escape(plot.x)))
        y: dict[str, Any] = dict(title=dict(text=html.escape(plot.y)))
        if plot.places:
            texts = [html.escape(place) for place in plot.places]
            x |= dict(tickvals=list(range(len(texts))), ticktext=texts)
        traces: list[dict[str, Any]] = []
        for key, own in plot.curves.items():
            for curve in [own] if isinstance(own, Curve) else own:
                traces.append(_curve(curve, legend, key, plot.places, joined=plot.joined))
        if plot.log:
            y |= _decades(np.concatenate([trace["y"] for trace in traces]))
        axes = {name: own | plot.axes.get(name, {}) for name, own in (("x", x), ("y", y))}
        how: dict[str, Any] = dict(notes=plot.notes, width=plot.width, foot=plot.foot)
        panels.append(Panel(html.escape(plot.title), traces, axes, **how))
    return Chart(title, panels, legend.controls(), note)


def _curve(
    curve: Curve, legend: Legend, key: Key, places: Sequence[str] = (), *, joined: bool = True
) -> dict[str, Any]:
    mark = legend.mark(key[0])
    common = dict(
        type="scatter",
        name=legend.caption(key),
        color=curve.color or mark.color,
        when=legend.when(key),
    )
    at = "%{text}" if places else "%{x:.4g}"
    about: dict[str, Any] = dict(hovertemplate=f"{at}: %{{y:.5g}}")
    if places:
        about["text"] = [html.escape(places[round(x)]) for x in curve.x]
    if curve.error is not None:
        about |= dict(customdata=curve.error)
        if np.isfinite(curve.error).all():
            about["hovertemplate"] += " ± %{customdata:.2g}"
        bars = dict(type="data", array=np.nan_to_num(curve.error))
        about |= dict(error_y=bars) if curve.dots else dict(band=curve.error)
    if curve.x_error is not None and np.isfinite(curve.x_error).all():
        about["error_x"] = dict(type="data", array=curve.x_error)
    modes = ["lines"] * (joined and len(curve.x) > 1) + ["markers"] * (curve.dots or not joined)
    line = dict(dash="dot", width=1) if curve.color else dict(dash=mark.dash, width=2)
    about |= dict(line=line, marker=dict(size=9 if len(curve.x) == 1 else 6))
    return dict(common, x=curve.x, y=curve.y, mode="+".join(modes), **about)


def max_eigenvalues(
    title: str,
    legend: Legend,
    found: Mapping[Key, tuple[np.ndarray, np.ndarray | None]],
    *,
    note: str = "",
) -> Chart:
    """Densities of Hessian max eigenvalues below and above zero, and every one of them.

    Parameters
    ----------
    found
        Eigenvalues of mini-batches (n_batches, k), and their errors, or None.
    """
    panels = []
    for half, sign in (("negative", -1), ("positive", 1)):
        densities: list[dict[str, Any]] = []
        rugs: list[dict[str, Any]] = []
        minus, top = "−" * (sign < 0), 0.0
        for key, (eigenvalues, errors) in found.items():
            mark = legend.mark(key[0])
            own = (sign * eigenvalues > 0) & np.isfinite(eigenvalues)
            share = own.sum() / max(eigenvalues.size, 1)
            common = dict(
                type="scatter",
                name=f"{legend.caption(key)} ({share:.1%})",
                color=mark.color,
                when=legend.when(key),
            )
            grid, density = kernel_density(np.abs(eigenvalues[own]), eigenvalues.size)
            top = max(top, float(density.max(initial=0)))
            line = dict(dash=mark.dash, width=2)
            below = "%{x:.4g}: %{y:.3g} per decade"
            shown = dict(mode="lines", line=line, hovertemplate=f"{minus}{below}")
            densities.append(dict(common, x=grid, y=density, **shown))
            hover = f"{minus}%{{x:.6g}}"
            rug = dict(common, x=np.abs(eigenvalues[own]), mode="markers")
            if errors is not None and np.isfinite(errors[own]).all():
                rug["customdata"] = errors[own]
                hover += " ± %{customdata:.1g}"
            rugs.append(dict(rug, hovertemplate=hover))
        names = list(dict.fromkeys(name for name, _ in found))
        for (name, _), rug in zip(found, rugs, strict=True):
            level = -0.05 * (names.index(name) + 1) * (top or 1)
            marker = dict(symbol="line-ns-open", size=7, opacity=0.6)
            rug |= dict(y=np.full(len(rug["x"]), level), marker=marker)
        seen = np.concatenate([trace["x"] for trace in [*densities, *rugs]])
        x = _decades(seen, minus) | dict(title=dict(text=f"{half} Hessian max eigenvalues"))
        if half == "negative":
            x |= dict(range=x["range"][::-1])
        bottom = -0.05 * (len(names) + 1) * (top or 1)
        y = dict(title=dict(text="density per decade"), range=[bottom, 1.05 * (top or 1)])
        y |= dict(tickvals=list(MaxNLocator(4).tick_values(0, top or 1)))
        panels.append(
            Panel(f"{half} half, on a scale of its own", [*densities, *rugs], dict(x=x, y=y))
        )
    return Chart(title, panels, legend.controls(), note)


def _decades(values: np.ndarray, sign: str = "") -> dict[str, Any]:
    """A logarithmic axis filled by those of `values` that have a place on it, with plain ticks."""
    positive = values[(values > 0) & np.isfinite(values)]
    logs = np.log10(positive) if len(positive) else np.zeros(1)
    low, high = float(logs.min()), float(logs.max())
    margin = 0.03 * (high - low) or 0.1
    if high - low < 1:
        ticks = np.asarray(MaxNLocator(5).tick_values(10**low, 10**high))
    else:
        subs = (1, 2, 5) if high - low < 2 else (1, 3) if high - low < 4 else (1,)
        powers = 10.0 ** np.arange(np.floor(low), np.ceil(high) + 1)
        ticks = np.outer(powers, subs).ravel()
    ticks = ticks[ticks > 0]
    shown = dict(tickvals=ticks.tolist(), ticktext=[f"{sign}{tick:g}" for tick in ticks])
    return dict(type="log", range=[low - margin, high + margin], **shown)


def densities(
    title: str,
    legend: Legend,
    found: Mapping[Key, tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    note: str = "",
) -> Chart:
    """Spectral densities with bands of their errors, on a logarithmic axis.

    Parameters
    ----------
    found
        Grid, density and its error, (n,) each.
    """
    every = np.concatenate([density for _, density, _ in found.values()])
    top = float(every[np.isfinite(every)].max(initial=0.0))
    traces: list[dict[str, Any]] = []
    for key, (grid, density, error) in found.items():
        traces.append(_curve(Curve(grid, density, error), legend, key) | dict(floor=FLOOR * top))
    edges = np.log10([FLOOR * top, 3 * top]).tolist() if top > 0 else None
    axes = dict(
        x=dict(title=dict(text="Hessian eigenvalue")),
        y=dict(
            type="log",
            range=edges,
            title=dict(text="spectral density"),
            dtick=1,
            exponentformat="power",
        ),
    )
    return Chart(title, [Panel("", traces, axes, width=900)], legend.controls(), note)


@dataclass(frozen=True)
class Difference:
    """With its interval, and what it is taken for."""

    text: str  # in lines
    estimate: float
    low: float
    high: float
    verdict: Mark
    hollow: bool = False  # its dot


def intervals(title: str, plots: Mapping[str, Sequence[Difference]], *, note: str = "") -> Chart:
    """Differences with their intervals, one below the other, and zero; a panel for each unit."""
    panels = []
    for unit, rows in plots.items():
        traces, notes = [], []
        for i, row in enumerate(rows):
            ends = dict(x=np.array([row.low, row.estimate, row.high]), y=np.full(3, i))
            hover = f"{row.estimate:+.4g}, 95 %: {row.low:+.4g} to {row.high:+.4g}"
            dot = f"circle{'-open' * row.hollow}"
            traces.append(
                dict(
                    **ends,
                    type="scatter",
                    mode="lines+markers",
                    color=row.verdict.color,
                    name=html.escape(row.verdict.text),
                    marker=dict(symbol=["line-ns-open", dot, "line-ns-open"], size=9),
                    hovertemplate=hover,
                )
            )
            place = dict(x=0, xanchor="left", y=i - 0.12, yanchor="bottom", align="left")
            lines = html.escape(row.text).replace("\n", "<br>")
            notes.append(dict(place, text=lines, font=dict(size=11)))
        x = dict(rangemode="tozero", zerolinewidth=3)
        y = dict(range=[len(rows) - 0.7, -0.75], showticklabels=False, showgrid=False)
        y |= dict(zeroline=False)
        how: dict[str, Any] = dict(notes=notes, width=5000, height=66 + 54 * len(rows), foot=28)
        panels.append(Panel(html.escape(unit), traces, dict(x=x, y=y), side=14, **how))
    return Chart(title, panels, note=note)


def layers(
    title: str,
    legend: Legend,
    found: Mapping[Key, tuple[Sequence[str], np.ndarray]],
    *,
    note: str = "",
) -> Chart:
    """Heat maps of the top eigenvalues of every layer, blue negative, red positive.

    Parameters
    ----------
    found
        Names of the layers, and eigenvalues (layers, k), NaN where one is not known.
    """
    every = np.concatenate([np.abs(values[np.isfinite(values)]) for _, values in found.values()])
    largest = float(every.max(initial=1e-12))
    linear = 10.0 ** np.floor(np.log10(largest / 1e2))  # below it, colours are as values
    powers = linear * 10.0 ** np.arange(0, 4)
    ticks = np.concatenate([-powers[::-1], [0], powers])
    ticks = ticks[np.abs(ticks) <= largest]
    end = float(np.arcsinh(largest / linear))
    bar = dict(tickvals=np.arcsinh(ticks / linear).tolist(), ticktext=[f"{t:g}" for t in ticks])
    bar |= dict(title=dict(text="eigenvalue"))
    coloraxis = dict(cmin=-end, cmax=end, colorscale="RdBu", colorbar=bar)
    panels = []
    for key, (names, values) in found.items():
        texts = [html.escape(name) for name in names]
        ranks = list(range(1, values.shape[1] + 1))
        trace = dict(
            type="heatmap",
            x=ranks,
            y=texts,
            z=np.arcsinh(values / linear),
            customdata=values,
            coloraxis="coloraxis",
            name=legend.caption(key),
            hovertemplate="%{y}, %{x}: %{customdata:.5g}",
        )
        x = dict(title=dict(text="rank by magnitude"), tickvals=ranks)
        y = dict(autorange="reversed", tickvals=texts, tickfont=dict(size=10), nticks=None)
        panels.append(
            Panel(
                legend.caption(key),
                [trace],
                dict(x=x, y=y),
                when=legend.when(key),
                coloraxis=coloraxis,
                side=20 + 6 * max(map(len, names)),
                height=120 + 15 * len(names),
            )
        )
    return Chart(title, panels, legend.controls(), note)
