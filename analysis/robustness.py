"""``python -m analysis.robustness``: NLL and error of checkpoints under common corruptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

from analysis.options import CheckpointOptions
from lossgeometry.errors import InputError, raise_left_out
from models.cli import Seed, arg, run

if TYPE_CHECKING:
    from analysis.measurements.recording import Recording

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
    from analysis.measurements.comparisons import with_siblings
    from analysis.measurements.files import sparing
    from analysis.measurements.recording import Recording
    from analysis.tables import print_table
    from lossgeometry.running.distributed import join
    from models.data.arrays import official_corruptions, read_images

    options.require(seed=0)
    known = options.open()
    team = join(options.device)
    tests = {
        spec: read_images(spec, "test", data_root=options.data_root).first(options.images)
        for spec in dict.fromkeys(checkpoint.dataset for checkpoint in known)
    }
    recordings = []
    for checkpoint in known:
        images = tests[checkpoint.dataset]
        official = official_corruptions(images.name, options.data_root)
        settings = {
            "images": len(images),
            "seed": options.seed,
            "source": "official" if official else "generated",
        }
        data = {"test": images.fingerprint}
        recording = Recording(
            "robustness", checkpoint, settings, partial(dict, data), team=team, force=options.force
        )
        recording.announce()
        recording.data = data
        recordings.append(recording)
    _measure(options, [recording for recording in recordings if recording.found is None])
    if team.rank:
        return
    measurements = [recording.found for recording in recordings if recording.found]
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
    left_out: list[InputError] = []
    draw = partial(draw_robustness, out=options.out, origin=labels.origin(measurements))
    written = sparing(draw, with_siblings(measurements, left_out), left_out)
    if options.contact_sheet:
        for spec, dataset in tests.items():
            image, name = dataset.images[0], labels.dataset_name(spec)
            written += draw_contact_sheet(image, name, options.out, seed=options.seed)
    for path in written:
        print(f"wrote {path}")
    raise_left_out(left_out)


def _measure(options: Options, recordings: Sequence[Recording]) -> None:
    """Measure together what is of one dataset."""
    if not recordings:
        return
    from analysis.corrupted import measure_robustness
    from lossgeometry.running.devices import choose_device
    from models.data.arrays import official_corruptions
    from models.data.datasets import load_dataset

    checkpoints = {recording: options.load(recording.checkpoint) for recording in recordings}
    for spec in dict.fromkeys(checkpoint.dataset for checkpoint in checkpoints.values()):
        images = load_dataset(spec, "test", data_root=options.data_root).first(options.images)
        measure_robustness(
            {r: checkpoint for r, checkpoint in checkpoints.items() if checkpoint.dataset == spec},
            images,
            official=official_corruptions(images.name, options.data_root),
            seed=options.seed,
            device=choose_device(options.device),
        )


if __name__ == "__main__":
    run(main, Options)
