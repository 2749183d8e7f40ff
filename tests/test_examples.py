"""All Python in the README, in docs/ and in docstrings of the engine runs, and is right."""

import doctest
import pkgutil
import re
from importlib import import_module
from pathlib import Path

import pytest

import lossgeometry

ROOT = Path(__file__).parent.parent
MODULES = [name for _, name, _ in pkgutil.walk_packages(lossgeometry.__path__, "lossgeometry.")]
PAGES = [
    page
    for page in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))
    if "```python" in page.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(block, names)
