"""What single panels show."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.integrate import trapezoid

from lossgeometry import plots
from lossgeometry.statistics import across_seeds


@pytest.fixture
def ax():
    with mpl.rc_context(plots.STYLE):
        return figure().subplots()


def figure(**options):
    """One that is drawn into memory."""
    made = Figure(**options)
    FigureCanvasAgg(made)
    return made


def test_max_eigenvalue_density_integrates_to_the_share_of_its_half(ax):
    eigenvalues = np.concatenate([-np.geomspace(1, 4, 12), np.geomspace(1, 100, 36)])
    for half, share in (("negative", 0.25), ("positive", 0.75)):
        ax.clear()
        plots.plot_max_eigenvalues(eigenvalues, half, ax=ax)
        x, y = ax.lines[0].get_data()
        assert trapezoid(y, np.log10(x)) == pytest.approx(share, abs=0.005)
        assert ax.get_legend_handles_labels()[1] == [f"({share:.1%})"]


def test_few_eigenvalues_are_ticks_without_a_density(ax):
    plots.plot_max_eigenvalues(np.array([[-1.0, -2.0, 3.0]]), "negative", ax=ax)
    curve, *ticks = ax.lines
    assert len(curve.get_xdata()) == 0
    assert [tick.get_xdata()[0] for tick in ticks] == [1, 2]
    assert not ax.yaxis.get_visible()  # there is no density to read off
    plots.plot_max_eigenvalues(-np.geomspace(1, 4, 12), "negative", ax=ax)
    assert ax.yaxis.get_visible()


def test_axes_of_networks_far_apart_are_logarithmic(ax):
    near, far = (("", 0.14, 0.01, 0.01, 0.001), ("", 0.71, 0.1, 0.012, 0.001))
    plots.plot_families({"near": [near], "far": [far]}, ax=ax)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    ax.clear()
    plots.plot_families({"none errs": [("", 0.14, 0.01, 0.0, 0.0)], "far": [far]}, ax=ax)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")


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


@pytest.mark.parametrize(
    ("eigenvalues", "limits"),
    [([[7.0, -2.0], [np.nan, 1e-9]], (-2, 7)), ([[8.6, 1.0]], (0, 8.6)), ([[-3.0, -1.0]], (-3, 0))],
)
def test_colours_of_layers_are_named_as_far_as_they_occur(eigenvalues, limits, ax):
    names = [f"layer {i}" for i in range(len(eigenvalues))]
    plots.plot_layers(names, np.array(eigenvalues), ax=ax)
    image, bar = ax.images[0], ax.figure.axes[1]
    assert image.norm.vmin == -image.norm.vmax
    assert bar.get_ylim() == pytest.approx(limits)
    ax.figure.canvas.draw()
    low, high = limits
    values = [value for value in bar.get_yticks() if low <= value <= high]
    heights = bar.transData.transform([(0, value) for value in values])[:, 1]
    assert np.diff(np.sort(heights)).min() > 10  # pixels: labels do not overlap


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
    assert [text.get_text() for text in ax.texts] == ["1 of 3: ∞"]
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


GRID = np.linspace(-1, 1, 9)
BOWL = 1 + GRID**2 + GRID[:, None] ** 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("solid", [False, True])
@pytest.mark.parametrize(
    "values",
    [np.full((9, 9), 2.3), np.zeros((9, 9)), 2.3 + 1e-14 * BOWL, BOWL.astype(np.float16), -BOWL],
)
def test_flat_and_odd_surfaces_are_drawn_whole(values, solid):
    ax = figure().add_subplot(projection="3d" if solid else None)
    (plots.plot_surface if solid else plots.plot_contours)(GRID, GRID, values, ax=ax)
    ax.figure.canvas.draw()
    assert not ax.texts or not any("everywhere" in text.get_text() for text in ax.texts)
    norm = plots.shared_norm([values])
    assert norm.vmin <= values.min() <= values.max() <= norm.vmax
    assert norm.vmin < norm.vmax
    if np.ptp(values) == 0:  # in the middle of the scale
        assert float(norm(values).mean()) == pytest.approx(0.5, abs=0.02)


def pixel(ax, x, y):
    """Colour of what is drawn at a point, in [0, 1]."""
    canvas = ax.figure.canvas
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())
    column, row = ax.transData.transform((x, y)).astype(int)
    return image[image.shape[0] - 1 - row, column, :3] / 255


@pytest.mark.filterwarnings("error")
def test_kinds_of_holes_have_their_colours_and_are_counted():
    values = BOWL.copy()
    values[:3, :3], values[6:, :3], values[4, 6] = np.nan, np.inf, -np.inf
    ax = plots.plot_contours(GRID, GRID, values, ax=figure().subplots())
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["NaN at 9 of 81", "∞ at 9 of 81", "-∞ at 1 of 81"]
    patches = ax.get_legend().get_patches()
    for patch, place in zip(patches, ((-0.75, -0.75), (-0.75, 0.75), (0.5, 0)), strict=True):
        np.testing.assert_allclose(pixel(ax, *place), patch.get_facecolor()[:3], atol=0.01)
    assert ax.get_xlim() == ax.get_ylim() == (-1, 1)


@pytest.mark.parametrize("solid", [False, True])
@pytest.mark.parametrize(
    ("values", "said"),
    [(np.nan, "NaN everywhere"), (np.inf, "∞ everywhere"), ([np.nan, np.inf], "finite nowhere")],
)
def test_surfaces_without_a_number_say_so(values, said, solid):
    ax = figure().add_subplot(projection="3d" if solid else None)
    surface = np.resize(values, (9, 9))
    (plots.plot_surface if solid else plots.plot_contours)(GRID, GRID, surface, ax=ax)
    ax.figure.canvas.draw()
    assert said in [text.get_text() for text in ax.texts]


def test_a_single_finite_point_is_seen():
    values = np.where(np.arange(81).reshape(9, 9) == 30, 1.0, np.nan)
    ax = plots.plot_contours(GRID, GRID, values, ax=figure().subplots())
    middle = mpl.colormaps[mpl.rcParams["image.cmap"]](0.5)[:3]
    np.testing.assert_allclose(pixel(ax, GRID[3], GRID[3]), middle, atol=0.02)


@pytest.mark.parametrize("background", [BOWL, 4 - BOWL, np.full((9, 9), np.nan)])
def test_the_cross_is_light_in_dark(background):
    ax = plots.plot_contours(GRID, GRID, background, ax=figure(dpi=200).subplots())
    canvas = ax.figure.canvas
    canvas.draw()
    x, y = ax.transData.transform((0, 0)).astype(int)
    image = np.asarray(canvas.buffer_rgba())[::-1][y - 9 : y + 9, x - 9 : x + 9, :3]
    lightness = image.mean(axis=2)
    assert lightness.min() < 40
    assert lightness.max() > 240


def test_faces_have_the_colour_of_the_mean_of_their_corners():
    values = np.array([[1.0, 10.0], [100.0, 1000.0]])
    ax = plots.plot_surface(
        np.arange(2), np.arange(2), values, ax=figure().add_subplot(projection="3d")
    )
    (face,) = ax.collections[0].get_facecolor()
    expected = mpl.colormaps[plots.STYLE["image.cmap"]](0.5)  # on the scale of logarithms
    np.testing.assert_allclose(face, expected, atol=0.01)


NAME = "_a$b$_" + "long_name-" * 15


def test_a_way_has_the_epochs_of_its_points(ax):
    steps = np.arange(6.0).reshape(3, 2)
    plots.plot_way(steps, numbers=[0, 5, 60], ax=ax)
    assert sorted(text.get_text() for text in ax.texts) == ["0", "5", "60"]


def test_of_points_of_a_way_that_touch_the_last_is_numbered(ax):
    plots.plot_way(np.array([[0, 0], [8, 5], [9.9, 6], [10, 6], [10, 6.1]]), ax=ax)
    assert sorted(text.get_text() for text in ax.texts) == ["0", "1", "4"]


def test_names_are_drawn_as_they_are(ax):
    plots.plot_line(GRID, GRID, ylabel="NLL", label=NAME, ax=ax)
    (text,) = ax.legend().get_texts()
    ax.figure.canvas.draw()
    drawn, formula = text._preprocess_math(text.get_text().replace("\n", ""))
    assert not formula
    assert drawn.lstrip("\N{ZERO WIDTH SPACE}") == NAME


@pytest.mark.parametrize(
    "plot",
    [
        lambda ax: plots.plot_layers([NAME, "b"], np.eye(2), ax=ax),
        lambda ax: plots.plot_bars({NAME: (1, 0.1)}, ylabel="y", colors={NAME: "C0"}, ax=ax),
        lambda ax: plots.plot_forest([(NAME, 1, 0, 2, "C0")], xlabel="x", ax=ax),
        lambda ax: plots.plot_line(GRID, GRID, ylabel="y", label=NAME, ax=ax).legend(),
        lambda ax: plots.plot_samples(
            {NAME: np.arange(3.0)}, ylabel="y", colors={NAME: "C0"}, ax=ax
        ),
    ],
)
@pytest.mark.filterwarnings("error")
def test_long_names_fit(plot, ax):
    with mpl.rc_context(plots.STYLE):
        plot(ax)
        ax.figure.canvas.draw()
    legend = ax.get_legend()
    texts = [*ax.get_xticklabels(), *ax.get_yticklabels(), *(legend.get_texts() if legend else ())]
    named = [text for text in texts if "name" in text.get_text()]
    assert named
    whole = ax.figure.bbox
    for text in named:
        box = text.get_window_extent()
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1


@pytest.mark.filterwarnings("error")
def test_gaps_of_lines_say_what_they_are(ax):
    values = np.array([np.inf, np.inf, 2, 1, 0.5, np.nan, 1, 2, -np.inf])
    plots.plot_line(GRID, values, ylabel="NLL", ax=ax)
    places = {text.get_text(): text.get_position()[0] for text in ax.texts}
    assert places == pytest.approx({"NaN": GRID[5], "∞": GRID[:2].mean(), "-∞": 1})
    assert ax.get_xlim()[0] < -1 < 1 < ax.get_xlim()[1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_trainings_that_diverged_are_drawn(value, ax):
    points = {"global": (1.0, 0.1, 0.2, 0.01), "local": (value, value, 0.25, np.nan)}
    for origin in points:
        ax.clear()
        plots.plot_optimisation_plane(points, origin=origin, ax=ax)
        ax.figure.canvas.draw()
    density = np.array([1.0, value, 0.1])
    plots.plot_spectral_density(np.arange(3), density, density, ax=ax)
    ax.figure.canvas.draw()
