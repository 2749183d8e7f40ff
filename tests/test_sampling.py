import pickle
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lossgeometry import line, random_directions, surface
from lossgeometry.errors import InputError
from lossgeometry.running import saving
from lossgeometry.running.distributed import ALONE, Team
from tests.teams import run_team


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(50, 4, generator=generator), torch.arange(50) % 3


def measured(team: Team, adaptive: float | None) -> tuple[bytes, dict[str, Any], int]:
    """Bytes and attributes of a surface, and how many of its points this process evaluated."""
    network, axis, own = model(), np.linspace(-1, 1, 9), []

    def nll(outputs: Tensor, targets: Tensor) -> Tensor:
        own.append(1)
        return F.cross_entropy(outputs, targets)

    found = surface(
        network,
        {"nll": nll},
        data(),
        random_directions(network, seed=0),
        axis,
        axis,
        adaptive=adaptive,
        team=team,
    )
    return found["nll"].tobytes() + found.evaluated.tobytes(), found.settings, sum(own)


@pytest.mark.parametrize("adaptive", [None, 0.2])
def test_a_team_shares_the_points_and_changes_no_bit(
    tmp_path: Path, adaptive: float | None
) -> None:
    values, attributes, evaluations = measured(ALONE, adaptive)
    shared = run_team(3, measured, adaptive, folder=tmp_path)
    assert [s[:2] for s in shared] == [(values, attributes)] * 3
    assert sum(s[2] for s in shared) == evaluations


def failing(team: Team, begun: Path) -> tuple[str, int]:
    """The error, and the number of points saved, of a line that one process cannot evaluate."""
    saved: list[int] = []
    points: list[int] = []

    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        points.append(1)
        if team.rank == 1:
            while not begun.exists():
                time.sleep(0.001)
            raise InputError("targets: unusable")
        if len(points) > 1:  # one is done
            begun.touch()
        time.sleep(0.001)
        return outputs.mean()

    network = model()
    (direction,) = random_directions(network, 1, seed=0)
    with pytest.raises(InputError) as error:
        line(
            network,
            {"fails": fails},
            data(),
            direction,
            np.arange(500.0),
            team=team,
            save=lambda begun: saved.append(len(begun.evaluated)),
        )
    return str(error.value), len(saved)


def test_an_exception_in_one_process_is_raised_in_all_and_the_first_saves(tmp_path: Path) -> None:
    assert run_team(2, failing, tmp_path / "begun", folder=tmp_path) == [
        ("targets: unusable", 1),
        ("targets: unusable", 0),
    ]


def test_an_adaptive_surface_goes_on_anywhere_with_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(saving, "SAVE_EVERY", 0)
    network, axis = model(), np.linspace(-1, 1, 15)
    directions = random_directions(network, seed=0)
    what = (network, {"nll": F.cross_entropy}, data(), directions, axis, axis)
    computed = partial(surface, *what, weight_decay=0.1, adaptive=0.1)
    saved: list[bytes] = []
    whole = computed(save=lambda begun: saved.append(pickle.dumps(begun)))
    assert len(saved) == whole.evaluated.sum() < axis.size**2
    for begun in saved[::4]:
        found = computed(resume=pickle.loads(begun))
        assert all(found[name].tobytes() == whole[name].tobytes() for name in ("nll", "l2"))
