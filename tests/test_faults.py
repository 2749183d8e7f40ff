"""A small part of ``python -m tests.faults``: every fault, once, with fixed seeds."""

import pytest

from tests.faults.trial import Trial


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return Trial(0, tmp_path_factory.mktemp("faults"), ["train", "nll"])


@pytest.mark.parametrize("command", ["train", "nll"])
def test_nothing_is_lost_by_kills(trial, command):
    trial.kills(command, 4)
    check(trial)


@pytest.mark.parametrize("fault", ["failing_calls", "small_disk", "damage", "images_written"])
def test_failing_systems_and_damaged_files(trial, fault):
    for command in trial.commands:
        getattr(trial, fault)(command, 1)
    check(trial)


@pytest.mark.parametrize("fault", ["held_lock", "little_memory", "two_at_once", "clock"])
def test_sharing_and_shortage(trial, fault):
    getattr(trial, fault)("nll", 2 if fault == "held_lock" else 1)
    check(trial)


@pytest.mark.parametrize("command", ["train", "nll"])
def test_a_dataset_that_changes_under_a_run(trial, command):
    trial.other_images(command, 1)
    check(trial)


def check(trial):
    assert not [problem for problems in trial.wrong.values() for problem in problems]
