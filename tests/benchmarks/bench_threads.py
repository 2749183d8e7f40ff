"""Points on threads of their own: ``python -m tests.benchmarks.bench_threads``.

Against all threads for each point, on the line that `analysis.landscape` cuts by default. The sides
take turns in one process, and their values have to agree to the last bit.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np

from analysis.objective import build_objective
from lossgeometry import line, random_directions
from lossgeometry.landscape import evaluation
from models.checkpoint import load_checkpoint
from models.data.datasets import load_dataset

TURNS, POINTS = 5, 4


def main() -> None:
    """Print the ratios of medians over the turns."""
    for window in (3, 5, 8):
        checkpoint = load_checkpoint(Path(f"checkpoints/csan{window}.pt"))
        objective = build_objective(
            checkpoint, load_dataset(checkpoint.dataset), batch_size=32, batches=4
        )
        (direction,) = random_directions(objective.model, 1, seed=0)
        cut = partial(line, objective.model, objective.metrics, objective.batches, direction)
        spent: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for turn in range(TURNS):
            xs = np.linspace(-1, 1, POINTS) + 0.01 * turn
            found = []
            for several in (False, True):
                with patch.object(
                    evaluation, "free_threads", evaluation.free_threads if several else lambda: 1
                ):
                    start = time.perf_counter(), time.process_time()
                    found.append(cut(xs)["nll"])
                    end = time.perf_counter(), time.process_time()
                spent[several].append((end[0] - start[0], end[1] - start[1]))
            np.testing.assert_array_equal(*found)
        ratios = np.median(spent[False], axis=0) / np.median(spent[True], axis=0)
        print(f"csan{window}: {ratios[0]:.2f} in wall time, {ratios[1]:.2f} in CPU time")


if __name__ == "__main__":
    main()
