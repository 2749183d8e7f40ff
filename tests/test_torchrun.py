"""Commands under torchrun: one process prints and writes, and what is killed goes on."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.distributed import run as elastic

from analysis import landscape, study
from lossgeometry.running import saving
from lossgeometry.running.distributed import join
from models import load_checkpoint
from models import train as training
from models.cli import run
from tests.test_interruptions import contents, progress_of, wait_for_progress

SURFACE = ["--ckpt", "checkpoints/csan3.pt", "--points", "9", "--line-points", "9", "--lines", "1"]
SURFACE += ["--batches", "2"]
TRAINING = ["--window", "3", "--dim", "6", "--depth", "2", "--epochs", "6", "--images", "64"]


MEASURED = Path("checkpoints/csan3.h5")


class Torchrun:
    """What torchrun does, in a fork, of a command that saves at once in two forked processes.

    Forked, as PyTorch takes seconds to be imported. What is said, and who does it, is in `folder`.
    """

    def __init__(self, folder, command, *arguments, restarts=0):
        self.folder, self.command, self.arguments = folder, command, arguments
        self.options = ["--nproc-per-node=2", f"--max-restarts={restarts}", "--start-method=fork"]
        self.process = multiprocessing.get_context("fork").Process(target=self._launch)
        self.process.start()

    def _launch(self):
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
            setattr(sys, name, os.fdopen(descriptor, "w", buffering=1))
        configure = elastic.config_from_args
        elastic.config_from_args = lambda options: (configure(options)[0], self._work, [])
        elastic.main([*self.options, self.command.__name__])

    def _work(self):
        (self.folder / f"rank{os.environ['RANK']}").write_text(str(os.getpid()))
        saving.SAVE_EVERY = 0
        join.cache_clear()
        sys.argv = [self.command.__name__, *self.arguments]
        run(self.command.main, self.command.Options)

    def wait(self):
        """Exit code, standard output and standard error."""
        self.process.join()
        said = [(self.folder / name).read_text() for name in ("stdout", "stderr")]
        return self.process.exitcode, *said

    def kill_one(self, not_this=None):
        """SIGKILL for rank 1, once it has got on; returns which process that was."""
        victim, place = None, self.folder / "rank1"
        while victim in (None, not_this):
            assert self.process.is_alive(), self.wait()
            time.sleep(0.01)
            victim = int(place.read_text() or 0) or None if place.exists() else None
        wait_for_progress(MEASURED, progress_of(MEASURED) + 1, self.process)
        os.kill(victim, signal.SIGKILL)
        return victim


def test_killed_twice_restarted_by_torchrun_and_finished_alone(
    here, call_module, unrendered, tmp_path_factory
):
    """The result is that of one process to the last bit."""
    process = Torchrun(tmp_path_factory.mktemp("torchrun"), landscape, *SURFACE, restarts=1)
    first = process.kill_one()
    process.kill_one(not_this=first)  # after the restart
    progress = progress_of(MEASURED)
    code, out, err = process.wait()
    assert code != 0
    assert out.count("was interrupted; going on from there") == 1
    assert "wrote" not in out
    # Of either start, the one that was not killed: ended by torchrun, or alone before that.
    said = r"(interrupted|another process has ended); what has been saved is kept"
    assert re.search(said, err)  # but torchrun may end one before it can take signals
    assert re.search(r"Root Cause.*rank +: 1 .*SIGKILL", err, re.DOTALL)
    assert progress_of(MEASURED) >= progress

    code, out, _ = call_module(landscape, *SURFACE)
    assert code == 0
    assert "was interrupted; going on from there" in out
    killed = contents()
    MEASURED.unlink()
    call_module(landscape, *SURFACE)
    assert contents() == killed


def test_a_training_of_two_processes_is_that_of_one(here, call_module):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "models.train", *TRAINING, "--out", "two.pt"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote two.pt") == 1
    assert call_module(training, *TRAINING, "--out", "one.pt")[0] == 0
    one, two = (load_checkpoint(f"{name}.pt") for name in ("one", "two"))
    for name, weights in one.model.state_dict().items():
        torch.testing.assert_close(two.model.state_dict()[name], weights, rtol=1e-4, atol=1e-5)


def test_bad_input_is_said_once_and_last(here, tmp_path_factory):
    before = {path: path.read_bytes() for path in here.rglob("*.*")}
    folder = tmp_path_factory.mktemp("torchrun")
    code, _, err = Torchrun(folder, landscape, *SURFACE, "--span", "0").wait()
    assert code != 0
    complaint = "error: span: 0.0 found, expected a positive step of at most 1e+06"
    assert [line for line in err.splitlines() if line.startswith("error")] == [complaint]
    assert complaint in err.rstrip("= \n").splitlines()[-1]  # of torchrun's own report
    codes = re.findall(r"exitcode +: (-?\d+)", err)
    assert codes[-1] == "2"  # of the root cause
    # The other has found the same, or torchrun has ended it before or after it could take signals.
    assert set(codes) <= {"2", "-15", "130"}
    assert {path: path.read_bytes() for path in here.rglob("*.*")} == before


@dataclass(frozen=True)
class NoOptions:
    """Of a command that does nothing."""


@pytest.mark.parametrize(("rank", "alone"), [(0, True), (1, True), (0, False), (1, False)])
def test_what_is_not_shared_is_done_once_and_only_one_process_speaks(
    monkeypatch, capfd, rank, alone
):
    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("RANK", str(rank))
    called = []

    def main(options):
        called.append(options)
        print("table")
        print("progress", file=sys.stderr)

    run(main, NoOptions, alone=alone)
    assert len(called) == (rank == 0 or not alone)
    assert capfd.readouterr() == (("table\n", "progress\n") if rank == 0 else ("", ""))


def test_a_study_has_processes_of_its_own(monkeypatch, call_module):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("RANK", "0")
    code, _, err = call_module(study, "digits")
    assert code == 2
    assert re.fullmatch(r"error: torchrun: found around a study, expected none; [^\n]+\n", err)


def test_the_first_of_several_signals_counts(monkeypatch, capfd):
    """So that what it interrupts can be saved."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["command"])
    saved = []

    def main(options):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            saved.append("all")
            raise

    with pytest.raises(SystemExit) as stop:
        run(main, NoOptions)
    assert stop.value.code == 130
    assert saved == ["all"]
    assert "what has been saved is kept" in capfd.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
