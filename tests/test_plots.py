"""What single panels show."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.integrate import trapezoid

from analysis import plots
from analysis.statistics import across_seeds


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
