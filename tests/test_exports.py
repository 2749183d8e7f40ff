"""Surfaces as pages, in a browser, and for ParaView."""

import io
import re
import sys

import matplotlib.pyplot as plt
import meshio
import numpy as np
import pytest
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver import ActionChains
from selenium.webdriver.support.ui import WebDriverWait

from analysis.drawing.everything import draw_all
from analysis.drawing.landscapes import draw_landscapes
from analysis.measurements.files import collect
from lossgeometry import InputError
from tests.pages import charts


@pytest.fixture(scope="module")
def page(measurements, tmp_path_factory):
    out = tmp_path_factory.mktemp("pages")
    draw_all(measurements, out, ["html"])
    return out / "landscape_digits.html"


def test_surfaces_as_self_contained_pages(page):
    """All checkpoints and losses in one page, on one scale, holes where values are not finite."""
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']""", page.read_text())
    (panels,) = charts(page).values()
    assert [(p["when"]["view"], p["when"]["checkpoint"], p["when"]["loss"]) for p in panels] == [
        (view, f"csan{window}: {label}", loss)
        for loss in ("NLL", "NLL + L2")
        for window, label in ((3, "3×3"), (8, "8×8 (global)"))
        for view in ("surface", "contours")
    ]
    assert len({(p["coloraxis"]["cmin"], p["coloraxis"]["cmax"]) for p in panels[:4]}) == 1
    grid = np.linspace(-1, 1, 5)
    expected = 1 + grid**2 + grid[:, None] ** 2
    expected[0, 0] = np.nan
    for panel in panels:
        trace = panel["traces"][0]
        losses = expected if panel["when"]["loss"] == "NLL" else 2 * expected
        np.testing.assert_allclose(trace["customdata"], losses, rtol=1e-6)
        np.testing.assert_allclose(trace["z"], np.log10(losses), rtol=1e-6)


def test_surfaces_in_a_browser(page, browser):
    """The page draws surfaces, switches one off, and shows the value under the pointer."""
    browser.get(page.as_uri())
    unready = [NoSuchElementException, StaleElementReferenceException]
    wait = WebDriverWait(browser, 60, ignored_exceptions=unready)

    def shown():
        plot = "document.querySelector('.plot').data"
        return browser.execute_script(f"return ({plot} ?? []).map(trace => trace.name)")

    wait.until(lambda _: shown() == ["csan3: 3×3", "csan8: 8×8 (global)"])
    browser.find_element("css selector", "input[type=checkbox]").click()
    wait.until(lambda _: shown() == ["csan8: 8×8 (global)"])
    scene = browser.find_element("css selector", ".plot canvas")
    pointer = ActionChains(browser).move_to_element(scene).pause(1).move_by_offset(2, 2)
    pointer.perform()
    text = wait.until(lambda _: browser.find_element("css selector", ".plot .hovertext").text)
    text = text.replace("−", "-")
    found = re.search(r"(-?\d\.\d+), (-?\d\.\d+)\s*NLL (\d\.\d+)", text)
    assert found is not None, text
    x, y, height = map(float, found.groups())
    assert height == pytest.approx(1 + x**2 + y**2, rel=1e-3)
    picture = plt.imread(io.BytesIO(scene.screenshot_as_png))
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 100
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_surfaces_for_paraview(measurements, tmp_path):
    draw_landscapes(collect([measurements], "landscape/train"), tmp_path, ["vtu"])
    mesh = meshio.read(tmp_path / "landscape_digits_csan3.vtu")
    grid = np.linspace(-1, 1, 5)
    bowl = 1 + grid**2 + grid[:, None] ** 2
    assert len(mesh.cells_dict["quad"]) == 15  # the one with the infinite corner is left out
    assert 0 not in mesh.cells_dict["quad"]
    np.testing.assert_allclose(mesh.points[1:, 2], bowl.ravel()[1:])
    np.testing.assert_allclose(mesh.point_data["NLL + L2"][1:], 2 * bowl.ravel()[1:])
    np.testing.assert_allclose(mesh.points[:, 0], np.tile(grid, 5))
    np.testing.assert_allclose(mesh.points[:, 1], np.repeat(grid, 5))
    np.testing.assert_allclose(mesh.point_data["NLL"][1:], bowl.ravel()[1:])
    assert np.isinf(mesh.point_data["NLL"][0])


@pytest.mark.parametrize(("extension", "package"), [("html", "plotly.offline"), ("vtu", "meshio")])
def test_missing_packages_are_named(extension, package, measurements, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"{package.partition('.')[0]} is not installed"):
        draw_landscapes(collect([measurements], "landscape/train"), tmp_path, [extension])
