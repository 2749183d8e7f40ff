"""Teams: the same results on every process, whoever is slow, has nothing to do, or fails."""

import os
import time
from pathlib import Path

import pytest
import torch

from lossgeometry.errors import InputError
from lossgeometry.running.distributed import ALONE, Team, join
from tests.teams import run_team

SIZE = 3


class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("not for travelling")


def fails(error):
    raise error


def slowly(team):
    """Work on 10 things, one of which takes rank 0 until all others are done."""

    def wait_for(condition):
        while not condition():
            time.sleep(0.001)

    def work(i):
        if team.rank == 0:
            Path("begun").touch()
            wait_for(lambda: len(list(Path().glob("done*"))) == 9)
        else:
            wait_for(Path("begun").exists)
            Path(f"done{i}").touch()
        return i, team.rank

    return work


def caught(function, *arguments):
    try:
        return list(function(*arguments))
    except Exception as error:
        return repr(error)


def attempts(team, folder):
    """Everything that a team can do, in one go: ``{what: result}``."""
    os.chdir(folder)
    assert join("cpu") is team
    found = {"team": (team.size, team.rank)}
    found["sum"] = team.sum_(torch.arange(4.0) + team.rank).tolist()
    found["shards"] = [team.shard(n) for n in (0, 2, 3, 10)]
    found["collect"] = [
        team.collect(torch.arange(n)[team.shard(n)].double() ** 2, n).tolist() for n in (2, 10)
    ]
    found["uneven"] = list(team.share(10, slowly(team)))
    found["few"] = list(team.share(1, lambda i: i + 0.5))
    found["none"] = list(team.share(0, lambda i: i))
    found["many"] = list(team.share(40, lambda i: i**2))
    wrong = InputError("images: none found")
    # Whoever takes number 2 fails.
    found["error"] = caught(team.share, 5, lambda i: fails(wrong) if i == 2 else i)[-40:]
    found["odd error"] = caught(team.share, 1, lambda i: fails(Unpicklable("odd")))
    found["first"] = team.first(lambda: ("by", team.rank))
    found["first fails"] = caught(team.first, lambda: fails(wrong))
    big = team.first(lambda: torch.arange(5_000_000))  # more than the store takes
    found["big"] = int(big.sum())
    found["after"] = list(team.share(2, lambda i: -i))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of three processes has found."""
    folder = tmp_path_factory.mktemp("team")
    return run_team(SIZE, attempts, folder, folder=folder)


def test_everyone_gets_the_same_results(found):
    assert [f.pop("team") for f in found] == [(SIZE, rank) for rank in range(SIZE)]
    shards = [f.pop("shards") for f in found]
    for n, pieces in zip((0, 2, 3, 10), zip(*shards, strict=True), strict=True):
        assert [i for piece in pieces for i in range(n)[piece]] == list(range(n))
        sizes = [len(range(n)[piece]) for piece in pieces]
        assert max(sizes) - min(sizes) <= 1
    assert found[0] == found[1] == found[2]


def test_sums_and_collections(found):
    assert found[0]["sum"] == [3, 6, 9, 12]
    assert found[0]["collect"] == [[0, 1], [i**2 for i in range(10)]]


def test_a_slow_process_does_not_hold_up_the_others(found):
    assert sorted(i for i, _ in found[0]["uneven"]) == list(range(10))
    by = [rank for _, (_, rank) in found[0]["uneven"]]
    assert by.count(0) == 1
    # Each of the two others may be about to hand in one more thing that it has done.
    assert by.index(0) >= 10 - 1 - 2


def test_shares_in_a_row_and_with_less_to_do_than_processes(found):
    assert found[0]["few"] == [(0, 0.5)]
    assert found[0]["none"] == []
    assert sorted(found[0]["many"]) == [(i, i**2) for i in range(40)]
    assert sorted(found[0]["after"]) == [(0, 0), (1, -1)]


def test_an_exception_in_one_process_is_raised_in_all(found):
    assert found[0]["error"] == "InputError('images: none found')"
    assert found[0]["odd error"] == "RuntimeError('Unpicklable: odd')"
    assert found[0]["first fails"] == "InputError('images: none found')"


def test_what_the_first_makes_is_everyones(found):
    assert found[0]["first"] == ("by", 0)
    assert found[0]["big"] == sum(range(5_000_000))


def test_alone_all_of_it_is_trivial():
    tensor = torch.randn(5)
    assert ALONE.sum_(tensor) is tensor
    assert ALONE.collect(tensor, 5) is tensor
    assert tensor[ALONE.shard(5)].tolist() == tensor.tolist()
    assert list(ALONE.share(3, lambda i: i**2)) == [(0, 0), (1, 1), (2, 4)]
    assert ALONE.first(lambda: 7) == 7
    assert join("cpu") is ALONE
    with pytest.raises(InputError, match="none"):
        list(Team().share(1, lambda i: fails(InputError("none"))))
