import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from analysis.landscape import Slice, line, random_directions, sampling, surface
from analysis.landscape.evaluation import Evaluator
from analysis.landscape.sampling import Sampler
from models.errors import InputError

XS, YS = np.linspace(-1, 1, 5), np.linspace(-1, 1, 3)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(50, 4, generator=generator), torch.arange(50) % 3


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_points_and_change_no_bit(processes: int) -> None:
    network = model()

    def pid(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.tensor(float(os.getpid()))

    metrics = {"nll": F.cross_entropy, "pid": pid}
    arguments = (network, metrics, data(), random_directions(network, seed=0))
    alone = surface(*arguments, XS, YS)
    shared = surface(*arguments, XS, YS, processes=processes)
    assert shared["nll"].tobytes() == alone["nll"].tobytes()
    assert np.unique(alone["pid"]).tolist() == [os.getpid()]
    pids = np.unique(shared["pid"]).astype(int).tolist()
    assert len(pids) == processes
    assert os.getpid() not in pids
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_exception_in_a_process_is_raised_here() -> None:
    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        raise InputError("targets: unusable")

    network = model()
    (direction,) = random_directions(network, 1, seed=0)
    with pytest.raises(InputError, match="targets: unusable"):
        line(network, {"fails": fails}, data(), direction, XS, processes=2)


def test_an_interruption_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "SAVE_EVERY", 0)
    seen: list[int] = []

    def pid(outputs: Tensor, targets: Tensor) -> Tensor:
        time.sleep(0.01)
        return torch.tensor(float(os.getpid()))

    def interrupt(partial: Slice) -> None:
        seen.extend(partial["pid"][partial.done].astype(int).tolist())
        raise KeyboardInterrupt

    network = model()
    (direction,) = random_directions(network, 1, seed=0)
    with pytest.raises(KeyboardInterrupt):
        line(
            network, {"pid": pid}, data(), direction, np.arange(1000.0), processes=2, save=interrupt
        )
    assert not any(alive(pid) for pid in seen)
    assert not multiprocessing.active_children()


def test_a_process_that_dies_is_noticed() -> None:
    def dies(outputs: Tensor, targets: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return outputs.mean()

    network = model()
    (direction,) = random_directions(network, 1, seed=0)
    with pytest.raises(RuntimeError, match="died"):
        line(network, {"dies": dies}, data(), direction, XS, processes=2)


def test_processes_need_a_cpu() -> None:
    evaluator = Evaluator(model(), {"nll": F.cross_entropy}, data())
    with pytest.raises(InputError, match=r"processes: 0 .* expected 1 or more"):
        Sampler(evaluator, [{}], [XS], processes=0)
    evaluator.device = torch.device("cuda")
    with pytest.raises(InputError, match=r"processes: 2 with a model on cuda, expected 1$"):
        Sampler(evaluator, [{}], [XS], processes=2)


def slow_nll(outputs: Tensor, targets: Tensor) -> Tensor:
    time.sleep(0.003)
    return F.cross_entropy(outputs, targets)


def measure(progress: Path, result: Path, adaptive: float | None, processes: int) -> None:
    """Go on from `progress`, which is replaced after every point; at the end write `result`."""

    def save(partial: Slice) -> None:
        copy = progress.with_suffix(".new")
        copy.write_bytes(pickle.dumps(partial))
        copy.replace(progress)

    network, axis = model(), np.linspace(-1, 1, 15)
    found = surface(
        network,
        {"nll": slow_nll},
        data(),
        random_directions(network, seed=0),
        axis,
        axis,
        weight_decay=0.1,
        adaptive=adaptive,
        processes=processes,
        save=save,
        resume=pickle.loads(progress.read_bytes()) if progress.exists() else None,
    )
    result.write_bytes(b"".join(found[name].tobytes() for name in ("nll", "l2")))


@pytest.mark.parametrize(("adaptive", "processes"), [(None, 1), (None, 2), (0.1, 1)])
def test_killed_at_random_moments_and_resumed_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adaptive: float | None, processes: int
) -> None:
    monkeypatch.setattr(sampling, "SAVE_EVERY", 0)
    measure(tmp_path / "whole.part", tmp_path / "whole", adaptive, processes)
    moments = np.random.default_rng(0)
    progress, result = tmp_path / "killed.part", tmp_path / "killed"
    kills = 0
    while not result.exists():
        before = progress.stat().st_mtime_ns if progress.exists() else 0
        process = multiprocessing.get_context("fork").Process(
            target=measure, args=(progress, result, adaptive, processes)
        )
        process.start()
        while process.is_alive() and not (
            progress.exists() and progress.stat().st_mtime_ns > before
        ):
            time.sleep(0.001)
        process.join(moments.uniform(0, 0.05))
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills >= 1
    assert result.read_bytes() == (tmp_path / "whole").read_bytes()
