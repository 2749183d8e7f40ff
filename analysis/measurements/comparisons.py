"""Which trainings are compared: those that differ only in what mixes the tokens, and the seed.

Models that are no CSANs are compared with one another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from analysis.measurements import labels
from analysis.measurements.files import collect
from analysis.measurements.schema import Measurement
from lossgeometry.errors import InputError
from models.description import token_range

COMPARED = ("window", "head_window", "model")
# Of convolutional networks; what a large kernel takes is given up by the perceptrons.
COMPARED_KERNELS = ("kernel_size", "dilation", "mlp_ratio")


def with_siblings(
    measurements: Sequence[Measurement], left_out: list[InputError] | None = None
) -> list[Measurement]:
    """These and all others of their kind and datasets in the folders that they are in, and below.

    A figure that has the name of a folder shows what is in it. Models that are no CSANs are on
    their own, as the names of their figures are.
    """
    if labels.foreign(measurements[0]):
        return list(measurements)
    folders = {labels.home(m) for m in measurements}
    data = {labels.comparable(m) for m in measurements}
    found = collect(folders, measurements[0].name, left_out)
    return [m for m in found if labels.comparable(m) in data]


def studies(measurements: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Measurements by study: one dataset, recipe, and architecture up to window and head window.

    A study is named for its dataset; where there are several of a dataset, also for as many of the
    options in which they differ as it takes to tell them apart.
    """
    alike: dict[str, list[Measurement]] = defaultdict(list)
    for m in measurements:
        alike[repr((labels.comparable(m), sorted(_options(m).items())))].append(m)
    of_dataset: dict[str, list[list[Measurement]]] = defaultdict(list)
    for members in alike.values():
        of_dataset[labels.comparable(members[0])].append(members)
    named = {}
    for dataset, groups in sorted(of_dataset.items()):
        options = [_options(members[0]) for members in groups]
        telling = _telling_apart(options)
        for members, own in zip(groups, options, strict=True):
            named[dataset + "".join(f", {key} {own.get(key)}" for key in telling)] = members
    return named


def _telling_apart(options: list[dict[str, Any]]) -> list[str]:
    """A few keys whose values are different for all of `options`, found greedily."""
    keys = list(dict.fromkeys(key for own in options for key in own))
    chosen: list[str] = []

    def told_apart(by: list[str]) -> int:
        return len({repr([own.get(key) for key in by]) for own in options})

    while told_apart(chosen) < told_apart(keys):
        chosen.append(max(keys, key=lambda key: told_apart([*chosen, key])))
    return chosen


def _options(m: Measurement) -> dict[str, Any]:
    options = m.checkpoint["architecture"] | m.checkpoint["recipe"]
    compared = (*COMPARED, *(COMPARED_KERNELS if "network" in options else ()))
    options |= {"network": labels.network(m)}
    return {key: value for key, value in options.items() if key not in compared}


def file_stem(study: str) -> str:
    """Name of a study for use in a file name."""
    return study.replace(", ", "_").replace(" ", "-").replace("/", "-").strip("-")


def variant(m: Measurement) -> tuple[int, int]:
    """Window and head window; of other networks than CSANs, the range and 1."""
    architecture = m.checkpoint["architecture"]
    if "network" in architecture:
        return token_range(architecture), 1
    return architecture["window"], architecture["head_window"]
