"""A study from nothing to its claims: planned, killed, resumed, skipped, and refused."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import pytest

from analysis import execution, study
from analysis.cost import cost_of
from analysis.execution import end_with_parent
from analysis.plan import load_plan
from lossgeometry import InputError
from models.description import token_range
from models.networks import count_parameters
from models.recipes import PRESETS
from models.train import alone, train_all

FORK = multiprocessing.get_context("fork")
TINY = """
folder = "checkpoints"
threads = 1

[train]
dim = 6
depth = 1
epochs = 6
images = 64

[[grid]]
window = 3
seed = [0]
out = "checkpoints/csan{window}.pt"

[[grid]]
window = [8]
seed = 0
out = "checkpoints/more/csan{window}.pt"
measure = ["nll"]

[[measure]]
command = "nll"

[[measure]]
command = "hessian"
k = 1
batches = 2
density_batches = 1
probes = 2
steps = 2
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("studies").mkdir()
    Path("studies/tiny.toml").write_text(TINY)
    return tmp_path


@pytest.fixture
def call(call_module):
    return partial(call_module, study)


def written(folder):
    """What is there, and when it was written."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.suffix in (".pt", ".h5")}


@pytest.fixture(scope="module", autouse=True)
def importable():
    """The commands are found from any folder."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.getcwd()
    yield
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


def test_killed_and_resumed_from_nothing_to_the_claims(here, call, unrendered):
    state = here / "checkpoints/csan3/resume.pt"
    process = FORK.Process(target=call, args=["tiny"])
    process.start()
    while process.is_alive() and not state.exists():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert state.exists()
    assert not Path("checkpoints/csan3.pt").exists()

    train_all([load_plan("tiny").trainings[1].options], math.inf)
    code, out, err = call("tiny", "--processes", "2", "--only", "train")
    assert code == 0, err
    assert "1 of 2 trainings are there already" in out
    code, out, err = call("tiny")
    assert code == 0, err
    assert all((here / "checkpoints" / name).exists() for name in ("csan3.pt", "more/csan8.pt"))
    assert not state.exists()
    for name in ("csan3", "csan3/epoch005"):
        with h5py.File(f"checkpoints/{name}.h5") as file:
            options = json.loads(file["hessian/train"].attrs["options"])
            assert (options["k"], options["batches"]) == (1, 2)
    with h5py.File("checkpoints/more/csan8.h5") as file:
        assert set(file) == {"history", "outcomes", "objective"}  # no spectra were asked of it
    assert {p.name for p in Path("figures").iterdir()} >= {
        *("nll_digits-64.png", "windows_digits-64.png", "hessian_csan3.png")
    }
    assert re.search(r"C1  global attention is harder to optimise", out)

    # Everything is there; without the weights too, as long as all that is asked was measured.
    with h5py.File("checkpoints/more/csan8.h5", "a") as file:
        del file["objective"]
    assert [t.state() for t in load_plan("tiny").trainings] == ["done", "trained"]
    Path("checkpoints/more/csan8.pt").unlink()  # now it would take another training
    before = written(here)
    code, out, _ = call("tiny")
    assert code == 0
    assert "2 of 2 trainings are there already" in out
    assert "python -m" not in out.split("Claims on")[0]
    assert written(here) == before
    plan = load_plan("tiny")
    assert [t.state() for t in plan.trainings] == ["done"] * 2

    # Measured otherwise, or of other weights: to be measured again.
    Path("studies/tiny.toml").write_text(TINY.replace("batches = 2", "batches = 3"))
    assert [t.state() for t in load_plan("tiny").trainings] == ["trained", "done"]
    # Of more mini-batches than asked for: that will do.
    Path("studies/tiny.toml").write_text(TINY.replace("\nbatches = 2", "\nbatches = 1"))
    assert [t.state() for t in load_plan("tiny").trainings] == ["done"] * 2
    Path("studies/tiny.toml").write_text(TINY)
    shutil.copy("checkpoints/csan3.pt", "checkpoints/more/csan8.pt")
    with pytest.raises(InputError, match=r"csan8.pt: trained with other options than the study"):
        load_plan("tiny").trainings[1].state()


def test_dry_run_prints_the_plan_and_its_cost_and_does_nothing(here, call):
    before = set(here.rglob("*"))
    code, out, _ = call("tiny", "--dry-run", "--rate", "64")
    assert code == 0
    assert set(here.rglob("*")) == before
    # Two steps of 32 images in each of 6 epochs, at 64 images a second.
    assert re.search(
        r"checkpoints/more/csan8.pt +csan +15 +1 +0 +64 +6 +[\d,]+ +384 +\S+ +6 s +to do", out
    )
    assert "2 of 2 trainings left" in out
    assert "about 12 s at 64 images/s (as given)" in out
    assert "2 of 2 checkpoints left to measure: python -m analysis.hessian --k 1" in out
    code, out, _ = call("tiny", "--dry-run")
    assert code == 0
    assert "as measured in a few steps" in out


GRIDS = """
[train]
dim = 6
depth = 1
epochs = 3
images = 64

[[grid]]
seed = [0, 1]
window = [3, 5]
out = "seed{seed}/csan{window}.pt"

[[grid]]
window = [3, 8]
head_window = 3
out = "heads/csan{window}.pt"
"""


def test_networks_of_a_grid_are_trained_as_one_program_piece_by_piece(here, call, monkeypatch):
    digits = PRESETS["digits"]
    short = replace(digits, recipe=replace(digits.recipe, warmup_epochs=1))
    monkeypatch.setitem(PRESETS, "digits", short)
    Path("studies/grids.toml").write_text(GRIDS)
    code, out, _ = call("grids", "--dry-run", "--rate", "64", "--minutes", 0.1, "--together", "yes")
    assert code == 0
    # 4 networks of 64 images are 4 s an epoch, of which one fits; 2 networks are 2 s, 3 fit.
    assert re.search(r"seed0/csan3.pt and 3 more +3 +4 s +1 +3 ", out)
    assert re.search(r"heads/csan3.pt and 1 more +3 +2 s +3 +1 ", out)
    for piece in range(6):  # an epoch each
        code, out, err = call("grids", "--together", "yes", "--minutes", "1e-9", "--only", "train")
        assert code == 0, err
        left = (6 if piece < 2 else 2) if piece < 5 else 0
        assert (f"time is up with {left} trainings left" in out) == (left > 0)
        assert ("4 as one program: seed0/csan3.pt" in out) == (piece < 3)
        assert ("2 as one program: heads/csan3.pt" in out) == (piece >= 3)
    assert all(t.state() == "trained" for t in load_plan("grids").trainings)
    assert not list(here.rglob("resume*"))


@pytest.mark.parametrize("processes", [1, 2])
def test_trainings_one_by_one_stop_in_time_too(here, call, processes):
    arguments = ["tiny", "--processes", processes, "--minutes", "1e-6"]
    code, out, err = call(*arguments)
    assert code == 0, err
    assert "time is up with 2 trainings left" in out
    assert not list(here.rglob("*.h5"))
    assert call("tiny", "--minutes", "-1")[0] == 2


def test_cost_is_that_of_the_architecture(here):
    training = load_plan("tiny").trainings[0]
    dim, tokens = 6, 64
    layers = tokens * (dim * dim * (4 + 4) + dim)  # attention, MLP, embedding of one pixel
    cost = cost_of(training)
    assert cost.parameters == sum(p.numel() for p in training.start.model.parameters())
    assert cost.flops / cost.image_steps > 3 * 2 * layers


def test_a_failing_command_ends_the_study(here, call, monkeypatch):
    """The other, which would go on for a minute, is ended."""
    monkeypatch.setattr(execution, "TRAIN", "training")
    Path("training.py").write_text(
        "import sys, time; from pathlib import Path\n"
        "if '8' in sys.argv: Path('begun').touch(), time.sleep(60), Path('ended').touch()\n"
        "while not Path('begun').exists(): time.sleep(0.01)\n"
        "sys.exit('a warning\\nerror: out: unusable')\n"
    )
    code, _, err = call("tiny", "--processes", "2", "--only", "train")
    assert code == 2
    assert re.fullmatch(r"error: python -m training [^\n]*csan3\.pt: out: unusable\n", err)
    assert not Path("ended").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_processes_of_a_killed_study_end(here):
    """Else they would be in the way of the study when it is started again."""
    ours, theirs = FORK.Pipe()

    def with_child():
        theirs.send(subprocess.Popen(["sleep", "600"], preexec_fn=end_with_parent).pid)
        time.sleep(600)

    parent = FORK.Process(target=with_child)
    parent.start()
    child = ours.recv()
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.join()
    for _ in range(1000):
        if not Path(f"/proc/{child}").exists():
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    pytest.fail("still running ten seconds later")


def test_measuring_needs_the_trainings(here, call):
    code, _, err = call("tiny", "--only", "measure")
    assert code == 2
    assert "checkpoints/csan3.pt: there is no such checkpoint to measure" in err


@pytest.mark.parametrize("name", ["digits", "cifar100", "paper"])
def test_shipped_studies_can_be_read(name):
    plan = load_plan(name)
    variants = {(t.options.window, t.options.head_window) for t in plan.trainings}
    assert variants == {(w, h) for w in (3, 5, 8) for h in (1, 3)}
    assert {m.command for m in plan.measures} == {"nll", "hessian", "landscape", "robustness"}
    if name == "cifar100":
        assert " ".join(plan.trainings[2].arguments) == (
            "--dataset cifar100 --window 8 --seed 0 --snapshots 5 10 15 20 --evaluate-every 5 "
            "--out checkpoints/cifar100/csan8.pt"
        )


GRID = '[[grid]]\nwindow = 3\nout = "a.pt"\n'
BAD = {
    "no TOML": ("window = = 3", "studies/bad.toml: not a TOML file: "),
    "unknown table": (GRID + "[colour]\n", "'colour' found, expected folder, figures, "),
    "wrong type": ("threads = 'two'\n" + GRID, "threads = 'two' found, expected int"),
    "no threads": ("threads = 0\n" + GRID, "threads = 0 found, expected 1 to"),
    "no grid": ("folder = 'x'\n", "no \\[\\[grid\\]\\] found"),
    "grid is a table": ("[grid]\nwindow = 3\n", "expected \\[\\[grid\\]\\] tables"),
    "unknown option": (GRID + "colour = 3\n", "\\[\\[grid\\]\\] 1: .*--colour"),
    "no number": (GRID.replace("3", '"three"'), "\\[\\[grid\\]\\] 1: .*--window"),
    "impossible": (GRID + "head_window = 4\n", "\\[\\[grid\\]\\] 1: head_window: 4"),
    "no file": ("[[grid]]\nwindow = 3\n", "\\[\\[grid\\]\\] 1: out = None found, expected a file"),
    "unknown name": (GRID.replace("a.pt", "{colour}.pt"), "expected {NAME} only of options"),
    "twice the same": (GRID.replace("3", "[3, 5]"), "two trainings write a.pt"),
    "unknown command": (GRID + "[[measure]]\ncommand = 'x'\n", "\\[\\[measure\\]\\] 1: command"),
    "unknown measure": (GRID + "measure = ['x']\n", "measure names 'x', expected some of"),
    "option of measure": (
        GRID + "[[measure]]\ncommand = 'hessian'\nbatches = 'x'\n",
        "\\[\\[measure\\]\\] 1: .*--batches",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_studies_are_refused_in_one_line(here, call, case):
    text, complaint = BAD[case]
    Path("studies/bad.toml").write_text(text)
    code, _, err = call("bad", "--dry-run")
    assert code == 2
    assert re.fullmatch(
        f"error: studies/bad.toml: [^\n]*{complaint.split('toml: ')[-1]}[^\n]*\n", err
    )


def test_bad_options_are_refused_in_one_line(here, call):
    for arguments, complaint in (
        (["none"], "studies/none.toml: no such study, expected a TOML file or one of .*: tiny"),
        (["tiny", "--processes", "0"], "processes: 0 found, expected at least 1"),
        (["tiny", "--dry-run", "--rate", "0"], "rate: 0.0 found, expected more than 0"),
        (["tiny", "--only", "nothing"], "only"),
    ):
        code, _, err = call(*arguments)
        assert code == 2
        assert re.fullmatch(f"error: [^\n]*{complaint}[^\n]*\n", err)


def test_nothing_is_trained_twice_at_once(here):
    with alone(Path("checkpoints/csan3.pt")):  # noqa: SIM117
        with pytest.raises(InputError, match=r"csan3.pt is being trained by another process"):
            with alone(Path("checkpoints/csan3.pt")):
                pass
    with alone(Path("checkpoints/csan3.pt")):
        pass


@pytest.mark.parametrize("name", ["dispute", "dispute-cifar100"])
def test_networks_of_the_dispute_are_alike_in_size(name):
    """At a range of 5, and those of Figure 5; a global kernel takes nothing from the rest."""
    sizes = defaultdict(list)
    for training in load_plan(name).trainings:
        own = count_parameters(training.start.model)
        sizes[token_range(training.start.architecture)].append(own)
    # Five seeds of five families at each range; of Figure 5, of five networks and one on less data.
    assert {reach: len(own) for reach, own in sizes.items()} == {3: 25, 5: 25, 15: 25, None: 30}
    assert max(sizes[5]) < 1.003 * min(sizes[5])
    assert max(sizes[None]) < 1.07 * min(sizes[None] + sizes[5])
    assert min(sizes[3]) > 0.95 * max(sizes[5])
    assert max(sizes[15]) < 1.37 * min(sizes[5])
