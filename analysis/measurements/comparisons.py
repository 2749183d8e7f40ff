"""Which trainings are compared.

In a study, those that differ only in how far the mixer of their tokens sees, and the seed; or the
networks of `models.pyramids`. Among families, networks of several mixers that were trained by one
recipe, in one folder. Models of which the training is not known are compared with one another.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from analysis.measurements import labels
from analysis.measurements.files import collect
from analysis.measurements.schema import Measurement
from lossgeometry.errors import InputError
from models.description import PYRAMIDS, token_range

COMPARED = ("window", "head_window", "kernel_size", "dilation", "model")


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
    """Measurements by study: one dataset, recipe, and architecture up to what is `COMPARED`.

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
    network, recipe = labels.network(m), m.checkpoint["recipe"]
    if network in PYRAMIDS:
        return {**recipe, "network": "pyramids"}
    options = {**m.checkpoint["architecture"], **recipe, "network": network}
    return {key: value for key, value in options.items() if key not in COMPARED}


def families(measurements: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Measurements of several networks by dataset, recipe and folder, whatever their sizes.

    The folder is that of the checkpoints, or the one that ``seed0``, ``seed1`` and so on are in: in
    it a network is of one size for every range, and it is the most common one that counts.
    """
    together: dict[str, list[Measurement]] = defaultdict(list)
    for m in measurements:
        recipe = sorted(m.checkpoint["recipe"].items())
        together[repr((labels.dataset(m), recipe, _folder(m).resolve()))].append(m)
    named = {}
    for members in together.values():
        of_network: dict[str, list[Measurement]] = defaultdict(list)
        for m in members:
            of_network[labels.network(m)].append(m)
        if len(of_network) > 1:
            kept = [m for own in of_network.values() for m in _of_one_size(own)]
            folder = labels.below_checkpoints(_folder(members[0])) or "families"
            named[f"{labels.dataset(members[0])}, {folder}"] = kept
    return named


def _folder(m: Measurement) -> Path:
    home = labels.home(m)
    return home.parent if re.fullmatch(r"seed\d+", home.name) else home


def _of_one_size(members: list[Measurement]) -> list[Measurement]:
    """Of one network, those that differ in what tells its variants apart alone."""
    apart = COMPARED if labels.network(members[0]) not in PYRAMIDS else ("pooling",)
    sizes = [
        repr([v for k, v in sorted(m.checkpoint["architecture"].items()) if k not in apart])
        for m in members
    ]
    ((common, _),) = Counter(sizes).most_common(1)
    return [m for m, own in zip(members, sizes, strict=True) if own == common]


def file_stem(study: str) -> str:
    """Name of a study for use in a file name."""
    return study.replace(", ", "_").replace(" ", "-").replace("/", "-").strip("-")


def variant(m: Measurement) -> tuple[int, int]:
    """Window and head window; of networks of kernels the range and 1, of others zeros."""
    architecture = m.checkpoint["architecture"]
    if "window" in architecture:
        return architecture["window"], architecture["head_window"]
    reach = token_range(architecture)
    return (0, 0) if reach is None else (reach, 1)


def in_study(m: Measurement) -> str:
    """What it is called in the claims of a study of CSANs: its window, and heads if several."""
    window, heads = variant(m)
    return f"{window}, {heads} heads" if heads > 1 else str(window)


def in_families(m: Measurement) -> str:
    """What it is called in the claims of several families: ``ConvNeXt 5×5``, ``CSAN global``."""
    architecture = m.checkpoint["architecture"]
    reach = token_range(architecture)
    if reach is None:
        return labels.label(m)
    grid = architecture["image_size"] // architecture["patch_size"]
    text = f"{labels.family(m)} " + ("global" if reach == 2 * grid - 1 else f"{reach}×{reach}")
    _, heads = variant(m)
    return f"{text}, {heads} heads" if heads > 1 else text
