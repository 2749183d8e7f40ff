"""Figures of robustness against corruptions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from analysis.drawing import alike, compared, head, legend, save
from analysis.measurements import labels
from analysis.measurements.comparisons import file_stem, studies
from analysis.measurements.schema import Measurement
from lossgeometry import plots
from lossgeometry.statistics import Mean, across_images, across_seeds

SLOT = 0.8  # inches of the name of a corruption


def draw_robustness(
    measurements: Iterable[Measurement],
    out: Path,
    formats: Sequence[str] = ("png",),
    *,
    origin: str = "",
) -> list[Path]:
    """For each study: ``robustness_DATASET``.

    At the last epoch that was measured: mean corruption error of each window, error against
    severity, and error of each corruption. Intervals are over seeds, and of a single seed over
    images. `origin` becomes a part of the names.
    """
    written = []
    for name, members in studies(measurements).items():
        final = at_the_end(members)
        # A study of other models is named for them, one of CSANs for what it differs in.
        own = compared(final) if labels.foreign(final[0]) else file_stem(name)
        stem = "_".join(filter(None, ("robustness", own, origin)))
        by_label = labels.by_architecture(alike(final, stem))
        palette = labels.colors(by_label)
        first = next(iter(by_label.values()))[0]
        counts = {len(seeds) for seeds in by_label.values()}
        over = "images" if counts == {1} else "seeds"
        over += " (bars of a single seed: over images)" if 1 in counts - {max(counts)} else ""
        with mpl.rc_context(plots.STYLE):
            figure = Figure(figsize=(9, 6.3))
            halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.2))
            top, bottom = halves
            bars, severity = top.subplots(1, 2, width_ratios=(1, 1.3))
            means = {text: mean_corruption_error(seeds) for text, seeds in by_label.items()}
            plots.plot_bars(
                {text: (100 * e.mean, 100 * e.half_width) for text, e in means.items()},
                ylabel="mean corruption error (%)",
                colors=palette,
                ax=bars,
            )
            each = bottom.subplots()
            texts = [text.decode().replace("_", "\n") for text in first.arrays["corruptions"]]
            names = [plots.wrapped(text, SLOT, 7) for text in texts]
            shift = 0.6 / len(by_label)
            for i, (text, seeds) in enumerate(by_label.items()):
                style: dict[str, Any] = dict(ylabel="error (%)", label=text, color=palette[text])
                plots.plot_points(
                    np.arange(6),
                    *over_seeds([by_severity(m) for m in seeds]),
                    xlabel="severity (0: clean)",
                    line=plots.LINES[i % len(plots.LINES)],
                    ax=severity,
                    **style,
                )
                plots.plot_points(
                    np.arange(len(names)) + shift * (i - (len(by_label) - 1) / 2),
                    *over_seeds([m.arrays["error"].mean(axis=1) for m in seeds]),
                    xlabel="",
                    names=names,
                    line="none",
                    ax=each,
                    **style,
                )
            each.tick_params(axis="x", labelsize=7)
            legend(bottom, severity, most=6, title=labels.kind(members))
            images = len(first.arrays["image_error"])
            head(
                figure,
                f"Robustness on {name}: {images} test images under {len(names)} "
                f"{first.options['source']} corruptions\n"
                f"mean and 95 % interval over {over}, {labels.seeds(by_label)}",
            )
            written += save(figure, out, stem, formats)
    return written


def mean_corruption_error(seeds: Sequence[Measurement]) -> Mean:
    """Over seeds, or over the images of a single one."""
    if len(seeds) > 1:
        return across_seeds([float(m.arrays["mean_corruption_error"]) for m in seeds])
    return across_images(seeds[0].arrays["image_error"])


def at_the_end(members: Sequence[Measurement]) -> list[Measurement]:
    """Those of the last epoch that was measured."""
    last = max(m.checkpoint["epoch"] for m in members)
    return [m for m in members if m.checkpoint["epoch"] == last]


def by_severity(m: Measurement) -> np.ndarray:
    """Error without corruption and at each severity: (6,)."""
    return np.concatenate([[m.arrays["clean_error"]], m.arrays["error"].mean(axis=0)])


def over_seeds(errors: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and half-interval, in per cent, of (n,) errors of each seed."""
    estimates = [across_seeds(column) for column in 100 * np.array(errors).T]
    return np.array([e.mean for e in estimates]), np.array([e.half_width for e in estimates])


def draw_contact_sheet(
    image: np.ndarray, dataset: str, out: Path, formats: Sequence[str] = ("png",), *, seed: int = 0
) -> list[Path]:
    """``corruptions_DATASET``: one uint8 (height, width, channels) image under everything."""
    from models.data.corruptions import CORRUPTIONS, SEVERITIES, contact_sheet

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(6, 10))
        severities = ["clean", *(f"severity {s + 1}" for s in range(SEVERITIES))]
        names = [name.replace("_", " ") for name in CORRUPTIONS]
        ax = figure.subplots()
        plots.plot_contact_sheet(contact_sheet(image, seed=seed), names, severities, ax=ax)
        ax.tick_params(axis="x", labelsize=7)
        head(figure, f"A test image of {dataset} under every corruption")
        return save(figure, out, f"corruptions_{file_stem(dataset)}", formats)
