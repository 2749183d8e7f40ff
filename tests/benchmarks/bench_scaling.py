"""What several processes are worth, and what a Hessian-vector product costs.

    torchrun --nproc-per-node 2 -m tests.benchmarks.bench_scaling

Strong scaling: the same work by all processes of one thread and by one of them, in turn. Cost: the
constants of the model in ``docs/scaling.md``, fitted to some measurements and checked against
others. Printed, and written to ``scaling.md``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from analysis.objective import error_rate
from lossgeometry import Hessian, eigsh, max_eigenvalue_spectrum, random_directions, surface
from lossgeometry.running.distributed import ALONE, Team, join
from models.csan import CSAN
from tests.benchmarks.table import Row, write_table

OUTPUT = Path(__file__).with_name("scaling.md")
PACKAGES = ("torch", "numpy", "scipy")
TURNS = 5  # of each side; other work on the machine comes and goes
PASSES = 6  # forward passes' worth of work that a Hessian-vector product is


@dataclass(frozen=True)
class Case:
    """A product of a Hessian with some vectors at once."""

    dim: int
    depth: int
    images: int
    vectors: int = 1

    def model(self) -> CSAN:
        """A CSAN for CIFAR."""
        torch.manual_seed(0)
        sizes = dict(image_size=32, channels=3, classes=100, patch_size=4)
        return CSAN(**sizes, dim=self.dim, depth=self.depth, heads=3, window=5).eval()

    def data(self) -> tuple[Tensor, Tensor]:
        """Noise."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.images, 3, 32, 32, generator=generator)
        return x, torch.randint(100, (self.images,), generator=generator)


@dataclass(frozen=True)
class Measured:
    """What a case costs."""

    flops: float  # n F v, of forward passes
    images: int
    vectors: int
    parameters: int
    kept: float  # bytes of graph an image
    seconds: float  # CPU time of a product


FITTED = (
    *(Case(48, 2, 8), Case(48, 2, 32), Case(48, 6, 16), Case(96, 4, 8), Case(96, 4, 16)),
    *(Case(192, 2, 4), Case(192, 2, 16), Case(96, 2, 8, 4), Case(48, 4, 8, 4)),
)
CHECKED = (
    *(Case(96, 6, 8), Case(144, 3, 16), Case(48, 3, 32), Case(192, 3, 8), Case(96, 3, 8, 3)),
)
MESSAGES = (10_000, 100_000, 1_000_000, 8_000_000)  # numbers in a sum over the processes
CHECKED_MESSAGES = (30_000, 300_000, 3_000_000)


def main() -> None:
    """Measure, print, and write."""
    torch.set_num_threads(1)
    team = join("cpu")
    rows = strong_scaling(team)
    if team.rank == 0:
        write_table(OUTPUT, rows, packages=PACKAGES, threads=1)
    else:
        list(rows)
    lines = cost(team)
    if team.rank == 0:
        print("\n".join(lines))
        OUTPUT.write_text(OUTPUT.read_text() + "\n" + "\n".join([*lines, ""]))


def strong_scaling(team: Team) -> Iterator[Row]:
    """Each work by all processes against the same by one."""
    works: dict[str, tuple[Callable[[Team], Tensor], float]] = {
        "landscape surface, 9 x 9 points, 64 images": (landscape_surface, 1.8),
        "max eigenvalue spectrum, 40 mini-batches of 16": (spectrum, 1.8),
        "top 5 eigenvalues of 128 images": (full_data_lanczos, 1.6),
    }
    for name, (work, goal) in works.items():
        ratios = []
        for _ in range(TURNS):
            team.sum_(torch.zeros(1))  # start together
            all_take, together = timed(partial(work, team))
            one_takes, alone = team.first(partial(timed, partial(work, ALONE)))
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-7)
            ratios.append(one_takes / all_take)
        processes = f"{team.size} processes of 1 thread"
        yield f"{name}: {processes}", "1 process of 1 thread", statistics.median(ratios), goal


def landscape_surface(team: Team) -> Tensor:
    """NLL and error of a CSAN for CIFAR-100."""
    case = Case(96, 6, 64)
    model, axis = case.model(), np.linspace(-1, 1, 9)
    metrics = {"nll": F.cross_entropy, "error": error_rate}
    found = surface(
        model, metrics, case.data(), random_directions(model, seed=0), axis, axis, team=team
    )
    return torch.from_numpy(np.stack(list(found.values())))


def spectrum(team: Team) -> Tensor:
    """Top 5 eigenvalues of mini-batches dealt out to the processes."""
    case = Case(48, 3, 640)
    x, y = case.data()
    batches = list(zip(x.split(16), y.split(16), strict=True))
    return max_eigenvalue_spectrum(case.model(), F.cross_entropy, batches, team=team).eigenvalues


def full_data_lanczos(team: Team) -> Tensor:
    """Of one Hessian, whose examples the processes share."""
    case = Case(96, 4, 128)
    return eigsh(Hessian(case.model(), F.cross_entropy, case.data(), team=team), 5).eigenvalues


def cost(team: Team) -> list[str]:
    """Constants of the model of cost, and how it does on what they were not fitted to."""
    fitted, checked = (
        team.first(partial(list, map(measure, cases))) for cases in (FITTED, CHECKED)
    )
    kept = [m.kept / (64 * c.depth * c.dim) for c, m in zip(FITTED, fitted, strict=True)]
    terms = [(PASSES * m.flops, m.vectors * m.images * m.kept, 1.0) for m in fitted]
    constants = fit(terms, [m.seconds for m in fitted])
    lines = [
        "Hessian-vector products, one process: CPU seconds = 6 F n v / rate + g n v / traffic + "
        f"start, with rate = {1 / constants[0]:.3g} FLOP/s, traffic = {1 / constants[1]:.3g} B/s, "
        f"start = {constants[2]:.2g} s; g = {np.median(kept):.0f} bytes an image, token, block and "
        "channel",
        "",
        "| not in the fit: dim, depth, images, vectors | CPU seconds | predicted | ratio |",
        "|---|---:|---:|---:|",
    ]

    def predict(m: Measured, processes: int) -> float:
        work = np.array([PASSES * m.flops, m.vectors * m.images * m.kept]) / processes
        return float(work @ constants[:2] + constants[2])

    def row(case: Case, measured: float, predicted: float) -> str:
        what = f"{case.dim}, {case.depth}, {case.images}, {case.vectors}"
        return f"| {what} | {measured:.3f} | {predicted:.3f} | {measured / predicted:.2f} |"

    lines += [row(c, m.seconds, predict(m, 1)) for c, m in zip(CHECKED, checked, strict=True)]
    if team.size == 1:
        return lines
    sums = [time_of_sum(n, team) for n in MESSAGES]
    latency, per_byte = fit([(1, 4 * n) for n in MESSAGES], sums)
    lines += [
        "",
        f"Sums over {team.size} processes: {latency:.2g} s + bytes / ({1 / per_byte:.3g} B/s)",
        "",
        "| not in the fit: numbers | seconds | predicted | ratio |",
        "|---|---:|---:|---:|",
    ]
    for n in CHECKED_MESSAGES:
        predicted, measured = latency + 4 * n * per_byte, time_of_sum(n, team)
        lines.append(f"| {n} | {measured:.5f} | {predicted:.5f} | {measured / predicted:.2f} |")
    lines += [
        "",
        f"| products of {team.size} processes, the slower | CPU seconds | predicted | ratio |",
        "|---|---:|---:|---:|",
    ]
    for case, alone in zip(CHECKED, checked, strict=True):
        numbers = alone.vectors * alone.parameters
        predicted = predict(alone, team.size) + latency + 4 * numbers * per_byte
        lines.append(row(case, slowest(measure(case, team).seconds, team), predicted))
    return lines


def measure(case: Case, team: Team = ALONE) -> Measured:
    """Time the product of a case, by its team."""
    model, (x, y) = case.model(), case.data()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    hessian = Hessian(model, F.cross_entropy, (x, y), team=team)
    size = hessian.shape[0]
    vectors = torch.randn(size, case.vectors, generator=torch.Generator().manual_seed(0))
    hessian @ vectors  # computes the gradient and its graph
    taken = []
    for _ in range(TURNS):
        team.sum_(torch.zeros(1))
        # Of one thread; on a busy machine the clock on the wall says something else.
        taken.append(timed(lambda: hessian @ vectors, time.process_time)[0])
    chunk = hessian._objective.chunks[0]
    return Measured(
        flops=float(counter.get_total_flops() * case.vectors),
        images=case.images,
        vectors=case.vectors,
        parameters=size,
        kept=hessian._make_linear_map(chunk).size() / chunk.size,
        seconds=min(taken),
    )


def fit(terms: Sequence[Sequence[float]], targets: Sequence[float]) -> np.ndarray:
    """Coefficients, none of them negative, of least relative error."""
    matrix = np.array(terms, dtype=float) / np.array(targets)[:, None]
    scale = matrix.max(axis=0)
    return nnls(matrix / scale, np.ones(len(targets)))[0] / scale


def time_of_sum(numbers: int, team: Team) -> float:
    """Seconds of a sum of so many float32 numbers over the processes."""
    tensor = torch.zeros(numbers)
    team.sum_(tensor)
    return slowest(min(timed(lambda: team.sum_(tensor))[0] for _ in range(4 * TURNS)), team)


def slowest(taken: float, team: Team) -> float:
    """The longest of the times of all processes."""
    every = team.collect(torch.tensor([taken], dtype=torch.float64), team.size)
    return float(every.max())


def timed(
    function: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, object]:
    """Seconds it takes, and what it returns."""
    start = clock()
    result = function()
    return clock() - start, result


if __name__ == "__main__":
    main()
