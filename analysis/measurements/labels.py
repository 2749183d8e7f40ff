"""What a measurement is called in figures and tables, and which of them belong together."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.measurements.schema import Measurement
from models.description import PYRAMIDS, token_range

RANDOM = ("mixup", "cutmix", "randaugment_ops", "crop_padding", "flip")  # options of a recipe
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")
WINDOW_COLORS = {3: COLORS[2], 5: COLORS[1], 8: COLORS[0]}


NETWORKS = {  # as they are called in their papers, in the order of curves and panels
    "csan": "CSAN",
    "convnext": "ConvNeXt",
    "replknet": "RepLKNet",
    "van": "VAN",
    "gated": "gated",
    "resnet": "ResNet",
    "vit": "ViT",
    "pit": "PiT",
    "swin": "Swin",
}
FAMILY_COLORS = dict(
    zip(
        (
            *("CSAN", "ConvNeXt", "RepLKNet", "VAN", "gated"),
            *("ResNet", "ViT (CLS)", "ViT (GAP)", "PiT", "Swin"),
        ),
        (*COLORS, "#8c564b", "#7f7f7f", "#bcbd22"),
        strict=True,
    )
)


CHECKPOINTS, STUDIES = Path("checkpoints"), Path("studies")


def name(measurement: Measurement, *below: Path) -> str:
    """Name of the checkpoint with the folders it is in, for the names of its figures.

    ``csan8``, or ``csan8-epoch005`` for a snapshot; elsewhere ``runs-a-best``. Folders count from
    the first of `below`, ``checkpoints``, ``studies`` and the current one that it lies in.
    """
    return "-".join(_parts(measurement, *below))


def _parts(measurement: Measurement, *below: Path) -> tuple[str, ...]:
    path = measurement.path.resolve()
    for folder in (*below, CHECKPOINTS, STUDIES):
        if path.is_relative_to(folder.resolve()):
            return path.relative_to(folder.resolve()).with_suffix("").parts
    here = Path().resolve()
    if path.is_relative_to(here) and not (CHECKPOINTS / path.relative_to(here)).exists():
        return path.relative_to(here).with_suffix("").parts
    return path.with_suffix("").parts[1:]


def names(measurements: Sequence[Measurement]) -> list[str]:
    """Of the checkpoints, for tables: with as many of their folders as tell them apart."""
    whole = [_parts(m) for m in measurements]
    found = []
    for m, parts in zip(measurements, whole, strict=True):
        count = 1 + _is_snapshot(m.path)
        while count < len(parts) and any(
            o != parts and o[-count:] == parts[-count:] for o in whole
        ):
            count += 1
        found.append("-".join(parts[-count:]))
    return found


def _short(measurement: Measurement) -> str:
    """Its name where it is alone."""
    return names([measurement])[0]


def _is_snapshot(path: Path) -> bool:
    stem = path.name.partition(".")[0]
    return stem.startswith("epoch") and stem[5:].isdigit()


def home(measurement: Measurement) -> Path:
    """Folder of the trained checkpoint that a measurement belongs to."""
    path = measurement.path
    return path.parent.parent if _is_snapshot(path) else path.parent


def origin(measurements: Sequence[Measurement]) -> str:
    """For the names of their figures: the folder that they are all in, nothing for `CHECKPOINTS`.

    Models of which the training is not known are named themselves: nothing.
    """
    if not measurements or foreign(measurements[0]):
        return ""
    homes = [home(m).resolve() for m in measurements]
    return below_checkpoints(Path(os.path.commonpath(homes)))


def below_checkpoints(folder: Path) -> str:
    """A folder for names of figures: nothing for `CHECKPOINTS`, ``a-b`` for one below.

    Those of a study that has a folder of its own, in `STUDIES`, are named alike.
    """
    folder = folder.resolve()
    for above in (CHECKPOINTS, STUDIES, Path()):
        if folder.is_relative_to(above.resolve()):
            return "-".join(folder.relative_to(above.resolve()).parts)
    return "-".join(folder.parts[1:])


def foreign(measurement: Measurement) -> bool:
    """Whether the model is no CSAN but that of ``--model``, of whose training little is known."""
    return "model" in measurement.checkpoint["architecture"]


def network(measurement: Measurement) -> str:
    """Name of the network: csan, convnext and so on; of a model that is none of these, model."""
    architecture = measurement.checkpoint["architecture"]
    return "model" if foreign(measurement) else architecture.get("network", "csan")


def family(measurement: Measurement) -> str:
    """What a network is called in its paper, whatever its range; nothing if it is not known."""
    own = network(measurement)
    return "" if own == "model" else NETWORKS.get(own, own)


def kind(measurements: Iterable[Measurement]) -> str:
    """What their labels are: of a "window", a "network", or a "model"."""
    networks = {network(m) for m in measurements}
    return "window" if networks <= {"csan"} else "model" if "model" in networks else "network"


def label(measurement: Measurement) -> str:
    """What distinguishes the architecture: ``3×3``, ``8×8 (global)``, ``3×3, 3 heads``.

    Of another network of `models.networks`, its name and its range, ``ConvNeXt 5×5``, or its
    pooling, ``ViT (CLS)``. Of a model that is none of these, its name.
    """
    architecture = measurement.checkpoint["architecture"]
    if foreign(measurement):
        return architecture["model"].partition(":")[2].partition("?")[0]
    if "network" in architecture:
        own, reach = family(measurement), token_range(architecture)
        if reach is None:
            pooling = architecture.get("pooling")
            return own if pooling is None else f"{own} ({pooling.upper()})"
        whole = reach * architecture["patch_size"] > 2 * (
            architecture["image_size"] - architecture["patch_size"]
        )
        return f"{own} {reach}×{reach}" + " (global)" * whole
    window = architecture["window"]
    text = f"{window}×{window}"
    if window * architecture["patch_size"] >= architecture["image_size"]:
        text += " (global)"
    if architecture["head_window"] > 1:
        text += f", {architecture['head_window']} heads"
    text += "".join(
        f", {architecture[option]}"
        for option, usual in (("border", "clamp"), ("pooling", "gap"))
        if architecture[option] != usual
    )
    return text


def colors(labels: Iterable[str]) -> dict[str, str]:
    """The same colour for the same window everywhere; the rest from what remains of the cycle."""
    unique = list(dict.fromkeys(labels))
    fixed = {f"{w}×{w}": color for w, color in WINDOW_COLORS.items()}
    plain = {text: text.removesuffix(" (global)") for text in unique}
    assigned = {text: fixed[own] for text, own in plain.items() if own in fixed}
    free = [color for color in COLORS if color not in assigned.values()]
    rest = [text for text in unique if text not in assigned]
    return assigned | {text: free[i % len(free)] for i, text in enumerate(rest)}


def stage(measurement: Measurement) -> str:
    """At which point of its training the checkpoint was kept."""
    epoch, recipe = measurement.checkpoint["epoch"], measurement.checkpoint["recipe"]
    if foreign(measurement):
        return "given weights"
    if epoch == recipe["epochs"]:
        return f"end of training (epoch {epoch})"
    if epoch == recipe["warmup_epochs"]:
        return f"end of warm-up (epoch {epoch})"
    return f"epoch {epoch}"


def epoch(measurement: Measurement) -> str:
    """For tables: the epoch, where it is known."""
    return "–" if foreign(measurement) else str(measurement.checkpoint["epoch"])


def by_architecture(measurements: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Measurements by `label`, from local to global: the seeds of one architecture and recipe.

    Where a label would stand for several, it also names the options in which they differ.
    Checkpoints of other models than CSANs are each on its own: nobody knows that they are seeds.
    """
    alike: dict[str, list[Measurement]] = defaultdict(list)
    for m in sorted(measurements, key=lambda m: (*by_window(m)[:2], m.checkpoint["seed"])):
        weights = str(m.path) if foreign(m) else str(m.checkpoint["epoch"])
        alike[training(m, but="seed") + weights].append(m)
    by_label: dict[str, list[list[Measurement]]] = defaultdict(list)
    for members in alike.values():
        by_label[label(members[0])].append(members)
    named = {}
    for text, configurations in by_label.items():
        firsts = [members[0] for members in configurations]
        options = [
            {"checkpoint": own} if foreign(m) else _options(m)
            for m, own in zip(firsts, names(firsts), strict=True)
        ]
        keys = dict.fromkeys(key for own in options for key in own)
        differ = [key for key in keys if len({repr(own.get(key)) for own in options}) > 1]
        for members, own in zip(configurations, options, strict=True):
            named[text + "".join(f", {key} {own.get(key)}" for key in differ)] = members
    return named


def _options(m: Measurement) -> dict[str, Any]:
    """In which measurements of one label may differ."""
    return {
        **m.checkpoint["architecture"],
        **m.checkpoint["recipe"],
        "epoch": m.checkpoint["epoch"],
    }


def seeds(groups: Mapping[str, Sequence[Measurement]]) -> str:
    """How many seeds there are for each label."""
    if any(foreign(m) for members in groups.values() for m in members):
        return "one checkpoint each"
    counts = sorted({len(members) for members in groups.values()})
    plural = "s" if counts[-1] > 1 else ""
    return f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seed{plural}"


def measured_alike(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Those with the most common options: what was measured differently is not comparable.

    Whether the layers were measured, too, makes no difference to the rest.
    """
    options = [repr(sorted({**m.options, "layers": None}.items())) for m in measurements]
    common = max(options, key=options.count)
    return [m for m, own in zip(measurements, options, strict=True) if own == common]


def difference(measurement: Measurement, other: Measurement) -> str:
    """In words, which options of a measurement are others."""
    one, two = measurement.options, other.options
    keys = [key for key in {**two, **one} if key != "layers" and one.get(key) != two.get(key)]
    return ", ".join(f"{key.replace('_', '-')} {one.get(key)} not {two.get(key)}" for key in keys)


def dataset(measurement: Measurement) -> str:
    """Name of the dataset, with the number of images if it was a part of it."""
    spec, images = measurement.checkpoint["dataset"], measurement.checkpoint["images"]
    return dataset_name(spec) if images is None else f"{dataset_name(spec)}-{images}"


def dataset_name(spec: str) -> str:
    """Of a file or folder, its name and that of the folder that it is in, which tells it apart."""
    path, _, _ = spec.partition("?")  # how its images are prepared
    return "/".join(Path(path).with_suffix("").parts[-2:])


def comparable(measurement: Measurement) -> str:
    """What shares a figure: the CSANs of a dataset, another family, or the pyramids; for its title.

    Models of which the training is not known share another.
    """
    own = network(measurement)
    if own == "csan":
        return dataset(measurement)
    rest = {"model": "other models", **dict.fromkeys(PYRAMIDS, "pyramids")}
    return f"{dataset(measurement)}, {rest.get(own, family(measurement))}"


def training(measurement: Measurement, *, but: str = "") -> str:
    """What all checkpoints of one training share; all but the option `but`."""
    made_by = ("architecture", "recipe", "dataset", "images", "seed")
    return repr([measurement.checkpoint[key] for key in made_by if key != but])


def objective(measurement: Measurement) -> str:
    """In words, what was differentiated or evaluated."""
    penalty = measurement.checkpoint["recipe"].get("weight_decay") != 0
    loss = "NLL + L2" if measurement.options["objective"] == "train" and penalty else "NLL"
    return f"{loss} on {split(measurement)} images"


def split(measurement: Measurement) -> str:
    """Which images, in words."""
    how = {"train": "augmented", "clean": "clean"}[measurement.options["objective"]]
    if how == "augmented" and not any(
        measurement.checkpoint["recipe"].get(k, True) for k in RANDOM
    ):
        how = "unaugmented"
    return f"{how} {measurement.options['split']}"


def captions(measurements: Sequence[Measurement]) -> list[str]:
    """Of panels: name of the checkpoint and what distinguishes its architecture.

    With the seed, or else folders, where it takes that to tell them apart.
    """
    texts = [_caption(_short(m), m) for m in measurements]
    seeded = [
        text if texts.count(text) == 1 or foreign(m) else f"{text}, seed {m.checkpoint['seed']}"
        for text, m in zip(texts, measurements, strict=True)
    ]
    return [
        text if seeded.count(text) == 1 else _caption(name, m)
        for text, name, m in zip(seeded, names(measurements), measurements, strict=True)
    ]


def kinds(measurements: Sequence[Measurement]) -> list[str]:
    """The labels of `by_architecture`, one for each measurement."""
    groups = by_architecture(measurements)
    found = {m.path: text for text, members in groups.items() for m in members}
    return [found[m.path] for m in measurements]


def entries(measurements: Sequence[Measurement]) -> list[str]:
    """Of curves: as `captions`, but the seeds of one architecture and recipe share theirs."""
    texts = [_caption(_short(m), m) for m in measurements]
    own = kinds(measurements)
    of_text = defaultdict(set)
    for text, kind in zip(texts, own, strict=True):
        of_text[text].add(kind)
    return [
        text if len(of_text[text]) == 1 else f"{_short(m)}: {kind}"
        for text, kind, m in zip(texts, own, measurements, strict=True)
    ]


def title(measurement: Measurement, own: str) -> str:
    """Of a figure of one checkpoint with its `own` name, two lines."""
    if foreign(measurement):
        first = _caption(own, measurement)
    else:
        window = "window " if network(measurement) == "csan" else ""
        first = f"{own}: {window}{label(measurement)}, {stage(measurement)}"
    return f"{first}\n{objective(measurement)}"


def _caption(own: str, measurement: Measurement) -> str:
    what = label(measurement)
    return own if own == what else f"{own}: {what}"


def suffix(measurement: Measurement) -> str:
    """Of file names: nothing for the usual objective, else which one it is."""
    which = measurement.name.partition("/")[2]
    return "" if which == "train" else f"_{which}"


def by_window(measurement: Measurement) -> tuple[float, int, str]:
    """Order of curves and panels: CSANs, other networks, each from local to global, then models."""
    architecture = measurement.checkpoint["architecture"]
    if foreign(measurement):
        return math.inf, 0, str(measurement.path)
    if "network" in architecture:
        own = network(measurement)
        order = list(NETWORKS).index(own) if own in NETWORKS else len(NETWORKS)
        return 2.0**32 * order + (token_range(architecture) or 0), 1, str(measurement.path)
    return architecture["window"], architecture["head_window"], str(measurement.path)
