"""Hostile files, options, studies and tables, as the commands meet them."""

import os
from pathlib import Path

import pytest

import analysis.claims
import analysis.figures
import analysis.hessian
import analysis.landscape
import analysis.published
import analysis.study
import models.train
from analysis.drawing.published import read_surface
from analysis.plan import load_plan
from tests.fuzz import bases
from tests.hostile.test_hdf5 import FILES, edited

HOSTILE = ["loop", "bomb", "nested", "path", "lengths", "external link"]


@pytest.mark.parametrize("command", [analysis.figures, analysis.claims])
@pytest.mark.parametrize("case", HOSTILE)
def test_figures_and_claims_refuse_hostile_files(
    tmp_path, monkeypatch, call_module, unrendered, command, case
):
    monkeypatch.chdir(tmp_path)
    Path("found").mkdir()
    alone = bases.measurement_file(groups=["history"])
    Path("found/bad.h5").write_bytes(edited(FILES[case][0], alone))
    code, _, err = call_module(command, "--measurements", "found", "--out", "figures")
    assert code == 2
    assert err.startswith("error: found/bad.h5: ")
    assert err.count("\n") == 1
    assert [p.name for p in Path().rglob("*") if p.is_file() and p.suffix != ".png"] == ["bad.h5"]


def test_figures_are_drawn_of_the_files_that_mutations_start_from(
    tmp_path, monkeypatch, call_module, unrendered
):
    """Or nothing would be tested."""
    monkeypatch.chdir(tmp_path)
    bases.write_measurements(tmp_path)
    code, out, err = call_module(analysis.figures, "--measurements", ".", "--out", "figures")
    assert code == 0, err
    drawn = {Path(line.split()[-1]).name for line in out.splitlines()}
    assert {"landscape_digits_surfaces.png", "claims_digits.png", "nll_digits.png"} <= drawn


LANDSCAPE, STUDY = analysis.landscape, analysis.study
WORDS = {
    "tol": (analysis.hessian, "--tol nan", "tol: nan"),
    "infinite tol": (analysis.hessian, "--tol inf", "tol: inf"),
    "negative tol": (analysis.hessian, "--tol -1", "tol: -1.0"),
    "batches": (analysis.hessian, f"--batches {10**12}", f"batches: {10**12}"),
    "steps": (analysis.hessian, f"--steps {10**100}", "steps: 1000"),
    "seed": (analysis.hessian, f"--seed {2**63}", "seed: 9223372036854775808"),
    "digits": (analysis.hessian, f"--seed {'9' * 5000}", "seed"),
    "span": (LANDSCAPE, "--span inf", "span: inf"),
    "no span": (LANDSCAPE, "--span nan", "span: nan"),
    "adaptive": (LANDSCAPE, "--adaptive nan", "adaptive: nan"),
    "infinite": (LANDSCAPE, "--adaptive inf", "adaptive: inf"),
    "points": (LANDSCAPE, f"--points {10**9 + 1}", "points: 1000000001"),
    "rate": (STUDY, "digits --rate nan", "rate: nan"),
    "infinite rate": (STUDY, "digits --rate inf", "rate: inf"),
    "processes": (STUDY, f"digits --processes {10**9}", "processes: 1000000000"),
    "epochs": (models.train, f"--out x.pt --epochs {10**18}", "epochs: 1000000000000000000"),
    "dim": (models.train, f"--out x.pt --dim {10**30}", "dim"),
    "depth": (models.train, f"--out x.pt --depth {10**9}", "depth: 1000000000"),
    "large seed": (models.train, f"--out x.pt --seed {10**40}", "seed"),
    "table": (analysis.published, "table.csv", "table.csv"),
}


@pytest.mark.parametrize("case", WORDS)
def test_absurd_options_are_one_line(tmp_path, monkeypatch, call_module, little_memory, case):
    monkeypatch.chdir(tmp_path)
    module, words, complaint = WORDS[case]
    code, _, err = call_module(module, *words.split())
    assert code == 2
    assert complaint in err
    assert err.count("\n") == 1
    assert os.listdir() == []


STUDIES = {
    "nested": ("x = " + "[" * 100_000, "not a TOML file"),
    "digits": (f"threads = {'9' * 5000}", "not a TOML file"),
    "threads": (f"threads = {10**30}\n[[grid]]\nout='a.pt'", "threads"),
    "bool": ("threads = true\n[[grid]]\nout='a.pt'", "threads"),
    "many": (
        "[[grid]]\nout='{seed}.pt'\n"
        + "\n".join(f"{k} = [{', '.join('1' * 1000)}]" for k in ("seed", "window", "dim", "depth")),
        "1000000000000 trainings",
    ),
    "none": ("[[grid]]\nout='a.pt'\nwindow=[]", "0 trainings"),
    "format": ("[[grid]]\nout='{seed:>999999999}.pt'\nseed=1", "out"),
    "class": ("[[grid]]\nout='{seed.__class__}'\nseed=1", "out"),
    "help": ("[[grid]]\nout='a.pt'\nhelp=true", "'help'"),
    "disguise": ("[[grid]]\nout='a.pt'\ndataset='--help'", "'--help'"),
    "NUL": ('[[grid]]\nout="a\\u0000b.pt"', "out"),
    "command": ("[[grid]]\nout='a.pt'\n[[measure]]\ncommand=['nll']", "command = a list"),
    "measure": ("[[grid]]\nout='a.pt'\nmeasure=[{x=1}]", "measure names a dict"),
    "date": ("[[grid]]\nout='a.pt'\nseed=1979-05-27", "'seed'"),
    "dim": (f"[[grid]]\nout='a.pt'\ndim={10**9}", "dim"),
    "images": ("[[grid]]\nout='a.pt'\nimages=-1", "images: -1"),
}


@pytest.mark.parametrize("case", STUDIES)
def test_studies_of_strangers_are_refused(refused, case):
    content, complaint = STUDIES[case]
    found = refused(lambda path: load_plan(str(path)), "bad.toml", content.encode())
    assert complaint in found


TABLES = {
    "binary": b"\x1f\x8b\x08\x00" + bytes(50),
    "nan": b"nan,0,1,1,1\n0,0,1,1,1\n",
    "infinite": b"inf,0,1,1,1\n0,0,1,1,1\n",
    "point": b"0,0,1,1,1\n",
    "line": b"0,0,1,1,1\n1,0,1,1,1\n",
    "holes": b"0,0,1,1,1\n1,1,1,1,1\n",
    "twice": b"0,0,1,1,1\n" * 4,
    "columns": b"0,0\n",
    "ragged": b"0,0,1,1,1\n0\n",
    "digits": b"9" * 100_000,
    "empty": b"",
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_of_strangers_are_refused(refused, case):
    refused(read_surface, "bad.csv", TABLES[case])


def test_packed_tables_are_not_unpacked(refused):
    import gzip

    refused(read_surface, "bad.csv.gz", gzip.compress(bases.TABLE.encode()))
