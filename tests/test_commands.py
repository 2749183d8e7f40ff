"""The commands as a person runs them: what they write, what they say, and how they refuse."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from models import load_checkpoint
from tests.commands import COMMANDS, SMALL


def snapshot(folder):
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.suffix != ".lock"
    }


@pytest.mark.parametrize("command", SMALL)
def test_names_the_files_it_writes_and_reuses_what_is_there(here, call, request, command):
    if command != "analysis.hessian":  # one is drawn as it is for a person
        request.getfixturevalue("unrendered")
    code, out, _ = call(command, *SMALL[command])
    assert code == 0
    written = [Path(line.split()[-1]) for line in out.splitlines() if line.startswith("wrote")]
    assert written
    assert set(written) == set(Path("figures").iterdir())
    for window in (3, 8):
        with h5py.File(f"checkpoints/csan{window}.h5") as file:
            assert command.split(".")[1] in file or "history" in file
    before = {p: c for p, c in snapshot(here).items() if p.suffix == ".h5"}
    request.getfixturevalue("unrendered")
    code, out, _ = call(command, *SMALL[command])
    assert code == 0
    assert {p: c for p, c in snapshot(here).items() if p.suffix == ".h5"} == before
    if command != "analysis.nll":
        assert "is there already; --force" in out
        call(command, *SMALL[command], "--force")
        assert {p: c for p, c in snapshot(here).items() if p.suffix == ".h5"} != before


def test_a_hessian_says_what_it_is_worth_and_is_replaced_only_when_asked_for(
    here, call, unrendered
):
    arguments = ["--ckpt", "checkpoints/csan3.pt", *SMALL["analysis.hessian"]]
    call("analysis.hessian", *arguments)
    with h5py.File("checkpoints/csan3.h5") as file:
        group = file["hessian/train"]
        assert group["eigenvalues"].shape == (2, 2)
        assert group["residuals"].shape == (2, 2)
        assert group["converged"][()].all()
        assert group["check/symmetry"][()] <= group["check/tolerance"][()]
        assert group["check/finite_difference"][()] <= group["check/tolerance"][()]
        assert json.loads(group.attrs["options"])["seed"] == 0
    before = snapshot(here)
    code, _, err = call("analysis.hessian", *arguments, "--k", "1", "--tol", "0.1")
    assert code == 2
    assert re.fullmatch(
        "error: checkpoints/csan3.h5:/hessian/train: measured with k 2, tol 0.001, "
        "asked for k 1, tol 0.1; expected --force[^\n]*\n",
        err,
    )
    assert snapshot(here) == before
    assert call("analysis.hessian", *arguments, "--k", "1", "--force")[0] == 0


def test_nll_tells_of_how_many_seeds_a_number_is(here, call, unrendered):
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


def test_help_needs_neither_torch_nor_matplotlib():
    program = (
        "import runpy, sys; sys.argv = ['x', '--help']; sys.path.insert(0, '.')\n"
        f"for command in {COMMANDS}:\n"
        "    try: runpy.run_module(command, run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"usage: python -m {command}" in done.stdout
    assert "default: None" not in done.stdout


def test_the_version_is_said(call):
    code, out, _ = call("analysis.hessian", "--version")
    assert (code, out) == (0, f"locality-landscapes {metadata.version('locality-landscapes')}\n")


STORED = ("analysis.hessian", "analysis.landscape", "analysis.nll", "analysis.robustness")


def test_what_is_stored_is_found_and_drawn_without_torch(tmp_path, folder):
    given = dict.fromkeys(STORED, ("--ckpt", "checkpoints/csan8.pt"))
    given["analysis.figures"] = ("--measurements", str(folder))
    program = (
        "import runpy, sys, analysis.drawing\n"
        "analysis.drawing.render = lambda figure, path, extension: path.touch()  # takes longest\n"
        f"for command, arguments in {given}.items():\n"
        f"    sys.argv = [command, *arguments, '--out', {str(tmp_path)!r} + '/' + command]\n"
        "    runpy.run_module(command, run_name='__main__', alter_sys=True)\n"
        "assert not {'torch', 'torchvision', 'sklearn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("is there already") == 3
    drawn = [path.name for path in tmp_path.glob("analysis.*/*")]
    assert len(drawn) == done.stdout.count("wrote ") > 40
    assert {"hessian_csan8.png", "landscape_digits_surfaces.png", "nll_digits.png"} <= set(drawn)


def test_nan_weights_have_a_spectrum_of_nan_and_no_landscape(here, call, unrendered):
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
    before = Path("checkpoints/csan3.h5").read_bytes()
    for directions in ("random", "gradient", "eigenvectors"):
        how = (*SMALL["analysis.landscape"], "--directions", directions)
        code, _, error = call("analysis.landscape", "--ckpt", path, *how)
        assert code == 2
        assert f"{path}: 1 of " in error
        assert "not finite, expected finite weights" in error
        assert error.count("\n") == 1
    assert Path("checkpoints/csan3.h5").read_bytes() == before


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
    "unknown option": (HESSIAN, "--kk 5", "--kk: there is no such option, expected --k"),
    "mistyped option": ("models.train", "--windw 3", "--windw: .* expected --window"),
    "no value": (HESSIAN, "--ckpt --k 3", "ckpt: no value found, expected at least one"),
    "a folder": (HESSIAN, "--ckpt checkpoints", "checkpoints: a folder, expected the file of a"),
    "other weights": (HESSIAN, "--ckpt state.pt", "state.pt: its format is None, .*--model names"),
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
    torch.save({"weight": torch.ones(2)}, "state.pt")
    if "unknown.pt" not in arguments:
        Path("unknown.pt").unlink()
    before = snapshot(here)
    code, out, err = call(command, *arguments.split())
    assert code == 2
    assert re.fullmatch(f"error: [^\n]*{complaint}[^\n]*\n", err)
    assert "Traceback" not in out
    assert snapshot(here) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("directions", ["pca", "towards", "bezier"])
def test_weights_that_are_not_finite_are_named(here, call, value, directions):
    spoilt = Path("checkpoints/csan3/epoch000.pt")
    whole = load_checkpoint("checkpoints/csan3.pt")
    for epoch in (0, 1):
        replace(whole, epoch=epoch).save(spoilt.with_name(f"epoch00{epoch}.pt"))
    with torch.no_grad():
        next(whole.model.parameters()).view(-1)[0] = value
    replace(whole, epoch=0).save(spoilt)
    extra = [] if directions == "pca" else ["--towards", spoilt]
    arguments = ["--ckpt", "checkpoints/csan3.pt", "--directions", directions, *extra]
    code, _, err = call("analysis.landscape", *arguments)
    assert code == 2
    assert err.startswith(f"error: {spoilt}: 1 of ")
    assert err.count("\n") == 1
