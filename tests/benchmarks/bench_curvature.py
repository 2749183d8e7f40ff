"""Curvature against other packages: ``python -m tests.benchmarks.bench_curvature``.

Same model, data and objective for all, the sides in turn in one process. Accuracy is measured
against a tight solve; where a peer is "as accurate", its tolerance, or number of steps, is the
loosest with which all eigenvalues of all mini-batches are within 1e-3. PyHessian's is looked for
only where it does not take hours. Printed and written to ``curvature.md``, row by row.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lossgeometry import Estimate, Hessian, eigsh, max_eigenvalue_spectrum, spectral_density, trace
from models.checkpoint import load_checkpoint
from models.data.datasets import load_dataset
from tests.benchmarks.peers import (
    Batch,
    K,
    curvlinops_operator,
    curvlinops_spectrum,
    eigenthings_operator,
    eigenthings_spectrum,
    pyhessian_spectrum,
)
from tests.benchmarks.products import Products
from tests.benchmarks.table import Row, write_table

ACCURACY = 1e-3
PRODUCTS = 24  # of a solve, where memory is measured
BUDGET = 2**28  # bytes for what is kept between products, where memory is measured
FEW = 2  # mini-batches that are enough for a peer that takes minutes for each
OUTPUT = Path(__file__).with_name("curvature.md")
PACKAGES = ("torch", "scipy", "pyhessian", "hessian-eigenthings", "curvlinops-for-pytorch", "timm")


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-of", choices=("us", "pyhessian"), help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, default=256, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    if options.memory_of:
        print(peak_memory(options.memory_of, options.images))
        return
    torch.manual_seed(0)
    write_table(OUTPUT, rows(), packages=PACKAGES, threads=options.threads)


def rows() -> Iterator[Row]:
    """All comparisons."""
    csan, cifar = shipped("checkpoints/cifar100/csan5.pt")
    small, digits = shipped("checkpoints/csan8.pt")
    yield from eigenvalues("CSAN 96 x 6, mini-batch 16", csan, cifar(16, 8))
    yield from eigenvalues("CSAN of the digits, mini-batch 16", small, digits(16, 8))
    yield from density(csan, cifar(128, 16))
    yield from traces(csan, cifar(32, 1))
    yield from gemm_rate(csan, cifar(16, 1)[0])
    yield from memory()
    few = cifar(16, FEW)
    yield from eigenvalues("ResNet-18, mini-batch 16", resnet(), few, compile=False, slow=True)
    yield from eigenvalues("CSAN 96 x 6, mini-batch 128", csan, cifar(128, FEW), slow=True)


def shipped(path: str) -> tuple[nn.Module, Callable[[int, int], list[Batch]]]:
    """A shipped model, and a function that cuts batches (size, number) of its training images."""
    checkpoint = load_checkpoint(Path(path))
    data = load_dataset(checkpoint.dataset)

    def draw(size: int, number: int) -> list[Batch]:
        few = data.first(size * number)
        return list(zip(few.inputs.split(size), few.labels.split(size), strict=True))

    return checkpoint.model.eval().requires_grad_(), draw


def resnet() -> nn.Module:
    """From torchvision, in evaluation mode."""
    import torchvision

    return torchvision.models.resnet18(num_classes=100).eval()


def eigenvalues(
    work: str,
    model: nn.Module,
    batches: list[Batch],
    *,
    compile: bool = True,
    slow: bool = False,
) -> Iterator[Row]:
    """Top-5 eigenvalues by magnitude of each mini-batch.

    Where products are `slow`, PyHessian's tolerance is not tightened, and curvlinops has one turn.
    Ratios are of seconds a mini-batch. Compilation, once for any number of them, is not counted in
    the ratios but printed.
    """
    truth = spectrum(model, batches, tol=1e-7)
    solvers: dict[str, Callable[[], np.ndarray]] = {
        "us": lambda: spectrum(model, batches, tol=ACCURACY),
        "PyHessian, defaults": lambda: pyhessian_spectrum(model, batches[:FEW], 1e-3, 100),
    }
    their_truth = {"curvlinops": curvlinops_spectrum(model, batches, 1e-7)}
    for name, solver, settings in (
        ("PyHessian", partial(pyhessian_spectrum, max_iter=2000), [10.0**-i for i in range(4, 9)]),
        ("hessian-eigenthings", eigenthings_spectrum, range(10, 60)),
        ("curvlinops", curvlinops_spectrum, [0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4]),
    ):
        if name == "PyHessian" and slow:
            continue
        some = batches[:FEW] if name == "PyHessian" else batches
        expected = their_truth.get(name, truth)[: len(some)]
        setting = loosest(solver, model, some, settings, expected)
        if setting is None:
            print(f"{work}: {name} does not reach {ACCURACY} with any of {settings}")
            continue
        print(f"{work}: {name} with {setting}")
        solvers[f"{name}, as accurate"] = partial(solver, model, some, setting)
    if compile:
        began = time.perf_counter()
        fast = Hessian(model, F.cross_entropy, batches[0], compile=True)
        print(f"{work}: compiled in {time.perf_counter() - began:.0f} s")
        solvers["us, compiled"] = lambda: recycled(fast, batches)
    long = ("PyHessian", "curvlinops") if slow else ("PyHessian",)
    seconds, results = alternate(solvers, once=[name for name in solvers if name.startswith(long)])
    seconds = {name: seconds[name] / len(result) for name, result in results.items()}
    error = {name: relative_error(found, truth[: len(found)]) for name, found in results.items()}
    print({name: f"{seconds[name]:.2f} s, {error[name]:.1e} off" for name in solvers})
    print(f"{work}: curvlinops is {relative_error(their_truth['curvlinops'], truth):.1e} off")
    goals = {
        "PyHessian, as accurate": 15,
        "PyHessian, defaults": 4,
        "hessian-eigenthings, as accurate": 2.5,
        "curvlinops, as accurate": 3,
    }
    for ours in ("us", "us, compiled"):
        for name, goal in goals.items():
            if ours in seconds and name in seconds:
                suffix = " (compiled)" if ours != "us" else ""
                yield work + suffix, name, seconds[name] / seconds[ours], goal
    yield (
        f"{work}: error",
        "PyHessian, defaults",
        error["PyHessian, defaults"] / error["us"],
        100,
    )


def spectrum(model: nn.Module, batches: list[Batch], tol: float) -> np.ndarray:
    """This project's."""
    return max_eigenvalue_spectrum(model, F.cross_entropy, batches, K, tol=tol).eigenvalues.numpy()


def recycled(H: Hessian, batches: list[Batch]) -> np.ndarray:
    """As `max_eigenvalue_spectrum` does, with an operator that is compiled already."""
    first = eigsh(H.on(batches[0]), K, tol=ACCURACY)
    found = [first]
    for i, batch in enumerate(batches[1:], start=1):
        found.append(eigsh(H.on(batch), K, tol=ACCURACY, v0=first.eigenvectors, seed=i))
    return np.stack([E.eigenvalues.numpy() for E in found])


def loosest(
    solver: Callable[[nn.Module, list[Batch], float], np.ndarray],
    model: nn.Module,
    batches: list[Batch],
    settings: Sequence[float],
    truth: np.ndarray,
) -> float | None:
    """First setting with which every eigenvalue is accurate, as it will be timed.

    Found by bisection: settings become stricter, so that all after it are accurate, too.
    """

    def accurate(setting: float) -> bool:
        return all(  # most settings fail with the first
            relative_error(solver(model, batches[:some], setting), truth[:some]) <= ACCURACY
            for some in (1, len(batches))
        )

    first = bisect_left(settings, True, key=accurate)
    return settings[first] if first < len(settings) else None


def density(model: nn.Module, batches: list[Batch]) -> Iterator[Row]:
    """The first of 40 steps, which cost the same, or less where something is kept."""
    from curvlinops.papyan2020traces.spectrum import fast_lanczos
    from hessian_eigenthings import spectral_density as eigenthings_density

    probes, steps = 8, 1
    plain, fast = (
        Hessian(model, F.cross_entropy, batches, compile=compile) for compile in (False, True)
    )
    seconds, _ = alternate(
        {
            "us": lambda: spectral_density(plain.on(batches), probes=probes, steps=steps),
            "us, compiled": lambda: spectral_density(fast.on(batches), probes=probes, steps=steps),
            "hessian-eigenthings": lambda: eigenthings_density(
                eigenthings_operator(model, batches),
                num_runs=probes,
                lanczos_steps=steps,
                num_grid_points=100,
            ),
            "curvlinops": lambda: [
                fast_lanczos(curvlinops_operator(model, batches), steps) for _ in range(probes)
            ],
        },
        once=["curvlinops"],
    )
    for ours, suffix in (("us", ""), ("us, compiled", " (compiled)")):
        for name in ("hessian-eigenthings", "curvlinops"):
            yield (
                f"CSAN 96 x 6, spectral density, 8 probes{suffix}",
                name,
                seconds[name] / seconds[ours],
                2,
            )


def traces(model: nn.Module, batches: list[Batch]) -> Iterator[Row]:
    """Trace to a standard error of 1 %, by the fewest products that reach it.

    Of 32 images of CIFAR-100: a product costs in proportion to them.
    """
    from hessian_eigenthings import trace as eigenthings_trace
    from pyhessian import hessian

    H = Hessian(model, F.cross_entropy, batches, compile=True)
    pilot = trace(H, matvecs=100, method="hutchinson")
    relative = pilot.standard_error / abs(pilot.estimate)
    needed = int(100 * (relative / 0.01) ** 2) + 1

    def ours(matvecs: int) -> Estimate[float]:
        return trace(H.on(batches), matvecs=matvecs, method="xtrace")

    def theirs(matvecs: int) -> Any:
        peer = eigenthings_operator(model, batches)
        return eigenthings_trace(peer, num_matvecs=matvecs, seed=0)

    few = fewest(lambda m: (T := ours(m)).standard_error / abs(T.estimate))
    many = fewest(lambda m: (R := theirs(m)).stderr / abs(R.estimate))
    print(f"trace to 1 %: {few} products, hessian-eigenthings {many}, Hutchinson {needed}")
    share = min(1.0, 20 / needed)  # Hutchinson's cost is linear

    def pyhessian_trace() -> object:
        return hessian(model, F.cross_entropy, dataloader=batches, cuda=False).trace(
            maxIter=int(share * needed), tol=0
        )

    seconds, _ = alternate(
        {
            "us": lambda: ours(few),
            "PyHessian": pyhessian_trace,
            "hessian-eigenthings": lambda: theirs(many),
        }
    )
    model.zero_grad()
    work = "CSAN 96 x 6, trace to 1 % (compiled)"
    yield work, "PyHessian", seconds["PyHessian"] / share / seconds["us"], 2
    yield work, "hessian-eigenthings", seconds["hessian-eigenthings"] / seconds["us"], 2


def fewest(relative_error: Callable[[int], float]) -> int:
    """Products that an estimate takes to have a standard error of 1 %, in steps of 6 or more."""
    matvecs = 12
    while relative_error(matvecs) > 0.01:
        matvecs += 6 * max(matvecs // 24, 1)
    return matvecs


def gemm_rate(model: nn.Module, batch: Batch) -> Iterator[Row]:
    """Time of the matrix products within an HVP, on their own, over the time of the HVP."""
    for name, compile in (("HVP", False), ("compiled HVP", True)):
        H = Hessian(model, F.cross_entropy, batch, compile=compile)
        v = torch.randn(H.shape[0])
        plain = Hessian(model, F.cross_entropy, batch)
        plain @ v
        with Products() as products:
            plain @ v
        sides = {"alone": products.alone(), "within": lambda H=H, v=v: H @ v}
        seconds, _ = alternate(sides, repeats=15)
        rate = seconds["alone"] / seconds["within"]
        yield f"GEMM rate inside the {name}", "plain sgemm of the same shapes", rate, 0.7


def memory() -> Iterator[Row]:
    """Peak memory on many images, of processes of their own."""
    peaks = {
        (who, images): float(
            subprocess.run(
                [sys.executable, "-m", __spec__.name, "--memory-of", who, "--images", str(images)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for who, images in (("us", 64), ("us", 128), ("pyhessian", 128))
    }
    print({f"{who}, {images} images": f"{peak:.2f} GiB" for (who, images), peak in peaks.items()})
    work = f"peak memory, ViT-Ti of 5.5 M parameters, a budget of {BUDGET // 2**20} MiB"
    ours, twice, theirs = peaks.values()
    yield work, "PyHessian, full data in batches of 128", theirs / ours, 2
    yield work, "us, half the images", ours / twice, 0.95


def peak_memory(who: str, images: int) -> float:
    """GiB that the products of our solve, or one product of PyHessian's, adds to the process."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=100)
    model.eval()
    x, y = torch.randn(images, 3, 32, 32), torch.randint(0, 100, (images,))
    batches = list(zip(x.split(128), y.split(128), strict=True))
    before = high_water()
    if who == "us":
        H = Hessian(model, F.cross_entropy, batches, memory=BUDGET, micro_batch=16)
        eigsh(H, K, maxiter=PRODUCTS)
    else:
        from pyhessian import hessian

        with sdpa_kernel(SDPBackend.MATH):
            hessian(model, F.cross_entropy, dataloader=batches, cuda=False).eigenvalues(
                maxIter=1, top_n=1
            )
    return (high_water() - before) / 2**20


def high_water() -> int:
    """Largest memory that this process has had so far, in KiB (Linux).

    That of `resource.getrusage` would begin with what the process had that started this one.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def alternate(
    solvers: dict[str, Callable[[], object]], repeats: int = 3, once: Collection[str] = ()
) -> tuple[dict[str, float], dict[str, object]]:
    """Median seconds of each, run in turn, and what each returned.

    Those named by `once` take so long that they have the first turn only.
    """
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    results = {}
    for turn in range(repeats):
        for name, solver in solvers.items():
            if turn and name in once:
                continue
            start = time.perf_counter()
            results[name] = solver()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}, results


def relative_error(found: np.ndarray, truth: np.ndarray) -> float:
    """Largest of all eigenvalues of all mini-batches."""
    return float(np.max(np.abs(found - truth) / np.abs(truth)))


if __name__ == "__main__":
    main()
