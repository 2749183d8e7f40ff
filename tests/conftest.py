"""One thread for each worker of pytest-xdist: more of them only wait for each other."""

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("suite")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
