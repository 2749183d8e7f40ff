"""The commands as a person runs them: what they write, what they say, and how they refuse."""

import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from analysis import saving
from analysis.curvature import spectrum
from analysis.curvature.operators import CurvatureOperator
from analysis.landscape.evaluation import Evaluator
from models import load_checkpoint, load_dataset
from models.train import Options, untrained

COMMANDS = {
    "models.train": "models.train",
    "analysis.hessian": "analysis.hessian",
    "analysis.landscape": "analysis.landscape.__main__",
    "analysis.nll": "analysis.nll",
    "analysis.figures": "analysis.figures",
    "analysis.published": "analysis.published",
}
SMALL = {
    "analysis.hessian": [
        "--k",
        "2",
        "--batches",
        "2",
        "--density-batches",
        "2",
        "--probes",
        "2",
        "--steps",
        "4",
    ],
    "analysis.landscape": ["--batches", "1", "--points", "3", "--line-points", "5", "--lines", "2"],
    "analysis.nll": [],
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two trained-looking checkpoints, to work in."""
    monkeypatch.chdir(tmp_path)
    for window in (3, 8):
        out = Path(f"checkpoints/csan{window}.pt")
        start = untrained(
            Options(out=out, window=window, dim=6, depth=1), load_dataset("digits").first(40)
        )
        names = ("train_nll", "train_error", "test_nll", "test_error")
        start.history.update(epoch=[0.0], **{name: [0.5] for name in names})
        replace(start, epoch=start.recipe.epochs).save(out)
    return tmp_path


@pytest.fixture
def call(call_module):
    def call(command, *arguments):
        return call_module(importlib.import_module(COMMANDS[command]), *arguments)

    return call


def snapshot(folder):
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.suffix != ".lock"
    }


@pytest.mark.parametrize("command", SMALL)
def test_names_the_files_it_writes_and_reuses_what_is_there(here, call, command):
    code, out, _ = call(command, *SMALL[command])
    assert code == 0
    written = [Path(line.split()[-1]) for line in out.splitlines() if line.startswith("wrote")]
    assert written
    assert set(written) == set(Path("figures").iterdir())
    for window in (3, 8):
        with h5py.File(f"checkpoints/csan{window}.h5") as file:
            assert command.split(".")[1] in file or "history" in file
    before = {p: c for p, c in snapshot(here).items() if p.suffix == ".h5"}
    code, out, _ = call(command, *SMALL[command])
    assert code == 0
    assert {p: c for p, c in snapshot(here).items() if p.suffix == ".h5"} == before
    if command != "analysis.nll":
        assert "is there already; --force" in out
        call(command, *SMALL[command], "--force")
        assert {p: c for p, c in snapshot(here).items() if p.suffix == ".h5"} != before


def test_nll_tells_of_how_many_seeds_a_number_is(here, call):
    for seed in (1, 2):
        out = Path(f"checkpoints/seed{seed}/csan3.pt")
        content = load_checkpoint("checkpoints/csan3.pt")
        replace(content, seed=seed).save(out)
    everything = ("--ckpt", *map(str, Path("checkpoints").rglob("*.pt")))
    code, out, _ = call("analysis.nll", *everything, "--history-only")
    assert code == 0
    assert all(set(h5py.File(path)) == {"history"} for path in Path("checkpoints").rglob("*.h5"))
    (row,) = (line for line in out.splitlines() if " 3×3 " in line)
    assert row.split()[:7] == ["digits", "3×3", "60", "3", "0.5000", "±", "0.0000"]
    assert row.split()[10:12] == ["–", "–"]
    call("analysis.nll", "--ckpt", "checkpoints/csan3.pt", "checkpoints/seed1/csan3.pt")
    code, out, _ = call("analysis.nll", *everything, "--history-only")
    (row,) = (line for line in out.splitlines() if " 3×3 " in line)
    with h5py.File("checkpoints/csan3.h5") as file:
        assert f"{file['objective/nll'][()]:.4f} ± 0.0000 (n = 2)" in row
        options = json.loads(file["objective"].attrs["options"])
    assert options == {"seed": 0, "batch_size": content.recipe.batch_size}


def test_hessian_stores_what_the_measurement_is_worth(here, call):
    call("analysis.hessian", "--ckpt", "checkpoints/csan3.pt", *SMALL["analysis.hessian"])
    with h5py.File("checkpoints/csan3.h5") as file:
        group = file["hessian/train"]
        assert group["eigenvalues"].shape == (2, 2)
        assert group["residuals"].shape == (2, 2)
        assert group["converged"][()].all()
        assert group["check/symmetry"][()] <= group["check/tolerance"][()]
        assert group["check/finite_difference"][()] <= group["check/tolerance"][()]
        assert json.loads(group.attrs["options"])["seed"] == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_neither_torch_nor_matplotlib(command):
    program = (
        "import runpy, sys; sys.argv = ['x', '--help']; sys.path.insert(0, '.')\n"
        f"try: runpy.run_module({command!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python -m {command}" in done.stdout


def test_nan_weights_give_nan_and_say_so(here, call):
    path = Path("checkpoints/csan3.pt")
    checkpoint = load_checkpoint(path)
    with torch.no_grad():
        checkpoint.model.head.weight[0, 0] = torch.nan
    checkpoint.save(path)
    code, out, _ = call("analysis.hessian", "--ckpt", path, *SMALL["analysis.hessian"])
    assert code == 0
    assert "csan3: not a number" in out
    with h5py.File("checkpoints/csan3.h5") as file:
        assert np.isnan(file["hessian/train/eigenvalues"]).all()
        assert np.isnan(file["hessian/train/nep"])
    code, out, _ = call("analysis.landscape", "--ckpt", path, *SMALL["analysis.landscape"])
    assert code == 0
    assert "csan3: not a number at 9 of 9 points" in out
    with h5py.File("checkpoints/csan3.h5") as file:
        assert np.isnan(file["landscape/train/line/nll"]).all()


def spoil(path, **changes):
    content = torch.load(path, weights_only=True)
    torch.save(content | changes, path)


HESSIAN = "analysis.hessian"
BAD = {
    "truncated checkpoint": (HESSIAN, "--ckpt truncated.pt", "truncated.pt: not a checkpoint"),
    "missing checkpoint": (HESSIAN, "--ckpt none.pt", "none.pt: there is no such file"),
    "not a checkpoint": (HESSIAN, "--ckpt text.h5", "text.h5: not a checkpoint"),
    "unknown dataset": (HESSIAN, "--ckpt unknown.pt", "dataset: nowhere is neither"),
    "no eigenvalues": (HESSIAN, "--k 0", "k: 0 found, expected at least 1"),
    "too many eigenvalues": (HESSIAN, "--k 99999 --batches 4", "k: 99999"),
    "no memory": (HESSIAN, "--memory nan", "memory: nan found, expected 0 GiB or more"),
    "no mini-batches": (HESSIAN, "--batches 0", "batches: 0 found, expected at least 1"),
    "no images": (HESSIAN, "--batch-size 0", "batch-size: 0 found, expected at least 1"),
    "not a number": (HESSIAN, "--k five", "--k"),
    "unknown option": (HESSIAN, "--kk 5", "--kk"),
    "unknown device": (HESSIAN, "--device tpu", "'tpu'.*--device.*'auto', 'cpu', 'cuda'"),
    "no GPU": (HESSIAN, "--device cuda", "device: cuda found, but PyTorch sees no GPU"),
    "folder is a file": (HESSIAN, "--out text.h5", "out: text.h5 found, expected a folder"),
    "no points": ("analysis.landscape", "--points 1", "points: 1 found, expected at least 3"),
    "no checkpoints": ("analysis.nll", "--ckpt none.pt", "none.pt: there is no such file"),
    "no measurements": ("analysis.figures", "--measurements empty", "no HDF5 file in empty"),
    "damaged measurements": ("analysis.figures", "--measurements .", "text.h5: not a usable"),
    "no output": ("models.train", "", "--out"),
    "no window": ("models.train", "--out new.pt --window 0", "window: 0 .*at least 1"),
    "negative window": ("models.train", "--out new.pt --window -3", "window: -3 .*at least 1"),
    "head window": ("models.train", "--out new.pt --head-window 4", "head_window: 4 .*heads = 3"),
    "border": ("models.train", "--out new.pt --border wrap", "border: 'wrap' .*'clamp'"),
    "dataset": ("models.train", "--out new.pt --dataset nowhere", "dataset: nowhere is neither"),
    "foreign dataset": (
        "models.train",
        "--out new.pt --dataset text.h5",
        "text.h5: not a usable",
    ),
    "empty dataset": ("models.train", "--out new.pt --dataset no.h5", "no dataset /train/"),
    "preset": ("models.train", "--out new.pt --preset none", "preset: 'none' is unknown"),
    "no suffix": ("models.train", "--out new", "out: new found, expected a name that ends in .pt"),
    "negative seed": ("models.train", "--out new.pt --seed -1", "seed: -1 found"),
    "snapshots": ("models.train", "--out new.pt --snapshots 999", "snapshots: 999 found"),
    "other training": ("models.train", "--out checkpoints/csan3.pt", "trained with other options"),
    "even points": ("analysis.landscape", "--points 4", "points: 4 found, expected an odd number"),
    "no span": ("analysis.landscape", "--span 0", "span: 0.0 found, expected a positive step"),
    "no other": (
        "analysis.landscape",
        "--directions plane --towards checkpoints/csan8.pt",
        "towards: 1 checkpoints found, expected 2 for --directions plane",
    ),
    "other architecture": (
        "analysis.landscape",
        "--ckpt checkpoints/csan3.pt --directions towards --towards checkpoints/csan8.pt",
        "towards: checkpoints/csan8.pt is another architecture than checkpoints/csan3.pt",
    ),
    "no snapshots": (
        "analysis.landscape",
        "--ckpt checkpoints/csan3.pt --directions pca",
        "csan3: 0 snapshots found, expected at least 2",
    ),
    "no surfaces": ("analysis.published", "", "csv"),
    "other file": ("analysis.published", "text.h5", "text.h5: could not convert"),
    "more of density": (HESSIAN, "--batches 2 --density-batches 3", "density-batches: 3 found"),
    "epochs": ("models.train", "--out new.pt --epochs 2", "epochs: 2 found"),
    "too many images": ("models.train", "--out new.pt --images 9999", "images: 9999 found"),
    "unwritable": ("models.train", "--out text.h5/new.pt --images 40", "text.h5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(here, call, case):
    command, arguments, complaint = BAD[case]
    whole = Path("checkpoints/csan3.pt").read_bytes()
    Path("truncated.pt").write_bytes(whole[: len(whole) // 2])
    Path("unknown.pt").write_bytes(whole)
    spoil("unknown.pt", dataset="nowhere")
    Path("text.h5").write_text("not HDF5")
    h5py.File("no.h5", "w").close()
    if "unknown.pt" not in arguments:
        Path("unknown.pt").unlink()
    before = snapshot(here)
    code, out, err = call(command, *arguments.split())
    assert code == 2
    assert re.fullmatch(f"error: [^\n]*{complaint}[^\n]*\n", err)
    assert "Traceback" not in out
    assert snapshot(here) == before


def test_landscape_goes_on_where_it_was_interrupted(here, call, monkeypatch):
    """Ctrl-C in the middle of a surface, then the same command: as if nothing had happened."""
    arguments = ["--ckpt", "checkpoints/csan3.pt", *SMALL["analysis.landscape"]]
    call("analysis.landscape", *arguments)
    with h5py.File("checkpoints/csan3.h5") as file:
        whole = file["landscape/train/surface/nll"][()]
    Path("checkpoints/csan3.h5").unlink()

    evaluate, calls = Evaluator.__call__, []

    def interrupted(self, weights):
        calls.append(time.monotonic())
        if len(calls) == 7:
            raise KeyboardInterrupt
        return evaluate(self, weights)

    monkeypatch.setattr(Evaluator, "__call__", interrupted)
    code, _, err = call("analysis.landscape", *arguments)
    assert code == 130
    assert "what has been saved is kept" in err
    code, out, _ = call("analysis.landscape", *arguments)
    assert code == 0
    assert "was interrupted; going on from there" in out
    # The lines of training, test and two more directions, the surface, the interruption again.
    assert len(calls) == 4 * 5 + 9 + 1
    with h5py.File("checkpoints/csan3.h5") as file:
        np.testing.assert_array_equal(file["landscape/train/surface/nll"], whole)


@pytest.mark.parametrize(
    ("directions", "kind", "name", "repeated"),
    [
        ("eigenvectors", CurvatureOperator, "__matmul__", 1 + 7),  # and the self-check
        ("bezier --towards checkpoints/other.pt", Evaluator, "value_and_gradient", 1),
        ("towards --towards checkpoints/other.pt", Evaluator, "__call__", 1),
    ],
)
def test_landscape_goes_on_while_directions_are_found(
    here, call, monkeypatch, directions, kind, name, repeated
):
    monkeypatch.setattr(saving, "SAVE_EVERY", 0.0)
    other = load_checkpoint(Path("checkpoints/csan3.pt"))
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.1)
    other.save(Path("checkpoints/other.pt"))
    arguments = ["--ckpt", "checkpoints/csan3.pt", *SMALL["analysis.landscape"]]
    arguments += f"--directions {directions}".split()
    original, calls = getattr(kind, name), []

    def counted(*arguments):
        calls.append(1)
        if len(calls) in interruptions:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(kind, name, counted)
    interruptions = ()
    assert call("analysis.landscape", *arguments)[0] == 0
    needed = len(calls)
    whole = contents("checkpoints/csan3.h5")
    Path("checkpoints/csan3.h5").unlink()
    calls.clear()
    interruptions = (8, 16)
    for code in (130, 130, 0):
        assert call("analysis.landscape", *arguments)[0] == code
    assert len(calls) == needed + len(interruptions) * repeated
    assert contents("checkpoints/csan3.h5") == whole


def contents(path):
    """The bytes of all arrays."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda key, item: found.update({key: item}))
        return {k: v[()].tobytes() for k, v in found.items() if isinstance(v, h5py.Dataset)}


def test_hessian_goes_on_where_it_was_interrupted(here, call, monkeypatch):
    arguments = ["--ckpt", "checkpoints/csan3.pt", *SMALL["analysis.hessian"], "--batches", "4"]
    call("analysis.hessian", *arguments)
    measured = Path("checkpoints/csan3.h5")
    with h5py.File(measured) as file:
        whole = {key: file["hessian/train"][key][()] for key in ("eigenvalues", "matvecs", "trace")}
    measured.unlink()
    start, calls = spectrum.start, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return start(*arguments)

    monkeypatch.setattr(spectrum, "start", interrupted)
    code, _, err = call("analysis.hessian", *arguments)
    assert code == 130
    assert "what has been saved is kept" in err
    with h5py.File(measured) as file:
        assert file["unfinished/hessian/train/done"][()].tolist() == [True, True, False, False]
    code, out, _ = call("analysis.hessian", *arguments)
    assert code == 0
    assert "was interrupted; going on from there" in out
    assert len(calls) == 4  # the second, interrupted, and again; the third
    with h5py.File(measured) as file:
        assert "unfinished/hessian/train" not in file
        for key, array in whole.items():
            np.testing.assert_array_equal(file["hessian/train"][key], array)


def test_landscape_killed_ten_times_gives_the_same_bytes(here, call, monkeypatch):
    """At random moments, with progress saved after every point."""
    arguments = ["--ckpt", "checkpoints/csan3.pt", "--points", "7", "--line-points", "7"]
    arguments += ["--lines", "1", "--batches", "2"]
    call("analysis.landscape", *arguments)
    measured = Path("checkpoints/csan3.h5")
    with h5py.File(measured) as file:
        whole = {}
        group = file["landscape/train"]
        group.visit(lambda key: whole.__setitem__(key, group[key]))
        whole = {k: v[()].tobytes() for k, v in whole.items() if isinstance(v, h5py.Dataset)}
    measured.unlink()
    rng = np.random.default_rng(0)
    monkeypatch.setattr(saving, "SAVE_EVERY", 0.0)
    fork = multiprocessing.get_context("fork")
    for _ in range(10):
        process = fork.Process(target=call, args=["analysis.landscape", *arguments])
        process.start()
        seen = progress_of(measured)
        wanted = seen + int(rng.integers(1, 7))
        while progress_of(measured) < wanted:
            assert process.is_alive(), "was to be killed before it is done"
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.05)))  # also in the middle of saving
        process.kill()
        process.join()
        assert progress_of(measured) >= wanted, "what was saved is lost"
    assert call("analysis.landscape", *arguments)[0] == 0
    with h5py.File(measured) as file:
        assert "unfinished/landscape/train" not in file
        group = file["landscape/train"]
        assert {key: group[key][()].tobytes() for key in whole} == whole


def progress_of(path):
    """Points that the file says are done."""
    if not path.exists():
        return 0
    done = []

    def count(key, item):
        if key.endswith("/done"):
            done.append(item[()].sum())

    with h5py.File(path) as file:
        file.visititems(count)
    return int(sum(done))
