"""What is fed with hostile input: how to make an input of each kind, and what reads it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import h5py
import torch

from lossgeometry.errors import InputError
from tests.fuzz import bases
from tests.fuzz.mutations import (
    FLOATS,
    INTEGERS,
    TEXTS,
    anything,
    archive,
    edit_hdf5,
    entries_of,
    mutate_archive,
    mutate_bytes,
    operations,
)

COMMANDS = ("hessian", "nll", "landscape", "robustness", "claims", "figures", "published")
MODULES = (*(f"analysis.{name}" for name in COMMANDS), "analysis.study", "models.train")


@dataclass(frozen=True)
class Target:
    """One kind of input."""

    name: str
    weight: int  # inputs of every thousand
    make: Callable[[random.Random], bytes]
    read: Callable[[bytes], object]


def _file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Write the input to a file of the current folder, and have it read."""

    def write_and_read(content: bytes) -> object:
        path = Path(name)
        path.write_bytes(content)
        return read(path)

    return write_and_read


def _checkpoints() -> Target:
    from models.checkpoint import load_checkpoint

    content = bases.checkpoint_content()
    entries = entries_of(bases.saved(content))
    pickled = next(c for n, c in entries if n.endswith("data.pkl"))
    ops = operations(pickled)

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.9:
            return mutate_archive(rng, entries, ops)
        return bases.saved(_absurd(rng, content))

    return Target("checkpoint", 130, make, _file("in.pt", load_checkpoint))


def _absurd(rng: random.Random, content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with other values, tensors and columns."""
    changed = {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(list(changed))
        part = changed[key]
        if key == "state_dict" and isinstance(part, dict) and part:
            name = rng.choice(list(part))
            shape = rng.choice(
                ((), (2,), (0,), (2, 2), (1, 4, 2), getattr(part[name], "shape", ()))
            )
            dtype = rng.choice((torch.float32, torch.int8, torch.complex64, torch.bool))
            part[name] = rng.choice(
                (torch.ones(shape, dtype=dtype), torch.zeros(1).expand(10**9), anything(rng))
            )
        elif isinstance(part, dict) and part and rng.random() < 0.8:
            part[rng.choice((*part, *part, "new"))] = anything(rng)
        else:
            changed[key] = anything(rng)
    return changed


def _foreign() -> Target:
    from models.foreign import read_tensors

    bases_of = []
    for content in bases.foreign_contents():
        entries = entries_of(bases.saved(content))
        pickled = next(c for n, c in entries if n.endswith("data.pkl"))
        bases_of.append((entries, operations(pickled)))

    def make(rng: random.Random) -> bytes:
        return mutate_archive(rng, *rng.choice(bases_of))

    return Target("foreign", 120, make, _file("in.pt", read_tensors))


def _trainings() -> Target:
    from models.checkpoint import Checkpoint
    from models.csan import CSAN
    from models.recipes import Recipe
    from models.resuming import read_state

    start = Checkpoint(
        bases.ARCHITECTURE,
        "digits",
        None,
        Recipe(**bases.RECIPE),
        0,
        0,
        {},
        model=CSAN(**bases.ARCHITECTURE),
    )
    content = bases.resume_content(start)
    entries = entries_of(bases.saved(content))
    ops = operations(next(c for n, c in entries if n.endswith("data.pkl")))

    def read(path: Path) -> object:
        return read_state(path, start, [])

    return Target(
        "resume",
        50,
        lambda rng: mutate_archive(rng, entries, ops),
        _file("resume.pt", read),
    )


def _hdf5(name: str, weight: int, images: list[bytes], read: Callable[[Path], object]) -> Target:
    def make(rng: random.Random) -> bytes:
        image = rng.choice(images)
        if rng.random() < 0.75:
            return mutate_bytes(rng, image)
        with h5py.File.in_memory(image) as file:
            for _ in range(rng.choice((1, 1, 2, 4))):
                with contextlib.suppress(Exception):  # not every edit fits what came before
                    edit_hdf5(rng, file)
            file.flush()
            return file.id.get_file_image()

    return Target(name, weight, make, _file("in.h5", read))


def _measurements() -> Target:
    from analysis.measurements.files import load
    from analysis.verdicts import judge

    groups = list(bases.OPTIONS)

    def read(path: Path) -> object:
        if zlib.crc32(path.read_bytes()) % 64 == 0:
            return judge([path])
        return [load(path, group) for group in groups]

    # One group each: small files, so that most changes matter.
    versions = ("earliest", "latest")
    images = [bases.measurement_file(v, [group]) for v in versions for group in groups]
    return _hdf5("measurement", 200, images, read)


def _datasets() -> Target:
    from models.data.datasets import load_dataset

    images = [bases.dataset_file("earliest"), bases.dataset_file("latest")]
    return _hdf5("dataset", 120, images, lambda path: load_dataset(path, "test"))


def _word(rng: random.Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return str(rng.choice(INTEGERS))
    if kind == 1:
        return repr(rng.choice(FLOATS))
    if kind == 2:
        return rng.choice(
            ("train", "test", "cpu", "pca", "filter", "10" * 3000, "1_0", "0x10", " 1 ")
        )
    return rng.choice(TEXTS)


def _commands() -> Target:
    modules = {name: importlib.import_module(name) for name in MODULES}
    options = {
        name: ["--" + field.name.replace("_", "-") for field in fields(module.Options)]
        for name, module in modules.items()
    }

    def make(rng: random.Random) -> bytes:
        name = rng.choice(MODULES)
        words = ["--out", "new.pt"] if name == "models.train" else []
        for _ in range(rng.choice((1, 1, 2, 3))):
            words += [
                rng.choice(options[name]),
                *(_word(rng) for _ in range(rng.choice((0, 1, 1, 2)))),
            ]
        if name in ("analysis.study", "analysis.published"):
            words.append(_word(rng))
        # No system hands over half a surrogate pair.
        words = [word.encode(errors="replace").decode() for word in words]
        return json.dumps([name, words]).encode()

    def read(content: bytes) -> object:
        from models.cli import parse

        name, words = json.loads(content)
        os.mkdir("in.nothing")
        os.chdir("in.nothing")  # else "" would be a folder with measurements
        try:
            return modules[name].main(parse(modules[name].Options, words))
        finally:
            os.chdir("..")
            shutil.move("in.nothing", "out") if os.listdir("in.nothing") else os.rmdir("in.nothing")

    return Target("options", 120, make, read)


def _studies() -> Target:
    from analysis.plan import load_plan

    tokens = re.findall(r"\w+|\W", bases.STUDY)

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return mutate_bytes(rng, bases.STUDY.encode())
        words = list(tokens)
        for _ in range(rng.choice((1, 1, 2))):
            i = rng.randrange(len(words))
            word = rng.choice((json.dumps(_word(rng)), _word(rng), "[" * 3000, rng.choice(tokens)))
            words[i : i + rng.randrange(2)] = [word]
        return "".join(words).encode(errors="surrogatepass")

    return Target("study", 60, make, _file("in.toml", lambda path: load_plan(str(path))))


def _tables() -> Target:
    from analysis.drawing.published import read_surface

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutate_bytes(rng, bases.TABLE.encode())
        cells = re.split("([,\n])", bases.TABLE)
        for _ in range(rng.choice((1, 2, 9))):
            cells[rng.randrange(len(cells))] = rng.choice((_word(rng), ",", "\n", "1" * 5000))
        return "".join(cells).encode(errors="surrogatepass")

    return Target("table", 200, make, _file("in.csv", read_surface))


def all_targets() -> list[Target]:
    """Every kind of input."""
    return [
        _checkpoints(),
        _foreign(),
        _trainings(),
        _measurements(),
        _datasets(),
        _commands(),
        _studies(),
        _tables(),
    ]


def shorten() -> None:
    """Leave out what is slow and not to be tested: imports, parsers built anew, trainings."""
    for module in ("claims", "hessians", "interactive", "landscapes", "nll", "robustness"):
        importlib.import_module(f"analysis.drawing.{module}")
    importlib.import_module("analysis.objective")
    import tyro

    import models.data.arrays
    import models.train
    import models.training

    parsers = tyro._parsers.ParserSpecification
    build, built = parsers.from_callable_or_type, {}

    def cached(what: Any, *args: Any, **kwargs: Any) -> Any:
        if what not in built:
            built[what] = build(what, *args, **kwargs)
        return built[what]

    parsers.from_callable_or_type = staticmethod(cached)

    def refuse(*_: object, **__: object) -> None:
        raise InputError("usable")

    models.data.arrays._download = refuse
    models.training.train_together = refuse
    models.train.alone = contextlib.nullcontext
    importlib.import_module("analysis.cost").print_plan = refuse
    importlib.import_module("analysis.execution").run_all = refuse
    importlib.import_module("analysis.execution").report = refuse


__all__ = ["Target", "all_targets", "archive", "shorten"]
