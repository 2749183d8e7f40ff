"""Surfaces as pages, in a browser, and for ParaView."""

import base64
import io
import json
import re
import shutil
import sys

import matplotlib.pyplot as plt
import meshio
import numpy as np
import pytest
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver import ActionChains
from selenium.webdriver.support.ui import WebDriverWait

from analysis.drawing.everything import draw_all
from lossgeometry import InputError


def test_surfaces_as_self_contained_pages(folder, tmp_path):
    """All checkpoints and losses in one page, on one scale, holes where values are not finite."""
    draw_all(folder, tmp_path, ["html"])
    page = (tmp_path / "landscape_digits.html").read_text()
    assert not re.search(r"""<(script|link)[^>]+(src|href)=["']""", page)
    call = page[page.rindex("Plotly.newPlot(") :]
    traces, end = json.JSONDecoder().raw_decode(call[call.index("[") :])
    layout, _ = json.JSONDecoder().raw_decode(call[call.index("[") + end :].lstrip(" ,\n"))
    assert [t["visible"] for t in traces] == [True, False, False, False]
    assert len({(t["cmin"], t["cmax"]) for t in traces[:2]}) == 1
    buttons = layout["updatemenus"][0]["buttons"]
    assert [button["label"] for button in buttons] == [
        f"csan{window}: {label}, {loss}"
        for loss in ("NLL", "NLL + L2")
        for window, label in ((3, "3×3"), (8, "8×8 (global)"))
    ]
    heights = traces[1]["z"]
    grid = np.linspace(-1, 1, 5)
    if isinstance(heights, dict):  # how plotly writes numpy's arrays
        raw = np.frombuffer(base64.b64decode(heights["bdata"]), heights["dtype"])
        heights = raw.reshape([int(n) for n in heights["shape"].split(",")])
    expected = np.log10(1 + grid**2 + grid[:, None] ** 2)
    expected[0, 0] = np.nan
    np.testing.assert_allclose(np.array(heights, dtype=float), expected, rtol=1e-6)


@pytest.fixture
def browser():
    """A real one without a window, and without a network."""
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


def test_surfaces_in_a_browser(folder, tmp_path, browser):
    """The page draws a surface, switches to another, and shows the value under the pointer."""
    draw_all(folder, tmp_path, ["html"])
    browser.get((tmp_path / "landscape_digits.html").as_uri())
    unready = [NoSuchElementException, StaleElementReferenceException]
    wait = WebDriverWait(browser, 60, ignored_exceptions=unready)

    def shown(_=None):
        traces = "document.getElementById('landscape').data"
        return browser.execute_script(f"return {traces}.map(trace => trace.visible)")

    wait.until(lambda _: shown() == [True, False, False, False])
    buttons = browser.find_elements("css selector", ".updatemenu-button")
    assert "csan8" in buttons[1].text
    buttons[1].click()
    wait.until(lambda _: shown() == [False, True, False, False])
    scene = browser.find_element("css selector", "#landscape canvas")
    pointer = ActionChains(browser).move_to_element(scene).pause(1).move_by_offset(2, 2)
    pointer.perform()
    text = wait.until(lambda _: browser.find_element("css selector", "#landscape .hovertext").text)
    text = text.replace("−", "-")
    found = re.search(r" (-?\d\.\d+)\D.* (-?\d\.\d+)NLL (\S+)$", text)
    assert found is not None, text
    x, y, height = map(float, found.groups())
    assert height == pytest.approx(1 + x**2 + y**2, rel=1e-3)
    picture = plt.imread(io.BytesIO(scene.screenshot_as_png))
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 100
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_surfaces_for_paraview(folder, tmp_path):
    draw_all(folder, tmp_path, ["vtu"])
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


def test_missing_packages_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(InputError, match="formats: plotly is not installed"):
        draw_all(folder, tmp_path, ["html"])
