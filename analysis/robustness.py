"""``python -m analysis.robustness``: NLL and error of checkpoints under common corruptions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from analysis.options import CheckpointOptions
from models.cli import Seed, run

if TYPE_CHECKING:
    import numpy as np
    import torch

    from analysis.measurements.schema import Measurement
    from lossgeometry.running.distributed import Team
    from models.checkpoint import Checkpoint
    from models.data.datasets import ImageDataset

KINDS = {
    "noise": slice(0, 3),
    "blur": slice(3, 7),
    "weather": slice(7, 11),
    "digital": slice(11, 15),
}


@dataclass(frozen=True)
class Options(CheckpointOptions):
    """Measure NLL and error of checkpoints on corrupted test images.

    Fifteen corruptions at five severities (Hendrycks and Dietterich 2019). For CIFAR the official
    arrays are used if they are in CIFAR-10-C/ or CIFAR-100-C/ of the data folder; otherwise the
    corruptions are generated. An interrupted run goes on with the corruption where it stopped.
    """

    images: Annotated[
        int | None, arg(help="the first so many test images; default: all of them")
    ] = None
    contact_sheet: Annotated[
        bool, arg(help="also draw the first test image under every corruption")
    ] = False
    seed: Seed = 0


def main(options: Options) -> None:
    """Measure the checkpoints, print a table, draw, and name the files."""
    from analysis.drawing.robustness import draw_contact_sheet, draw_robustness
    from analysis.measurements import labels
    from analysis.tables import print_table
    from lossgeometry.running.devices import choose_device
    from lossgeometry.running.distributed import join
    from lossgeometry.seeds import derive_seed

    derive_seed(options.seed)  # is it usable?
    checkpoints = options.open()
    device = choose_device(options.device)
    team = join(device.type)
    measurements = measure(checkpoints, options, device, team)
    if team.rank:
        return
    rows = []
    for name, m in zip(labels.names(measurements), measurements, strict=True):
        error = 100 * m.arrays["error"]
        rows.append(
            [
                name,
                labels.label(m),
                f"{100 * m.arrays['clean_error']:.2f}",
                f"{100 * m.arrays['mean_corruption_error']:.2f}",
                *(f"{error[part].mean():.2f}" for part in KINDS.values()),
            ]
        )
    print_table(
        "Error (%) on test images, clean and under corruptions",
        ["checkpoint", labels.kind(measurements), "clean", "mean of corruptions", *KINDS],
        rows,
    )
    for m in measurements:
        print(f"stored in {m.path}:/{m.name} ({m.options['source']} corruptions)")
    written = draw_robustness(measurements, options.out, origin=labels.origin(measurements))
    if options.contact_sheet:
        for spec in dict.fromkeys(c.dataset for c in checkpoints):
            image, name = test_set(spec, options).images[0].numpy(), labels.dataset_name(spec)
            written += draw_contact_sheet(image, name, options.out, seed=options.seed)
    for path in written:
        print(f"wrote {path}")


def test_set(dataset: str, options: Options) -> ImageDataset:
    """The test images that `options` ask for."""
    from models.data.datasets import load_dataset

    images = load_dataset(dataset, "test", data_root=options.data_root)
    return images if options.images is None else images.first(options.images)


def measure(
    checkpoints: Sequence[Checkpoint], options: Options, device: torch.device, team: Team
) -> list[Measurement]:
    """Robustness of each checkpoint, stored, or as it was stored before.

    Every corruption is generated once for all checkpoints of a dataset, by one of the `team`.
    """
    by_dataset: dict[str, list[Checkpoint]] = defaultdict(list)
    for checkpoint in checkpoints:
        by_dataset[checkpoint.dataset].append(checkpoint)
    found: dict[Path | None, Measurement] = {}
    for dataset, members in by_dataset.items():
        measured = _measure(members, test_set(dataset, options), options, device, team)
        found.update(zip((c.path for c in members), measured, strict=True))
    return [found[checkpoint.path] for checkpoint in checkpoints]


def _measure(
    checkpoints: Sequence[Checkpoint],
    dataset: ImageDataset,
    options: Options,
    device: torch.device,
    team: Team,
) -> list[Measurement]:
    """Of checkpoints of one `dataset`."""
    import numpy as np
    from tqdm import tqdm

    from analysis.measurements.files import store, stored
    from analysis.outcomes import outcomes
    from models.data.corruptions import CORRUPTIONS, SEVERITIES, corrupted_dataset, official_arrays

    official = official_arrays(dataset, options.data_root)
    settings = {
        "images": len(dataset),
        "seed": options.seed,
        "source": "official" if official else "generated",
    }
    data = {"test": dataset.fingerprint}
    done: dict[Path | None, Measurement] = {}
    begun: dict[Path | None, dict[str, Any]] = {}
    for checkpoint in checkpoints:
        look = partial(stored, checkpoint=checkpoint, options=settings, data=lambda: data)
        found = None if options.force else team.first(partial(look, "robustness"))
        if found:
            print(f"{found.path}:/robustness is there already; --force measures it again")
            done[checkpoint.path] = found
            continue
        earlier = None if options.force else team.first(partial(look, "unfinished/robustness"))
        if earlier:
            print(f"{earlier.path}:/robustness was interrupted; going on from there")
        begun[checkpoint.path] = dict(earlier.arrays) if earlier else _blank(len(dataset))
    pending = [c for c in checkpoints if c.path in begun]
    for checkpoint in pending:
        nll, correct = outcomes(checkpoint, dataset, device, team)
        begun[checkpoint.path]["clean_nll"] = nll.mean(dtype=float)
        begun[checkpoint.path]["clean_error"] = 1 - correct.mean()
    lacking = [[c for c in pending if not begun[c.path]["done"][k]] for k in range(15)]
    todo = [k for k, lack in enumerate(lacking) if lack]

    def corrupted(i: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """NLL (5,), error (5,) and how often each image is wrong, of each who lacks them."""
        k = todo[i]
        scores = [(np.empty(5), np.empty(5), np.zeros(len(dataset), np.uint8)) for _ in lacking[k]]
        for s in range(SEVERITIES):
            images = corrupted_dataset(
                dataset, CORRUPTIONS[k], s + 1, official=official, seed=options.seed
            )
            for checkpoint, (nll, error, wrong) in zip(lacking[k], scores, strict=True):
                nlls, correct = outcomes(checkpoint, images, device)
                nll[s], error[s] = nlls.mean(dtype=float), 1 - correct.mean()
                wrong += ~correct
        return scores

    there = 15 * len(pending) - sum(map(len, lacking))
    bar = tqdm(
        total=15 * len(pending),
        initial=there,
        desc="robustness",
        unit="corruption",
        disable=None,
    )
    for i, scores in team.share(len(todo), corrupted):
        k = todo[i]
        for checkpoint, (nll, error, wrong) in zip(lacking[k], scores, strict=True):
            arrays = begun[checkpoint.path]
            arrays["nll"][k], arrays["error"][k], arrays["wrong"][:, k] = nll, error, wrong
            arrays["done"][k] = True
            if team.rank == 0:
                store(
                    "unfinished/robustness",
                    arrays,
                    checkpoint=checkpoint,
                    options=settings,
                    data=data,
                )
            bar.update()
    bar.close()
    for checkpoint in pending:
        arrays = {key: a for key, a in begun[checkpoint.path].items() if key != "done"}
        arrays["corruptions"] = np.array(CORRUPTIONS, dtype=bytes)
        arrays["mean_corruption_error"] = arrays["error"].mean()
        arrays["image_error"] = np.float32(arrays["wrong"].sum(1) / arrays["error"].size)
        done[checkpoint.path] = team.first(
            partial(
                store,
                "robustness",
                arrays,
                checkpoint=checkpoint,
                options=settings,
                data=data,
                in_place_of="unfinished/robustness",
            )
        )
    return [done[checkpoint.path] for checkpoint in checkpoints]


def _blank(images: int) -> dict[str, np.ndarray]:
    """Arrays to fill: mean NLL and error (15, 5), and how often each image was wrong of 5."""
    import numpy as np

    return {
        "nll": np.full((15, 5), np.nan),
        "error": np.full((15, 5), np.nan),
        "wrong": np.zeros((images, 15), dtype=np.uint8),
        "done": np.zeros(15, dtype=bool),
    }


if __name__ == "__main__":
    run(main, Options)
