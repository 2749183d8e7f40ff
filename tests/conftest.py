import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("suite")
torch.set_num_threads(1)  # pytest-xdist runs one worker per core


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
