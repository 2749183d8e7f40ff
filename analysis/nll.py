"""``python -m analysis.nll``: train-NLL curves and the optimisation-regularisation plane."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.options import Ckpt, Out, open_checkpoints
from models.cli import Force, run

if TYPE_CHECKING:
    from analysis.measurements import Measurement


_COLUMNS = {
    "train_nll": ("train NLL", ".4f", 1),
    "train_error": ("train error %", ".2f", 100),
    "test_nll": ("test NLL", ".4f", 1),
    "test_error": ("test error %", ".2f", 100),
}


@dataclass(frozen=True)
class Options:
    """Draw train NLL over the epochs, and train NLL against test error at the end.

    The histories of the given checkpoints are stored in their HDF5 files; drawn are these and all
    others in the same folders and below, with the mean and the 95 % interval over seeds.
    """

    ckpt: Ckpt = ()
    out: Out = Path("figures")
    force: Force = False


def main(options: Options) -> None:
    """Store the histories, print a table of the end points, draw, and name the files."""
    import numpy as np

    from analysis import drawing
    from analysis.measurements import collect, store, stored

    checkpoints = open_checkpoints(options.ckpt, options.out)
    for checkpoint in checkpoints:
        if options.force or not stored("history", checkpoint=checkpoint, options={}):
            arrays = {name: np.array(values) for name, values in checkpoint.history.items()}
            store("history", arrays, checkpoint=checkpoint, options={})
    histories = collect({c.path.parent for c in checkpoints if c.path}, "history")
    print_end_points(histories)
    for path in drawing.draw_nll(histories, options.out):
        print(f"wrote {path}")


def print_end_points(histories: list[Measurement]) -> None:
    """Table of train NLL and test error at the end of training, over seeds."""
    from analysis import drawing
    from analysis.statistics import across_seeds
    from analysis.tables import print_table

    groups: dict[tuple[str, int, str], list[Measurement]] = defaultdict(list)
    for m in sorted(histories, key=drawing.by_window):
        groups[drawing.dataset(m), m.checkpoint["recipe"]["epochs"], drawing.label(m)].append(m)
    rows = []
    for (dataset, epochs, label), members in groups.items():
        end = {key: across_seeds([m.arrays[key][-1] for m in members]) for key in _COLUMNS}
        cells = [end[key].format(digits, scale) for key, (_, digits, scale) in _COLUMNS.items()]
        rows.append([dataset, label, str(epochs), str(len(members)), *cells])
    print_table(
        "End of training: mean ± half of the 95 % interval over seeds",
        ["dataset", "window", "epochs", "seeds", *(title for title, _, _ in _COLUMNS.values())],
        rows,
    )


if __name__ == "__main__":
    run(main, Options)
