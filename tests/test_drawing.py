"""Figures from measurements alone: which are drawn, with what on them, and without PyTorch."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import matplotlib as mpl
import matplotlib.pyplot as plt
import meshio
import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.integrate import trapezoid
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver import ActionChains
from selenium.webdriver.support.ui import WebDriverWait

from analysis import labels, plots
from analysis.drawing import landscapes
from analysis.drawing.hessians import draw_hessian_training
from analysis.figures import draw_all
from analysis.measurements import collect
from analysis.statistics import across_seeds
from models import InputError

EPOCHS = 12


def write(path, name, arrays, *, window=3, seed=0, epoch=EPOCHS, dim=48, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    architecture = dict(window=window, patch_size=1, image_size=8, dim=dim)
    architecture |= dict(head_window=1, border="clamp", pooling="gap")
    checkpoint = dict(
        architecture=architecture,
        recipe=dict(epochs=EPOCHS, warmup_epochs=2),
        dataset="digits",
        images=None,
        epoch=epoch,
        seed=seed,
        sha256="0",
    )
    with h5py.File(path, "a") as file:
        group = file.create_group(name)
        for key, array in arrays.items():
            group[key] = array
        group.attrs.update(
            options=json.dumps(dict(objective="train", split="train", batch_size=16) | options),
            checkpoint=json.dumps(checkpoint),
            versions="{}",
            date="2026-01-01T00:00:00+00:00",
        )


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "checkpoints"
    grid = np.linspace(-1, 1, 5)
    for window in (3, 8):
        for seed in (0, 1):
            own = folder if seed == 0 else folder / "seed1"
            file = own / f"csan{window}.h5"
            decay = np.exp(-np.arange(EPOCHS + 1.0)) + 0.01 * window + 0.001 * seed
            history = {"epoch": np.arange(EPOCHS + 1.0), "train_nll": decay, "test_error": decay}
            write(file, "history", history, window=window, seed=seed)
            spectrum = {
                "eigenvalues": rng.normal(5, 4, (10, 5)),
                "density/grid": np.linspace(-1, 9, 50),
                "density/density": np.exp(-np.linspace(-1, 9, 50)),
                "density/standard_error": np.full(50, 1e-3),
                "layers/names": np.array(["blocks.0.mlp", "head"], dtype=bytes),
                "layers/eigenvalues": np.array([[3.0, -1.0], [2.0, np.nan]]),
                **dict.fromkeys(("nep", "ape", "trace"), 1.0),
                **{f"{key}_standard_error": 0.1 for key in ("nep", "ape", "trace")},
            }
            write(file, "hessian/train", spectrum, window=window, seed=seed)
            for epoch in (0, 2):
                early = own / f"csan{window}" / f"epoch{epoch:03d}.h5"
                write(early, "hessian/train", spectrum, window=window, seed=seed, epoch=epoch)
        file = folder / f"csan{window}.h5"
        for kind in ("", "_pca", "_bezier"):
            write(file, f"landscape{kind}/train", landscape(grid, kind), window=window, **CUT)
    return folder


CUT = dict(directions="random", lines=2)


def landscape(grid, kind):
    bowl = 1 + grid**2 + grid[:, None] ** 2
    bowl[0, 0] = np.inf
    arrays = {
        **{f"{part}/{m}": 1 + grid**2 for part in ("line", "test_line") for m in ("nll", "error")},
        "line/l2": 1 + grid**2,
        **{f"surface/{key}": bowl for key in ("nll", "l2")},
        "surface/done": bowl > 1.5,
        "surface/attributes": text(interpolated=True, evaluations=9, objective_error=0.01),
        **{f"{part}/xs": grid for part in ("line", "test_line", "surface")},
        "surface/ys": grid,
        "cut/ranges": text(names=["direction 1", "direction 2"], low=[-1, -1], high=[1, 1]),
        "cut/marks": np.zeros((0, 2)) if not kind else np.array([[-1, 0.5], [0.5, 1], [0, 0]]),
    }
    if not kind:
        arrays |= {f"lines/{i}/nll": 1 + (i + 1) * grid**2 for i in range(2)}
    if kind == "_pca":
        arrays["cut/extras/polar/distances"] = np.array([2.0, 1.0, 0.0])
        arrays["cut/extras/polar/angles"] = np.array([0.0, 0.5, np.nan])
        arrays["cut/extras/polar/turns"] = np.array([0.3])
    if kind == "_bezier":
        paths = {f"{p}/{m}": 1 - (grid - 1) * grid for p in ("linear", "bezier") for m in METRICS}
        arrays |= {f"cut/extras/{key}": array for key, array in (paths | {"ts": grid}).items()}
    return arrays


METRICS = ("nll", "error")


def text(**value):
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def test_draws_every_figure_once(folder, tmp_path):
    written = draw_all(folder, tmp_path / "figures", ("png", "svg"))
    assert {path.name for path in written if path.suffix == ".png"} == {
        *(f"hessian_csan{w}{e}.png" for w in (3, 8) for e in ("", "-epoch000", "-epoch002")),
        *(f"hessian_csan{w}{e}_layers.png" for w in (3, 8) for e in ("", "-epoch000", "-epoch002")),
        *(f"hessian_digits_epoch{e:03d}.png" for e in (0, 2, 12)),
        "hessian_digits_training.png",
        *(
            f"landscape{kind}_digits_{figure}.png"
            for kind in ("", "_pca", "_bezier")
            for figure in ("lines", "train_and_test", "contours", "surfaces")
        ),
        "landscape_digits_flatness.png",
        "landscape_pca_digits_polar.png",
        "landscape_bezier_digits_paths.png",
        "nll_digits.png",
        "windows_digits.png",
        "claims_digits.png",
    }
    assert set(written) == set((tmp_path / "figures").iterdir())
    for path in written:
        signature = {".png": b"\x89PNG", ".svg": b"<?xml"}[path.suffix]
        assert path.read_bytes().startswith(signature)


def test_many_seeds_share_panels_entries_and_intervals(folder, tmp_path, monkeypatch):
    grid = np.linspace(-1, 1, 5)
    for seed in (1, 2, 3):
        for window in (3, 8):
            file = folder / f"seed{seed}" / f"csan{window}.h5"
            arrays = landscape(grid, "")
            arrays |= {f"lines/{i}/nll": 1 + (i + 1 + seed) * grid**2 for i in range(2)}
            arrays["line/nll"] = 1 + (1 + seed) * grid**2
            write(file, "landscape/train", arrays, window=window, seed=seed, **CUT)
    figures = {}
    monkeypatch.setattr(
        landscapes,
        "save",
        lambda figure, out, name, formats: figures.setdefault(name, figure) and [],
    )
    landscapes.draw_landscapes(collect([folder], "landscape/train"), tmp_path)
    for panels, axes in (("contours", 2 * 2 + 2), ("surfaces", 2 * 2), ("train_and_test", 2 * 2)):
        figure = figures[f"landscape_digits_{panels}"]
        assert len(figure.axes) == axes
        assert "first seed of each" in figure.get_suptitle()
    first, *_ = figures["landscape_digits_train_and_test"].axes[0].lines
    np.testing.assert_allclose(first.get_ydata(), 1 + grid**2)
    lines = figures["landscape_digits_lines"]
    assert [len(ax.lines) for ax in lines.axes] == [8, 8, 8]
    assert [text.get_text() for text in lines.legends[0].texts] == [
        "csan3: 3×3",
        "csan8: 8×8 (global)",
    ]
    flatness = figures["landscape_digits_flatness"]
    curvature = flatness.axes[0]
    ticks = [text.get_text().replace("\n", " ") for text in curvature.get_xticklabels()]
    assert ticks == ["3×3, 4 seeds", "8×8 (global), 4 seeds"]
    dots, mean = curvature.lines[:2]
    np.testing.assert_allclose(np.sort(dots.get_ydata()), [3, 5, 7, 9])  # twice the mean factor
    assert mean.get_ydata() == pytest.approx([6])
    assert "first seed" not in flatness.get_suptitle()


def test_trainings_that_are_not_seeds_of_one_another_are_not_taken_for_such(folder, tmp_path):
    grid = np.linspace(-1, 1, 5)
    for place, options in (
        ("another", dict(seed=1)),
        ("wide", dict(seed=2, dim=96)),
        ("early", dict(seed=3, epoch=2)),
    ):
        file = folder / place / "csan3.h5"
        write(file, "landscape/train", landscape(grid, ""), window=3, **options, **CUT)
    found = collect([folder], "landscape/train")
    kinds = labels.by_architecture(found)
    assert {label: [m.path.parent.name for m in kinds[label]] for label in kinds} == {
        "3×3, dim 48, epoch 12": ["checkpoints", "another"],
        "3×3, dim 96, epoch 12": ["wide"],
        "3×3, dim 48, epoch 2": ["early"],
        "8×8 (global)": ["checkpoints"],
    }
    assert sorted(landscapes._titles(found))[:2] == ["csan3: 3×3, seed 0", "csan3: 3×3, seed 1"]
    written = landscapes.draw_landscapes(found, tmp_path / "figures", ["vtu"])
    assert len(set(written)) == len(found) == 5


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
        for loss in ("NLL + L2", "NLL")
        for window, label in ((3, "3×3"), (8, "8×8 (global)"))
    ]
    heights = traces[3]["z"]
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
    found = re.search(r" (-?\d\.\d+)\D.* (-?\d\.\d+)NLL \+ L2 (\S+)$", text)
    assert found is not None, text
    x, y, height = map(float, found.groups())
    assert height == pytest.approx(2 * (1 + x**2 + y**2), rel=1e-3)
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
    np.testing.assert_allclose(mesh.points[1:, 2], 2 * bowl.ravel()[1:])
    np.testing.assert_allclose(mesh.points[:, 0], np.tile(grid, 5))
    np.testing.assert_allclose(mesh.points[:, 1], np.repeat(grid, 5))
    np.testing.assert_allclose(mesh.point_data["NLL"][1:], bowl.ravel()[1:])
    assert np.isinf(mesh.point_data["NLL"][0])


def test_missing_packages_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(InputError, match="formats: plotly is not installed"):
        draw_all(folder, tmp_path, ["html"])


def test_snapshots_are_drawn_in_the_order_of_their_epochs(folder, tmp_path, monkeypatch):
    drawn, plot = [], plots.plot_over_training

    def record(epochs, *arguments, **options):
        drawn.append(epochs.tolist())
        return plot(epochs, *arguments, **options)

    monkeypatch.setattr(plots, "plot_over_training", record)
    draw_hessian_training(collect([folder], "hessian/train"), tmp_path)
    assert drawn == [[0, 2, EPOCHS]] * len(drawn)
    assert len(drawn) == 3 * 4  # NEP, APE and trace of two windows and two seeds


def test_needs_no_torch(folder, tmp_path):
    program = f"""
import runpy, sys

class WithoutTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, WithoutTorch())
sys.argv = ["figures", "--measurements", {str(folder)!r}, "--out", "figures"]
runpy.run_module("analysis.figures", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path.cwd()), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figures" / "nll_digits.png").exists()


def test_unfinished_measurements_are_not_drawn(folder, tmp_path):
    write(folder / "new.h5", "unfinished/hessian/train", {"eigenvalues": np.zeros((1, 1))})
    written = draw_all(folder, tmp_path / "figures")
    assert "hessian_new.png" not in {path.name for path in written}


def test_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=f"measurements: no HDF5 file in {tmp_path}"):
        draw_all(tmp_path, tmp_path)
    with pytest.raises(InputError, match="formats: 'gif' found, expected some of png, svg, pdf"):
        draw_all(tmp_path, tmp_path, ["gif"])


def test_names_and_labels(folder):
    found = {labels.name(m): m for m in collect([folder], "hessian/train")}
    snapshots = {f"csan{w}-epoch{e:03d}" for w in (3, 8) for e in (0, 2)}
    assert set(found) == {"csan3", "csan8"} | snapshots
    assert labels.label(found["csan3"]) == "3×3"
    assert labels.label(found["csan8"]) == "8×8 (global)"
    assert labels.stage(found["csan3-epoch002"]) == "end of warm-up (epoch 2)"
    assert labels.stage(found["csan8"]) == "end of training (epoch 12)"


def test_windows_keep_their_colours():
    both = labels.colors(["3×3", "8×8 (global)"])
    assert labels.colors(["8×8 (global)"])["8×8 (global)"] == both["8×8 (global)"]
    assert len(set(labels.colors(["3×3", "5×5", "8×8", "4×4", "6×6"]).values())) == 5


def test_seeds_are_pooled_and_other_recipes_are_not(folder):
    write(folder / "other.h5", "history", {}, window=3, seed=2, dim=96)
    groups = labels.by_architecture(collect([folder], "history"))
    assert {text: len(members) for text, members in groups.items()} == {
        "3×3, dim 48": 2,
        "3×3, dim 96": 1,
        "8×8 (global)": 2,
    }
    assert labels.seeds(groups) == "1 to 2 seeds"


def test_what_was_measured_differently_is_not_compared(folder):
    write(folder / "k1.h5", "hessian/train", {"eigenvalues": np.ones((1, 1))}, k=1)
    found = collect([folder], "hessian/train")
    assert len(labels.measured_alike(found)) == len(found) - 1
    layers = replace(found[0], options={**found[0].options, "layers": True})
    assert labels.measured_alike([layers, *found])[0] is layers


@pytest.fixture
def ax():
    with mpl.rc_context(plots.STYLE):
        return Figure().subplots()


def test_max_eigenvalue_density_integrates_to_the_share_of_its_half(ax):
    eigenvalues = np.concatenate([np.full(3, -1.0) * [1, 2, 4], np.geomspace(1, 100, 9)])
    for half, share in (("negative", 0.25), ("positive", 0.75)):
        ax.clear()
        plots.plot_max_eigenvalues(eigenvalues, half, ax=ax)
        x, y = ax.lines[0].get_data()
        assert trapezoid(y, np.log10(x)) == pytest.approx(share, abs=0.005)
        assert ax.get_legend_handles_labels()[1] == [f"({share:.1%})"]


def test_a_single_eigenvalue_is_named_on_its_axis(ax):
    plots.plot_max_eigenvalues(np.array([[-9.7384, 3.0]]), "negative", ax=ax)
    ax.figure.canvas.draw()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["$-9.7$"]


def test_not_a_number_is_a_hole(ax):
    plots.plot_line(np.arange(3.0), np.array([1.0, np.inf, 2.0]), ylabel="NLL", ax=ax)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [1.0, np.nan, 2.0])
    surface = np.array([[1.0, 2.0], [np.nan, np.inf]])
    assert (plots.shared_norm([surface]).vmin, plots.shared_norm([surface]).vmax) == (1.0, 2.0)
    plots.plot_max_eigenvalues(np.full((2, 2), np.nan), "negative", ax=ax)
    holes = np.tile(surface, (2, 2))
    plots.plot_contours(np.arange(4), np.arange(4), holes, ax=Figure().subplots())


def test_all_four_regions_of_the_plane_are_in_sight(ax):
    points = {"global": (1.0, 0.1, 0.2, 0.01), "local": (0.8, np.nan, 0.25, np.nan)}
    plots.plot_optimisation_plane(points, origin="global", ax=ax)
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert left < 0.8 < 1.0 < right
    assert bottom < 20 < 25 < top
    assert [text.get_text() for text in ax.texts if text.get_text()] == [
        *("stronger representation", "regularised", "overfitted", "weaker representation")
    ]


def test_infinite_samples_are_counted_and_negative_ones_in_sight(ax):
    samples = {"wide": np.array([1.0, np.inf, 2.0]), "narrow": np.array([-0.5, 0.5, 0.3])}
    plots.plot_samples(samples, ylabel="width", colors=dict.fromkeys(samples, "C0"), ax=ax)
    assert [text.get_text() for text in ax.texts] == ["1 of 3: $\\infty$"]
    bottom, top = ax.get_ylim()
    assert bottom < -0.5 < 2.0 < top
    assert across_seeds(samples["wide"]).format() == "inf"


def test_interval_over_seeds_covers_at_its_nominal_rate():
    rng = np.random.default_rng(0)
    estimates = [across_seeds(rng.normal(2.0, 3.0, 5)) for _ in range(4000)]
    covered = np.mean([abs(e.mean - 2.0) <= e.half_width for e in estimates])
    assert covered == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors
    assert np.isnan(across_seeds([1.0]).half_width)
    assert across_seeds([1.0]).format() == "1.000"
