"""One thread for each worker of pytest-xdist: more of them only wait for each other."""

import os
import sys

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import pytest
import torch
from hypothesis import settings

from models.cli import run

settings.register_profile("suite", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("suite")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def call_module(monkeypatch, capfd):
    def call(module, *arguments):
        """Exit code, standard output and standard error of a command, run in this process."""
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        try:
            run(module.main, module.Options)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return call
