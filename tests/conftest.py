"""One thread for each worker of pytest-xdist: more of them only wait for each other."""

import gc
import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import pytest
import torch
from hypothesis import settings
from selenium import webdriver

from models import load_dataset
from models.cli import run
from models.train import Options, untrained
from tests.measured import write_study

settings.register_profile("suite", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("suite")
torch.set_num_threads(1)


def pytest_collection_finish():
    """What is imported by now stays, and is not looked through whenever memory is short."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _alike() -> Iterator[None]:
    """What went before, in this worker, decides no random number and is in no picture."""
    torch.manual_seed(0)
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.fixture
def call_module(monkeypatch, capfd):
    def call(module, *arguments):
        """Exit code, standard output and standard error of a command, run in this process."""
        monkeypatch.setattr("analysis.spectra.TRACE_MATVECS", 6)  # of 60
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        try:
            run(module.main, module.Options)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Two trained-looking ones in a folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for window in (3, 8):
        out = folder / f"csan{window}.pt"
        start = untrained(
            Options(out=out, window=window, dim=6, depth=1), load_dataset("digits").first(40)
        )
        names = ("train_nll", "train_error", "test_nll", "test_error")
        start.history.update(epoch=[0.0], **{name: [0.5] for name in names})
        replace(start, epoch=start.recipe.epochs).save(out)
    return folder


@pytest.fixture
def here(checkpoints, tmp_path, monkeypatch):
    """A folder to work in, with two checkpoints."""
    shutil.copytree(checkpoints, tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(call_module):
    def call(command, *arguments):
        return call_module(importlib.import_module(command), *arguments)

    return call


@pytest.fixture
def unrendered(monkeypatch):
    """Figures are composed and named, but rendering them, which takes longest, is left out."""
    monkeypatch.setattr("analysis.drawing.render", lambda figure, path, extension: path.touch())


@pytest.fixture
def threads():
    """Choose how many threads PyTorch has, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def measurements(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "checkpoints"
    write_study(folder)
    return folder


@pytest.fixture
def folder(measurements, tmp_path):
    """Of measurements, to draw or to change."""
    return Path(shutil.copytree(measurements, tmp_path / "checkpoints"))


@pytest.fixture
def browser(driver):
    """A real one, as it was at first after each test."""
    yield driver
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[]))
    driver.get("about:blank")  # or its pictures in motion go on


@pytest.fixture(scope="session")
def driver():
    """Of a real browser without a window, and without a network."""
    programs = [shutil.which("chromium") or shutil.which("chrome"), shutil.which("chromedriver")]
    if not all(programs):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("headless", "no-sandbox", "disable-background-networking", "window-size=900,800"):
        options.add_argument(f"--{flag}")
    options.add_argument("--enable-unsafe-swiftshader")  # WebGL without a graphics card
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()
