"""The site shows every public name and every example, and its examples run."""

import inspect
import re
import runpy
from pathlib import Path

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


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "reference.rst").read_text()
    listed = set(re.findall(r"^(?: {3}|\.\. py:data:: )(\w+)$", page, re.MULTILINE))
    drawing = {name for name in vars(plots) if name.startswith("plot_")}
    assert listed >= {*lossgeometry.__all__, *drawing} - {"plots"}


FUNCTIONS = [
    name for name in lossgeometry.__all__ if inspect.isfunction(getattr(lossgeometry, name))
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_says_what_it_takes_gives_and_raises(name):
    function = getattr(lossgeometry, name)
    sections = re.split(r"\n([A-Z][a-z]+)\n-+\n", inspect.getdoc(function))
    sections = dict(zip(sections[1::2], sections[2::2], strict=True))
    named = re.findall(r"^[^\s].*", sections["Parameters"], re.MULTILINE)
    documented = {word for line in named for word in re.findall(r"\w+", line.split(" : ")[0])}
    assert documented >= set(inspect.signature(function).parameters)
    assert sections.keys() & {"Returns", "Yields"}


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
