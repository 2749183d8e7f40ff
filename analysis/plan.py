"""Studies as they are declared: a TOML file becomes trainings and measurements.

    folder = "checkpoints/small"      # whose measurements the figures are of
    figures = "figures/small"
    threads = 1                       # for each process; default: the cores, shared equally

    [train]                           # options of models.train, for every training
    dataset = "cifar100"

    [[grid]]                          # more of them; a list makes one training of each value
    window = [3, 5, 8]
    seed = [0, 1]
    snapshots = [5, 10]               # the one option that is a list itself
    out = "checkpoints/small/seed{seed}/csan{window}.pt"
    measure = ["nll"]                 # default: all measurements below

    [[measure]]                       # a command of the package analysis, and its options
    command = "nll"

Trainings are made in the order of the file; of several lists in a grid, the last varies fastest.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from analysis.measurements.files import fits, load, measurement_file, same_data
from analysis.measurements.recording import describe
from lossgeometry.errors import InputError, shown
from models.checkpoint import Checkpoint, load_checkpoint
from models.cli import parse
from models.data.arrays import fingerprints
from models.data.datasets import ImageDataset, load_dataset
from models.meta import without_weights
from models.resuming import epochs_done, same_training, state_files
from models.stack import FREE
from models.train import Options, choose_preset, square, untrained

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path("studies")
MOST = 1000  # trainings of one grid
COMMANDS = {
    "nll": "analysis.nll",
    "hessian": "analysis.hessian",
    "landscape": "analysis.landscape",
    "robustness": "analysis.robustness",
}
NOT_WORTH_A_TRAINING = ("objective",)  # of what can be measured only while the weights are there
_KNOWN = {  # training images, pixels along a side, channels, classes
    "digits": (1437, 8, 1, 10),
    "cifar10": (50_000, 32, 3, 10),
    "cifar100": (50_000, 32, 3, 100),
}


@dataclass(frozen=True)
class Measure:
    """A measurement that is to be made of trainings."""

    command: str
    arguments: tuple[str, ...]
    options: Any  # of the command, parsed

    def groups(self) -> tuple[str, ...]:
        """Where in the HDF5 file the result belongs."""
        if self.command == "nll":
            return ("history", "outcomes", "objective")
        if self.command == "robustness":
            return ("robustness",)
        directions = getattr(self.options, "directions", "random")
        suffix = "" if directions == "random" else f"_{directions}"
        return (self.options.group(self.command + suffix),)

    def checkpoints(self, training: Training) -> list[Path]:
        """Of which checkpoints of a training: the last, and for spectra the end of warm-up."""
        last = training.options.out
        if self.command != "hessian":
            return [last]
        warmup = training.start.recipe.warmup_epochs
        return [last.with_suffix("") / f"epoch{warmup:03d}.pt", last]

    def missing(self, training: Training) -> list[Path]:
        """The checkpoints of which it has not been made yet, as it is asked for.

        Where the weights are gone, a measurement of such a training counts, and the lack of what is
        `NOT_WORTH_A_TRAINING` does not; where they are there, only that of these very weights.
        """
        return [p for p in self.checkpoints(training) if not self._held(p, training)]

    def replaces(self, path: Path) -> bool:
        """Whether a measurement with other options is there, which is to be made anew."""
        file, groups = measurement_file(path), self.groups() if self.command != "nll" else ()
        begun = any(load(file, f"unfinished/{group}") for group in groups)
        return not begun and any(load(file, group) for group in groups)

    def _held(self, path: Path, training: Training) -> bool:
        for group in self.groups():
            found = load(measurement_file(path), group)
            if found is None and group in NOT_WORTH_A_TRAINING and not path.exists():
                continue
            if found is None or not training.made(found.checkpoint):
                return False
            if path.exists() and found.checkpoint["sha256"] != _sha256(path):
                return False
            if not same_data(found, partial(self._data, training)):
                return False
            own = {k: v for k, v in vars(self.options).items() if k in found.options}
            given = {k: v for k, v in own.items() if v is not None}
            asked = json.loads(json.dumps({**found.options, **given}, default=str))
            if not fits(found.options, asked, getattr(self.options, "at_least", ())):
                return False
        return True

    def _data(self, training: Training) -> dict[str, str]:
        return fingerprints(
            training.start.dataset,
            {"train": training.options.images, "test": getattr(self.options, "images", None)},
            data_root=training.options.data_root,
        )


@dataclass(frozen=True)
class Training:
    """One training of a study."""

    arguments: tuple[str, ...]
    options: Options
    measures: tuple[Measure, ...]
    grid: int  # which of the study's it is of

    @cached_property
    def start(self) -> Checkpoint:
        """The untrained network, without memory; a dataset that is known is not needed."""
        with without_weights():
            return untrained(self.options, blank_dataset(self.options))

    def made(self, description: Mapping[str, Any]) -> bool:
        """Whether this is the training that a measurement remembers (`measurements.describe`)."""
        own = json.loads(json.dumps(describe(self.start)))
        same = ("architecture", "recipe", "dataset", "images", "seed")
        return all(own[key] == description.get(key) for key in same)

    def state(self) -> str:
        """How far it is: done (all is measured), trained, begun or to do.

        Raises `InputError` if its checkpoint is there, and is that of another training.
        """
        path = self.options.out
        if path.exists() and not same_training(load_checkpoint(path), self.start):
            raise InputError(
                f"{path}: trained with other options than the study asks for; expected another "
                "name in the study, or no such file"
            )
        if self.measures and not any(m.missing(self) for m in self.measures):
            return "done"
        if path.exists():
            return "trained"
        return "begun" if any(p.exists() for p in state_files(path)) else "to do"

    def epochs_done(self) -> int:
        """After how many epochs it would go on."""
        return epochs_done(self.options.out, self.start)


@dataclass(frozen=True)
class Plan:
    """A study as it was declared."""

    path: Path
    folder: Path
    figures: Path
    threads: int | None
    trainings: tuple[Training, ...]
    measures: tuple[Measure, ...]


def stacks(trainings: Iterable[Training]) -> list[list[Training]]:
    """Trainings that can be made as one program: of one grid, and of one shape and recipe."""
    found: dict[str, list[Training]] = {}
    for training in trainings:
        own = {k: v for k, v in vars(training.options).items() if k not in (*FREE, "seed", "out")}
        found.setdefault(repr((training.grid, own)), []).append(training)
    return list(found.values())


def load_plan(name: str, common: Mapping[str, Any] | None = None) -> Plan:
    """Read a study: the name of one in ``studies/``, or a TOML file.

    `common` are further options of every command, as ``data_root``.

    Raises
    ------
    InputError
        If there is no such study, or it cannot be understood; names the file and the place in it.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.toml"))) or "none here"
        raise InputError(f"{path}: no such study, expected a TOML file or one of studies/: {known}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from error
    kinds = {"folder": str, "figures": str, "threads": int, "train": dict}
    for key, value in content.items():
        if key not in (*kinds, "grid", "measure"):
            known = ", ".join(kinds)
            raise InputError(f"{path}: {shown(key)} found, expected {known}, grid, measure")
        if key in kinds and type(value) is not kinds[key]:
            raise InputError(
                f"{path}: {key} = {shown(value)} found, expected {kinds[key].__name__}"
            )
        if isinstance(value, str) and not value.isprintable():
            raise InputError(f"{path}: {key} = {shown(value)} found, expected the name of a folder")
    tables = {key: content.get(key, []) for key in ("grid", "measure")}
    for key, value in tables.items():
        if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
            raise InputError(f"{path}: {key} = {shown(value)} found, expected [[{key}]] tables")
    if not tables["grid"]:
        raise InputError(f"{path}: no [[grid]] found, expected at least one")
    if not 1 <= content.get("threads", 1) <= 1024:
        raise InputError(f"{path}: threads = {shown(content['threads'])} found, expected 1 to 1024")
    measures = tuple(
        _measure(table, f"{path}: [[measure]] {i + 1}", common or {})
        for i, table in enumerate(tables["measure"])
    )
    trainings: dict[Path, Training] = {}
    for i, table in enumerate(tables["grid"]):
        place = f"{path}: [[grid]] {i + 1}"
        settings = {**content.get("train", {}), **table}
        for training in _trainings(settings, i, measures, place, common or {}):
            if training.options.out in trainings:
                raise InputError(f"{place}: two trainings write {training.options.out}")
            trainings[training.options.out] = training
    folder = Path(content.get("folder", "checkpoints"))
    figures = Path(content.get("figures", "figures"))
    everything = tuple(trainings.values())
    return Plan(path, folder, figures, content.get("threads"), everything, measures)


def _measure(table: Mapping[str, Any], place: str, common: Mapping[str, Any]) -> Measure:
    command = table.get("command")
    if not isinstance(command, str) or command not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise InputError(f"{place}: command = {shown(command)}, expected one of {known}")
    own = {key: value for key, value in table.items() if key != "command"}
    arguments = _arguments({**own, **common}, place)
    options = _parse(importlib.import_module(COMMANDS[command]).Options, arguments, place)
    return Measure(command, arguments, options)


def _trainings(
    settings: dict[str, Any],
    grid: int,
    measures: tuple[Measure, ...],
    place: str,
    common: Mapping[str, Any],
) -> list[Training]:
    asked = settings.pop("measure", None)
    names = [m.command for m in measures]
    if asked is not None and not isinstance(asked, list):
        raise InputError(f"{place}: measure = {shown(asked)} found, expected a list")
    for name in asked or ():
        if name not in names:
            raise InputError(f"{place}: measure names {shown(name)}, expected some of {names}")
    own = measures if asked is None else tuple(m for m in measures if m.command in asked)
    if not isinstance(settings.get("out"), str):
        raise InputError(f"{place}: out = {shown(settings.get('out'))} found, expected a file name")
    axes = {k: v for k, v in settings.items() if isinstance(v, list) and k != "snapshots"}
    count = math.prod(map(len, axes.values()))
    if not 1 <= count <= MOST:
        raise InputError(f"{place}: {shown(count)} trainings found, expected 1 to {MOST}")
    trainings = []
    for values in product(*axes.values()):
        chosen = {**settings, **dict(zip(axes, values, strict=True))}
        parts = re.split(r"{(\w+)}", settings["out"])  # every other one is a name
        if not set(parts[1::2]) <= chosen.keys() or re.search("[{}]", "".join(parts[::2])):
            raise InputError(
                f"{place}: out = {shown(settings['out'])} found, expected {{NAME}} only of options"
            )
        chosen["out"] = "".join(str(chosen[p]) if i % 2 else p for i, p in enumerate(parts))
        arguments = _arguments({**chosen, **common}, place)
        options = _parse(Options, arguments, place)
        training = Training(arguments, options, own, grid)
        try:
            assert training.start  # the options fit each other
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        trainings.append(training)
    return trainings


def _parse(options_type: type[Any], arguments: tuple[str, ...], place: str) -> Any:
    try:
        return parse(options_type, arguments)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _arguments(options: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """Options as they are given on a command line."""
    words: list[str] = []
    for key, value in options.items():
        values = value if isinstance(value, list) else [value]
        plain = all(isinstance(v, bool | int | float | str) for v in values)
        # A text that looks like an option would be taken for one.
        if any(isinstance(v, str) and (v.startswith("-") or not v.isprintable()) for v in values):
            plain = False
        if not plain or not re.fullmatch("[a-z][a-z0-9_-]*", key) or key == "help":
            raise InputError(f"{place}: {shown(key)} = {shown(value)} found, expected an option")
        if value is False:
            continue
        values = [] if value is True else values
        words += [f"--{key.replace('_', '-')}", *map(str, values)]
    return tuple(words)


def dataset_form(dataset: str) -> tuple[int, int, int, int]:
    """Training images, pixels along a side, channels and classes of a dataset."""
    if dataset in _KNOWN:
        return _KNOWN[dataset]
    found = load_dataset(dataset)
    return len(found), square(found), found.images.shape[3], len(found.classes)


def blank_dataset(options: Options) -> ImageDataset:
    """No images, of the form of those that `options` name."""
    _, name = choose_preset(options)
    _, size, channels, classes = dataset_form(name)
    return ImageDataset(
        name,
        torch.zeros(0, size, size, channels, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.int64),
        tuple(str(i) for i in range(classes)),
        torch.zeros(channels),
        torch.ones(channels),
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
