"""Reports as one page: what is in it, and that it answers to a hand in a real browser."""

import re
import sys

import numpy as np
import pytest
import torch
from selenium.webdriver import Keys
from selenium.webdriver.support.ui import WebDriverWait
from torch import nn
from torch.nn.functional import cross_entropy

import lossgeometry as lg
from analysis import report
from analysis.measurements.files import collect
from analysis.reporting.whole import write_report
from analysis.tables.claims import answers_table
from analysis.tables.landscapes import flatness_rows
from analysis.tables.nll import end_points
from analysis.verdicts import judge
from tests.measured import EPOCHS, write, write_study
from tests.pages import charts, tables

NAME = "wide </script> %{x} <b>&"  # to be shown as it is


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder of measurements, with errors on corrupted images, too."""
    folder = tmp_path_factory.mktemp("study") / "checkpoints"
    write_study(folder)
    rng = np.random.default_rng(0)
    names = np.array([f"corruption_{i}" for i in range(15)], dtype=bytes)
    for window in (3, 8):
        error = rng.uniform(0, 1, (15, 5))
        arrays = {"error": error, "corruptions": names, "image_error": rng.uniform(0, 1, 20)}
        arrays |= {"clean_error": 0.1, "mean_corruption_error": error.mean()}
        write(folder / f"csan{window}.h5", "robustness", arrays, window=window, source="generated")
    return folder


@pytest.fixture(scope="module")
def study(measured):
    return write_report(measured, measured.parent / "report.html")


@pytest.fixture(scope="module")
def own(results, tmp_path_factory):
    return lg.report(results, tmp_path_factory.mktemp("own") / "report.html")


@pytest.fixture(scope="module")
def results():
    """Of two models, at three steps of their trainings."""
    found, xs = {}, torch.linspace(-1, 1, 5)
    for name, width in (("narrow", 3), (NAME, 8)):
        torch.manual_seed(width)
        model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
        data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(6)]
        losses = {"nll": cross_entropy}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        how = dict(every=2, k=2, precondition=optimizer, trace=9)
        tracker = lg.CurvatureTracker(model, cross_entropy, data[0], **how)
        own = found[name] = {}
        for step in range(5):
            if step % 2 == 0:
                H = lg.Hessian(model, cross_entropy, data)
                directions = lg.random_directions(model, seed=0)
                line = lg.line(model, losses, data, directions[0], xs)
                own[step] = [
                    lg.eigsh(H, k=2),
                    lg.trace(H, matvecs=9, seed=0),
                    lg.spectral_density(H, probes=2, steps=8, seed=0),
                    lg.max_eigenvalue_spectrum(model, cross_entropy, data, k=4),
                    lg.surface(model, losses, data, directions, xs, xs),
                    line,
                    lg.flatness(xs, line["nll"][None]),
                ]
            optimizer.zero_grad()
            cross_entropy(model(data[0][0]), data[0][1]).backward()
            optimizer.step()
            tracker.step()
        own[4].append(tracker.result())
    return found


@pytest.fixture(params=["study", "own"])
def page(request):
    return request.getfixturevalue(request.param)


def test_tables_of_a_study_are_those_of_the_commands(study, measured):
    found = tables(study)
    answers = judge([measured])
    histories, spectra = (collect([measured], name) for name in ("history", "hessian/train"))
    surfaces = sorted(collect([measured], "landscape/train"), key=lambda m: m.path)
    expected = [answers_table(name, own) for name, own in answers.items()]
    expected += [*end_points(histories, [], spectra), flatness_rows(surfaces)]
    assert len(expected) == 4
    for title, _, rows in expected:
        assert found[title] == rows


def test_charts_of_a_study_hold_what_is_stored(study, measured):
    found = charts(study)
    (epochs,) = {tuple(trace["x"]) for trace in found["Training on digits"][0]["traces"]}
    assert epochs == tuple(range(EPOCHS + 1))
    stored = np.concatenate(
        [
            m.arrays["eigenvalues"].ravel()
            for m in collect([measured], "hessian/train")
            if m.checkpoint["epoch"] == 2 and m.checkpoint["architecture"]["window"] == 8
        ]
    )
    drawn = [
        sign * trace["x"]
        for sign, panel in zip((-1, 1), found["Hessian max eigenvalue spectra"], strict=True)
        for trace in panel["traces"]
        if trace["mode"] == "markers" and trace["when"] == {"window": "8×8 (global)", "epoch": "2"}
    ]
    np.testing.assert_allclose(np.sort(np.concatenate(drawn)), np.sort(stored), rtol=1e-6)


def test_own_results_are_what_was_returned(results, own):
    found, rows = charts(own), tables(own)
    E, T, D, S, L, *_ = results[NAME][2]

    def drawn(title, **how):
        return [
            trace
            for panel in found[title]
            for trace in panel["traces"]
            if {"model": NAME, "step": "2"}.items()
            <= (panel["when"] | trace.get("when", {})).items()
            and how.items() <= trace.items()
        ]

    eigenvalues = [row[2:] for row in rows["Eigenvalues ± their errors"] if row[:2] == [NAME, "2"]]
    assert [float(row[1].split(" ± ")[0]) for row in eigenvalues] == pytest.approx(
        E.eigenvalues.tolist(), rel=1e-5
    )
    (trace,) = (row[2:] for row in rows["Estimates ± one standard error"] if row[:2] == [NAME, "2"])
    assert float(trace[0].split(" ± ")[0]) == pytest.approx(T.estimate, rel=1e-5)
    (density,) = drawn("Of all eigenvalues")
    estimate = D.estimate(D.grid())
    np.testing.assert_allclose(density["y"], estimate.estimate, rtol=1e-6)
    error = 2 * estimate.standard_error + estimate.systematic_error
    np.testing.assert_allclose(density["band"], error, rtol=1e-6)
    ticks = drawn("Max eigenvalues of mini-batches", mode="markers")
    ends = np.concatenate([sign * trace["x"] for sign, trace in zip((-1, 1), ticks, strict=True)])
    np.testing.assert_allclose(np.sort(ends), S.eigenvalues.flatten().sort().values, rtol=1e-6)
    (surface,) = drawn("Surfaces of the loss", type="surface")
    np.testing.assert_allclose(surface["customdata"], L["nll"], rtol=1e-6)


def test_stands_alone(page):
    text = page.read_text()
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']""", text)
    assert text.count("plotly.js v") == 1


@pytest.mark.parametrize("width", [1280, 390])
def test_everything_that_can_be_clicked(page, width, browser):
    """At the width of a desk and of a telephone: no error, nothing outside."""
    size = dict(width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser")
    browser.get(page.as_uri())
    wait = WebDriverWait(browser, 60)
    wait.until(
        lambda _: browser.execute_script("return performance.getEntriesByName('drawn').length")
    )
    figures = browser.find_elements("tag name", "figure")
    assert not all(figure.find_elements("css selector", ".main-svg") for figure in figures)
    for figure in figures:
        browser.execute_script("arguments[0].scrollIntoView()", figure)
        wait.until(lambda _, own=figure: own.find_elements("css selector", ".plot .main-svg"))
        plot = figure.find_element("class name", "plot")

        def shown(plot=plot):
            return browser.execute_script("return (arguments[0].data ?? []).length", plot)

        assert shown()
        for control in figure.find_elements("tag name", "input"):
            if control.get_attribute("type") == "range":
                output = figure.find_element("tag name", "output")
                options = [output.text]
                for key in (Keys.HOME, Keys.ARROW_RIGHT, Keys.END):
                    control.send_keys(key)
                    options.append(output.text)
                assert options[0] == options[-1]
                assert len(set(options)) > 1
            else:
                control.click()
                if control.get_attribute("type") == "checkbox":
                    control.click()
            assert shown()
        for switch in figure.find_elements("css selector", "[type=checkbox]:checked"):
            switch.click()
        assert not shown() or not figure.find_elements("css selector", "[type=checkbox]")
    browser.find_element("id", "theme").click()
    for link in browser.find_elements("css selector", "nav a"):
        link.click()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_cdp_cmd("Page.printToPDF", {})["data"]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_ground_follows_the_system_and_the_button(page, browser):
    def ground():
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    for scheme, color in (("dark", "rgb(20, 24, 29)"), ("light", "rgb(255, 255, 255)")):
        feature = dict(name="prefers-color-scheme", value=scheme)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=[feature]))
        browser.get(page.as_uri())
        assert ground() == color
    browser.find_element("id", "theme").click()
    assert ground() == "rgb(20, 24, 29)"


def test_the_command(folder, tmp_path, monkeypatch, call_module):
    monkeypatch.chdir(tmp_path)
    (folder / "bad.h5").write_bytes(b"not HDF5")
    code, out, err = call_module(report, "--measurements", folder, "--out", "new/page.html")
    assert (code, out) == (2, "wrote new/page.html\n")
    assert err.startswith(f"error: {folder}/bad.h5: not a usable HDF5 file")
    assert "Claims on digits" in (tmp_path / "new/page.html").read_text()
    for arguments, message in (
        (["--out", tmp_path], f"out: {tmp_path} is a folder, expected the name of a page"),
        (["--measurements", "new"], "measurements: none in new, measure a checkpoint first"),
    ):
        code, _, err = call_module(report, *arguments)
        assert (code, err) == (2, f"error: {message}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "new"}


def test_unusable_results_are_named(results, tmp_path, monkeypatch):
    eigenpairs, trace, density, *_ = results["narrow"][0]
    for unusable, message in (
        ({}, "results: none found"),
        ([eigenpairs, "text"], "results: a str found"),
        ([density, density], "results: more than one SpectralDensity of one model"),
        ({"a": {3: [density, density]}}, "results: more than one SpectralDensity of a 3"),
        (lg.Estimate(np.ones(3), np.ones(3), 1.0, 0.0, 1), "results: an estimate of shape (3,)"),
    ):
        with pytest.raises(lg.InputError, match=re.escape(message)):
            lg.report(unusable, tmp_path / "page.html")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(lg.InputError, match="plotly is not installed, expected pip install"):
        lg.report(density, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
    assert lg.report(trace, tmp_path / "page.html").exists()  # a table needs no plotly
