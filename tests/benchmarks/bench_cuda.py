"""A GPU against other packages and itself: ``python -m tests.benchmarks.bench_cuda``.

Same model, data and objective for all, data on the device and TF32 off for all, sides in turn in
one process, ratios of medians. Rows come in the order of their importance, each with a share of
the minutes; what has not been measured by then says so. Printed and written to ``cuda.md``, row by
row. ``--rehearse`` makes all of them of tiny networks on whatever device there is, and writes
nothing.

Where a peer is "as accurate", its number of steps, or tolerance, is the loosest of a few with which
all eigenvalues of a mini-batch are within 1e-3 of a tight solve.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import platform
import signal
import statistics
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from lossgeometry import Hessian, random_directions, spectral_density, trace
from lossgeometry.running.devices import choose_device
from models.checkpoint import load_checkpoint
from models.csan import CSAN
from models.data.datasets import load_dataset
from tests.benchmarks.bench_curvature import loosest, relative_error, spectrum
from tests.benchmarks.bench_landscape import METRICS, both, cut, loss_landscapes
from tests.benchmarks.peers import (
    Batch,
    curvlinops_operator,
    curvlinops_spectrum,
    eigenthings_operator,
    eigenthings_spectrum,
    pyhessian_spectrum,
)

OUTPUT = Path(__file__).with_name("cuda.md")
PACKAGES = (
    *("torch", "torchvision", "timm", "pyhessian", "hessian-eigenthings"),
    *("curvlinops-for-pytorch", "loss-landscapes"),
)
TURNS = 5
FEW = 2  # mini-batches that peers solve, each on its own
PROBES, STEPS, MATVECS = 8, 5, 24
STEPS_OF_LANCZOS = (15, 20, 25, 30, 40, 50, 60)
TOLERANCES = (0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3)


class OutOfTime(Exception):
    """Raised when the share of a section is used up."""


class TookLong(Exception):
    """Raised when that of one side is."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    work: str
    against: str
    goal: float | None = None  # ratio to reach
    ratio: float | None = None
    details: str = "not measured"

    def __str__(self) -> str:
        numbers = ["" if n is None else f"{n:.2f}" for n in (self.ratio, self.goal)]
        return f"| {self.work} | {self.against} | {' | '.join(numbers)} | {self.details} |"


@dataclass(frozen=True)
class Sizes:
    """Of what is measured."""

    device: torch.device
    rehearsal: bool
    batches: int  # mini-batches of a spectrum
    images: int  # of density, trace
    points: int  # of a surface, along each axis
    turns: int

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        name, n = ("digits", 64) if self.rehearsal else ("cifar100", 2048)
        few = load_dataset(name).first(n)
        return few.inputs.to(self.device), few.labels.to(self.device)

    def mini_batches(self, n: int, size: int = 16, pixels: int | None = None) -> list[Batch]:
        """The first `n` of `size` images, enlarged to `pixels`."""
        x, y = (t[: n * size] for t in self.inputs)
        if pixels is not None:
            x = F.interpolate(x, (pixels, pixels), mode="bilinear")
        return list(zip(x.split(size), y.split(size), strict=True))


Model = Callable[[Sizes], nn.Module]


def small_csan(sizes: Sizes) -> nn.Module:
    """The CSAN of dim 96, depth 6 that the repository holds, trained on CIFAR-100."""
    if sizes.rehearsal:
        return tiny_vit(sizes)
    return ready(load_checkpoint(Path("checkpoints/cifar100/csan5.pt")).model, sizes)


def tiny_vit(sizes: Sizes) -> nn.Module:
    """A CSAN of the size of ViT-Ti, untrained."""
    options: dict[str, Any] = dict(
        image_size=32, channels=3, classes=100, patch_size=4, dim=192, depth=12, heads=3, window=5
    )
    if sizes.rehearsal:
        options.update(image_size=8, channels=1, classes=10, dim=12, depth=2)
    return ready(CSAN(**options), sizes)


def resnet18(sizes: Sizes) -> nn.Module:
    """ResNet-18 of CIFAR images, untrained."""
    return ready(_resnet("resnet18", sizes), sizes)


def resnet50(sizes: Sizes) -> nn.Module:
    """ResNet-50, untrained."""
    return ready(_resnet("resnet50", sizes), sizes)


def vit_b(sizes: Sizes) -> nn.Module:
    """timm's ViT-B/16, untrained."""
    import timm

    options = dict(img_size=16, embed_dim=12, depth=2) if sizes.rehearsal else {}
    channels = sizes.inputs[0].shape[1]
    name = "vit_base_patch16_224"
    return ready(timm.create_model(name, num_classes=100, in_chans=channels, **options), sizes)


def _resnet(name: str, sizes: Sizes) -> nn.Module:
    """From torchvision, with statistics of BatchNorm that are those of images."""
    import torchvision

    if sizes.rehearsal:
        convolution = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        model = nn.Sequential(*convolution, nn.Flatten(), nn.Linear(4, 10))
    else:
        model = torchvision.models.get_model(name, num_classes=100)
    model.to(sizes.device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(sizes.mini_batches(1, size=32, pixels=64)[0][0])
    return model


def ready(model: nn.Module, sizes: Sizes) -> nn.Module:
    """To be measured."""
    return model.to(sizes.device).eval().requires_grad_()


@dataclass
class Side:
    """One way to do some work, and what it took."""

    work: Callable[[], Any]
    pieces: int = 1  # that `work` is made of; ratios are of the time for one
    seconds: list[float] = field(default_factory=list)
    peak: int = 0  # bytes
    result: Any = None

    def turn(self, device: torch.device) -> None:
        """Do it, with the clock running."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.result = self.work()
        if device.type == "cuda":
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        self.seconds.append((time.perf_counter() - start) / self.pieces)

    @property
    def median(self) -> float:
        """Seconds for one piece."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        memory = f", {self.peak / 2**30:.1f} GiB" if self.peak else ""
        return f"{self.median * 1e3:.3g} ms{memory}"


def alternate(
    sides: dict[str, Side], sizes: Sizes, seconds: float, warm: bool = True
) -> dict[str, str]:
    """Let all sides take turns for so long; returns {name: reason} of those that have no time.

    One turn of a side may take half of the seconds. The first round does not count, unless all are
    `warm` already or there is no time for another one.
    """
    failed: dict[str, str] = {}
    end = time.monotonic() + seconds
    for turn in range(0 if warm else -1, sizes.turns):
        began = time.monotonic()
        for name, side in sides.items():
            if name in failed:
                continue
            try:
                with limited(seconds / 2, TookLong(f"a turn of more than {seconds / 2:.0f} s")):
                    side.turn(sizes.device)
            except OutOfTime:
                raise
            except Exception as error:
                failed[name] = reason(error)
        if time.monotonic() + (time.monotonic() - began) > end:
            break
        if turn < 0:
            for side in sides.values():
                side.seconds.clear()
    return {name: why for name, why in failed.items() if not sides[name].seconds}


def reason(error: BaseException) -> str:
    """Of a failure, for a cell of the table."""
    first = (str(error).strip().splitlines() or [""])[0].replace("|", "/")
    return f"failed: {type(error).__name__}: {first[:150]}"


class Section(ABC):
    """Rows that are measured together."""

    share = 1.0  # of the minutes

    @abstractmethod
    def rows(self) -> list[Row]:
        """What will be measured."""

    @abstractmethod
    def measure(self, sizes: Sizes, seconds: float) -> Iterator[Row]:
        """The same, measured in about so many seconds."""


@dataclass
class Replayed(Section):
    """A Hessian-vector product as a CUDA graph, against the kernels one by one."""

    name: str
    model: Model
    goal: float | None = None
    share = 0.3
    REPEATS = 10

    def rows(self) -> list[Row]:
        return [
            Row(f"{self.name}: HVP of 16 images, captured", "the same, eager", self.goal),
            Row(f"{self.name}: share of the time that the device is busy", "HVP, captured"),
            Row(f"{self.name}: share of the time that the device is busy", "HVP, eager"),
        ]

    def measure(self, sizes: Sizes, seconds: float) -> Iterator[Row]:
        speed, captured, eager = self.rows()
        model, batch = self.model(sizes), sizes.mini_batches(1)[0]
        H = {name: Hessian(model, F.cross_entropy, batch, capture=name == "us") for name in SIDES}
        v = torch.randn(H["us"].shape[0], device=sizes.device)
        for _ in range(3):  # of which the first is not replayed
            found, expected = (A @ v for A in H.values())
        off = float((found - expected).norm() / expected.norm())
        sides = {
            name: Side(lambda A=A: [A @ v for _ in range(self.REPEATS)], self.REPEATS)
            for name, A in H.items()
        }
        failed = alternate(sides, replace(sizes, turns=4 * sizes.turns), seconds / 2, warm=True)
        if failed:
            yield replace(speed, details="; ".join(failed.values()))
            return
        details = f"{sides['us']}; {sides['eager']}; {off:.0e} apart"
        yield replace(speed, ratio=sides["eager"].median / sides["us"].median, details=details)
        for row, side in ((captured, sides["us"]), (eager, sides["eager"])):
            yield busy(row, side, sizes)


SIDES = ("us", "eager")


@dataclass
class Eigenvalues(Section):
    """Top-5 eigenvalues by magnitude of each mini-batch of 16."""

    name: str
    model: Model
    goals: dict[str, float]
    pixels: int | None = None
    share: float = 1.0

    def rows(self) -> list[Row]:
        work = f"{self.name}: top-5 of each mini-batch of 16"
        peers = [Row(work, name, goal) for name, goal in self.goals.items()]
        return [*peers, Row(f"{self.name}: share of the time that the device is busy", "top-5")]

    def measure(self, sizes: Sizes, seconds: float) -> Iterator[Row]:
        *peers, share = self.rows()
        n = sizes.batches if self.pixels is None else FEW + 1
        pixels = 16 if sizes.rehearsal and self.pixels else self.pixels
        model, batches = self.model(sizes), sizes.mini_batches(n, pixels=pixels)
        few = batches[:FEW]
        truth = spectrum(model, few, tol=1e-6)
        sides = {"us": Side(lambda: spectrum(model, batches, tol=1e-3), len(batches))}
        settings: dict[str, str] = {}
        for row in peers:
            try:
                slow = TookLong("settings for this accuracy were not found in time")
                with sdpa_kernel(SDPBackend.MATH), limited(seconds / 3, slow):
                    solve, settings[row.against] = self._peer(row.against, model, few, truth)
            except OutOfTime:
                raise
            except Exception as error:
                yield replace(row, details=reason(error))
                continue
            sides[row.against] = Side(solve, FEW)
        sides["us"].work()  # the others are warm by now
        with sdpa_kernel(SDPBackend.MATH):
            failed = alternate(sides, sizes, seconds / 2)
        for row in peers:
            if row.against not in sides:
                continue
            why = failed.get(row.against) or failed.get("us")
            if why is not None:
                yield replace(row, details=why)
                continue
            ours, theirs = sides["us"], sides[row.against]
            details = (
                f"{ours}, {relative_error(ours.result[:FEW], truth):.0e} off; "
                f"{theirs}, {relative_error(theirs.result, truth):.0e} off{settings[row.against]}"
            )
            yield replace(row, ratio=theirs.median / ours.median, details=details)
        yield busy(share, sides["us"], sizes)

    @staticmethod
    def _peer(
        name: str, model: nn.Module, batches: list[Batch], truth: np.ndarray
    ) -> tuple[Callable[[], np.ndarray], str]:
        """What it does, and with which settings."""
        if name == "PyHessian, defaults":
            return partial(pyhessian_spectrum, model, batches, 1e-3, 100), ""
        solver: Callable[..., np.ndarray]
        if name.startswith("hessian-eigenthings"):
            solver, settings, unit = eigenthings_spectrum, STEPS_OF_LANCZOS, "steps"
        else:
            # On some versions of PyTorch its Hessian is another one, of which it is to be accurate.
            solver, settings, unit = curvlinops_spectrum, TOLERANCES, "tolerance"
            truth = curvlinops_spectrum(model, batches, 1e-5)
        found = loosest(solver, model, batches, settings, truth)
        if found is None:
            raise RuntimeError(f"not within 1e-3 with a {unit} of {settings[-1]}")
        return partial(solver, model, batches, found), f" ({unit}: {found:g})"


@dataclass
class ManyImages(Section):
    """Density and trace of many images."""

    share = 1.6

    def rows(self) -> list[Row]:
        density = f"density of 2,048 images, {PROBES} probes, {STEPS} steps"
        return [
            Row(f"CSAN 96 x 6: {density}", "hessian-eigenthings", 2),
            Row(f"CSAN 96 x 6: {density}", "curvlinops", 2),
            Row("CSAN 96 x 6: share of the time that the device is busy", "density"),
            Row(f"CSAN 96 x 6: trace of 2,048 images, {MATVECS} products", "hessian-eigenthings"),
        ]

    def measure(self, sizes: Sizes, seconds: float) -> Iterator[Row]:
        from curvlinops.papyan2020traces.spectrum import fast_lanczos
        from hessian_eigenthings import spectral_density as eigenthings_density
        from hessian_eigenthings import trace as eigenthings_trace

        things, linops, share, hutchinson = self.rows()
        model, size = small_csan(sizes), min(256, sizes.images)
        batches = sizes.mini_batches(sizes.images // size, size)

        def ours(of: Callable[[Hessian], Any]) -> Callable[[], Any]:
            return lambda: of(Hessian(model, F.cross_entropy, batches))

        densities = {
            "us": Side(ours(partial(spectral_density, probes=PROBES, steps=STEPS))),
            "hessian-eigenthings": Side(
                lambda: eigenthings_density(
                    eigenthings_operator(model, batches),
                    num_runs=PROBES,
                    lanczos_steps=STEPS,
                    num_grid_points=100,
                )
            ),
            "curvlinops": Side(
                lambda: [
                    fast_lanczos(curvlinops_operator(model, batches), STEPS) for _ in range(PROBES)
                ]
            ),
        }
        yield from compared([things, linops], densities, sizes, seconds * 0.6)
        traces = {
            "us": Side(ours(partial(trace, matvecs=MATVECS))),
            "hessian-eigenthings": Side(
                lambda: eigenthings_trace(
                    eigenthings_operator(model, batches), num_matvecs=MATVECS, seed=0
                )
            ),
        }
        yield from compared([hutchinson], traces, sizes, seconds * 0.3)
        yield busy(share, densities["us"], sizes)


@dataclass
class Surface(Section):
    """A surface of 1,024 images, NLL and error."""

    share = 0.8

    def rows(self) -> list[Row]:
        work = "CSAN 96 x 6: 21 x 21 surface of 1,024 images, NLL + error"
        return [
            Row(work, "loss-landscapes, a run for each metric", 3),
            Row(work, "loss-landscapes, one metric that is both", 3),
            Row(work, "the bare forward passes", 0.8),
            Row("CSAN 96 x 6: share of the time that the device is busy", "surface"),
        ]

    def measure(self, sizes: Sizes, seconds: float) -> Iterator[Row]:
        apart, together, bare, share = self.rows()
        model = small_csan(sizes).requires_grad_(False)
        x, y = (t[: sizes.images // 2] for t in sizes.inputs)
        directions = random_directions(model, seed=0)
        axis = np.linspace(-1, 1, sizes.points)

        def forward_passes() -> Tensor:
            with torch.inference_mode():
                for _ in range(sizes.points**2):
                    outputs = model(x)
            return outputs

        def theirs(metric: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
            return loss_landscapes(model, metric, x, y, directions, axis, axis)

        sides = {
            "us": Side(lambda: cut(model, (x, y), directions, axis, axis)),
            apart.against: Side(lambda: [theirs(metric) for metric in METRICS.values()]),
            together.against: Side(lambda: theirs(both)),
            bare.against: Side(forward_passes),
        }
        yield from compared([apart, together, bare], sides, sizes, seconds)
        yield busy(share, sides["us"], sizes)


def compared(
    rows: Sequence[Row], sides: dict[str, Side], sizes: Sizes, seconds: float
) -> Iterator[Row]:
    """Rows of the side "us" against others, when all have had their turns."""
    failed = alternate(sides, sizes, seconds, warm=False)
    for row in rows:
        why = failed.get(row.against) or failed.get("us")
        if why is not None:
            yield replace(row, details=why)
            continue
        ours, theirs = sides["us"], sides[row.against]
        yield replace(row, ratio=theirs.median / ours.median, details=f"{ours}; {theirs}")


def busy(row: Row, side: Side, sizes: Sizes) -> Row:
    """Share of the time of a side in which kernels run.

    These are counted in a turn of its own, as the profiler slows down the host, but not them.
    """
    if sizes.device.type != "cuda" or not side.seconds:
        why = "no time to compare with" if sizes.device.type == "cuda" else "there is no GPU"
        return replace(row, details=f"not measured: {why}")
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        side.work()
        torch.cuda.synchronize()
    assert record.profiler is not None
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in record.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA
    )
    running, until = 0, 0
    for start, end in spans:
        running += max(end - max(start, until), 0)
        until = max(until, end)
    whole = side.median * side.pieces
    details = f"{running / 1e6:.3g} of {whole * 1e3:.3g} ms, {len(spans)} kernels and copies"
    return replace(row, ratio=running / 1e9 / whole, details=details)


SMALL = {
    "PyHessian, defaults": 20.0,
    "hessian-eigenthings, as accurate": 4.0,
    "curvlinops, as accurate": 8.0,
}
LARGE = {"hessian-eigenthings, as accurate": 1.7}
SECTIONS: tuple[Section, ...] = (
    Replayed("CSAN 96 x 6", small_csan, goal=3),
    Eigenvalues("CSAN 96 x 6", small_csan, SMALL),
    Eigenvalues("ViT-Ti", tiny_vit, SMALL, share=1.6),
    ManyImages(),
    Surface(),
    Eigenvalues("ViT-B/16 at 224", vit_b, LARGE, pixels=224, share=1.6),
    Eigenvalues("ResNet-50 at 224", resnet50, LARGE, pixels=224, share=1.2),
    Eigenvalues("ResNet-18", resnet18, SMALL, share=1.0),
    Replayed("ViT-Ti", tiny_vit, goal=3),
    Replayed("ResNet-18", resnet18),
)


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, nothing is written")
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", "products are not replayed")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = choose_device("auto")
    tiny = options.rehearse
    sizes = (
        Sizes(device, True, batches=4, images=64, points=3, turns=1)
        if tiny
        else Sizes(device, False, batches=33, images=2048, points=21, turns=TURNS)
    )
    measure_all(sizes, options.minutes * 60, None if tiny else OUTPUT)


def measure_all(sizes: Sizes, seconds: float, path: Path | None) -> None:
    """Measure section after section, and write the table, which has all rows, after each row."""
    head = [
        ", ".join([device_name(sizes.device), *(f"{p} {version(p)}" for p in PACKAGES)]),
        "",
        "| work | against | ratio | to reach | us; them |",
        "|---|---|---:|---:|---|",
    ]
    lines = [[str(row) for row in section.rows()] for section in SECTIONS]
    print("\n".join(head), flush=True)
    end = time.monotonic() + seconds
    for i, section in enumerate(SECTIONS):
        left = end - time.monotonic()
        shares = sum(later.share for later in SECTIONS[i:])
        given = left * section.share / shares
        open_rows = {(row.work, row.against): j for j, row in enumerate(section.rows())}
        why = "not measured: out of time"
        began = time.monotonic()
        try:
            with limited(min(1.5 * given, left), OutOfTime()):
                for row in section.measure(sizes, given):
                    lines[i][open_rows.pop((row.work, row.against))] = str(row)
                    print(row, flush=True)
                    write(path, head, lines)
        except OutOfTime:
            pass
        except Exception as error:
            why = reason(error)
        for (work, against), j in open_rows.items():
            lines[i][j] = str(Row(work, against, section.rows()[j].goal, details=why))
            print(lines[i][j], flush=True)
        write(path, head, lines)
        print(f"{time.monotonic() - began:.0f} s of {given:.0f} s", flush=True)
        gc.collect()
        if sizes.device.type == "cuda":
            torch.cuda.empty_cache()


def write(path: Path | None, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """The table as far as it is known."""
    if path is not None:
        path.write_text("\n".join([*head, *(line for rows in lines for line in rows), ""]))


@contextlib.contextmanager
def limited(seconds: float, error: Exception) -> Iterator[None]:
    """Raise `error` inside after so long; may be nested."""
    outer, _ = signal.getitimer(signal.ITIMER_REAL)
    if outer and outer <= seconds:
        yield
        return

    def stop(*_: object) -> None:
        raise error

    began = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 5.0)  # again, if it went unheard
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - time.monotonic() + began, 1e-3), 5.0)


def device_name(device: torch.device) -> str:
    """Of the GPU, if there is one."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
