"""What holds whenever something is refused: no code runs, little memory is taken."""

import os
import resource
import tracemalloc
from pathlib import Path

import pytest

from lossgeometry import InputError
from tests.hostile import MEBIBYTE


@pytest.fixture
def little_memory():
    """Whatever is done takes no hundred mebibytes, resident or allocated by Python."""
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert grown < 100 * MEBIBYTE
    assert peak < 100 * MEBIBYTE


@pytest.fixture
def refused(tmp_path, monkeypatch, little_memory):
    """Writes a file, has it read, and returns the one line that refuses it."""
    monkeypatch.chdir(tmp_path)

    def refuse(read, name, content):
        Path(name).write_bytes(content)
        with pytest.raises(InputError) as error:
            read(Path(name))
        assert os.listdir() == [name], "nothing else is written, no code has run"
        assert Path(name).read_bytes() == content
        assert str(error.value).startswith(f"{name}: ")
        assert "\n" not in str(error.value)
        return str(error.value)

    return refuse
