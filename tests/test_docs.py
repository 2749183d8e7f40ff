"""The site shows every public name and every example, and its examples run."""

import inspect
import re
import runpy
from pathlib import Path
from pkgutil import resolve_name

import matplotlib.pyplot as plt
import pytest

import lossgeometry
from lossgeometry import plots

ROOT = Path(__file__).parent.parent
EXAMPLES = {path.stem.removeprefix("plot_"): path for path in ROOT.glob("examples/plot_*.py")}
# Those that take longer than a few seconds are run by `make docs` alone.
LONG = {
    *("density_with_errors", "edge_of_stability", "first_spectrum", "huggingface"),
    *("per_layer", "pitfalls"),
}


# But a type and a module, which have no docstrings of their own there.
PUBLIC = {
    name: getattr(lossgeometry, name)
    for name in lossgeometry.__all__
    if name not in ("Direction", "plots")
}
FUNCTIONS = [name for name, it in PUBLIC.items() if inspect.isfunction(it)]
DRAWING = {name: it for name, it in vars(plots).items() if name.startswith("plot_")}


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "reference.rst").read_text()
    listed = set(re.findall(r"^(?: {3}|\.\. py:data:: )(\w+)$", page, re.MULTILINE))
    assert listed >= {*lossgeometry.__all__, *DRAWING} - {"plots"}


def test_the_reference_has_every_name_that_the_pages_import():
    page = (ROOT / "docs" / "reference.rst").read_text()
    listed = set(re.findall(r"^(?: {3}|\.\. py:data:: )(?:\w+\.)*(\w+)$", page, re.MULTILINE))
    imports = re.compile(r"^from lossgeometry[\w.]* import (\([^)]*\)|.*)$", re.MULTILINE)
    pages = [*ROOT.glob("docs/**/*.md"), ROOT / "README.md", *EXAMPLES.values()]
    names = " ".join(found for path in pages for found in imports.findall(path.read_text()))
    assert set(re.findall(r"\w+", names)) <= listed


def sections(it):
    """Those of a docstring, by their titles."""
    parts = re.split(r"\n([A-Z][A-Za-z ]+)\n-+\n", inspect.cleandoc(it.__doc__) + "\n")
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_says_what_it_takes_gives_and_raises(name):
    said = sections(PUBLIC[name])
    named = re.findall(r"^[^\s].*", said["Parameters"], re.MULTILINE)
    documented = {word for line in named for word in re.findall(r"\w+", line.split(" : ")[0])}
    assert documented >= set(inspect.signature(PUBLIC[name]).parameters)
    assert said.keys() & {"Returns", "Yields"}
    assert "Raises" in said


@pytest.mark.parametrize("name", [*PUBLIC, *DRAWING])
def test_a_public_name_has_neighbours(name):
    it, home = (PUBLIC | DRAWING)[name], "lossgeometry" if name in PUBLIC else "lossgeometry.plots"
    lines = sections(it)["See Also"].strip().splitlines()
    assert lines
    for line in lines:  # one name in each: of several, the site leaves out why
        neighbour, _ = line.split(" : ")
        absolute = neighbour.startswith("lossgeometry.")
        resolve_name(neighbour if absolute else f"{home}.{neighbour}")


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example(name):
    assert ">>> " in sections(PUBLIC[name])["Examples"]


def test_the_gallery_has_every_example():
    order = re.search(r'ORDER = """(.*?)"""', (ROOT / "docs" / "conf.py").read_text(), re.DOTALL)
    assert sorted(order[1].split()) == sorted(EXAMPLES)


@pytest.mark.filterwarnings("ignore:.*non-interactive, and thus cannot be shown:UserWarning")
@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - LONG))
def test_an_example_runs_and_draws(name):
    runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
    (number,) = plt.get_fignums()
    assert plt.figure(number).axes
    plt.close("all")
