"""``python -m analysis.robustness``: NLL and error of checkpoints under common corruptions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from analysis.options import CheckpointOptions
from models.cli import Seed, run

if TYPE_CHECKING:
    from analysis.measurements.schema import Measurement

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
    from analysis.corrupted import robustness
    from analysis.drawing.robustness import draw_contact_sheet, draw_robustness
    from analysis.measurements import labels
    from analysis.tables import print_table
    from lossgeometry.running.devices import choose_device
    from lossgeometry.running.distributed import join
    from lossgeometry.seeds import derive_seed
    from models.data.datasets import load_dataset

    derive_seed(options.seed)  # is it usable?
    checkpoints = options.open()
    device = choose_device(options.device)
    team = join(device.type)
    tests = {
        name: load_dataset(name, "test", data_root=options.data_root).first(options.images)
        for name in dict.fromkeys(checkpoint.dataset for checkpoint in checkpoints)
    }
    how: dict[str, Any] = dict(data_root=options.data_root, seed=options.seed, device=device)
    how |= dict(force=options.force, team=team)
    measured: dict[Path | None, Measurement] = {}
    for name, images in tests.items():
        members = [checkpoint for checkpoint in checkpoints if checkpoint.dataset == name]
        found = robustness(members, images, **how)
        measured |= dict(zip((c.path for c in members), found, strict=True))
    if team.rank:
        return
    measurements = [measured[checkpoint.path] for checkpoint in checkpoints]
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
        for spec, dataset in tests.items():
            image, name = dataset.images[0].numpy(), labels.dataset_name(spec)
            written += draw_contact_sheet(image, name, options.out, seed=options.seed)
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    run(main, Options)
