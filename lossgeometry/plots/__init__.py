"""Plots of measurements: arrays in, ``ax`` out, composable, in one style.

Every function draws into `ax` (the current axes by default) and returns it. NaN and infinity are
left as holes. Names and labels are drawn as they are, in lines that fit. This package needs no
PyTorch.
"""

from lossgeometry.plots.forest import plot_forest
from lossgeometry.plots.landscapes import (
    labelled_levels,
    plot_contours,
    plot_evaluated,
    plot_line,
    plot_polar,
    plot_samples,
    plot_surface,
    plot_twin,
    plot_way,
    shared_norm,
)
from lossgeometry.plots.robustness import plot_bars, plot_contact_sheet
from lossgeometry.plots.spectra import (
    plot_layers,
    plot_max_eigenvalues,
    plot_over_training,
    plot_spectra_over_training,
    plot_spectral_density,
)
from lossgeometry.plots.style import (
    LEGEND,
    LINES,
    STYLE,
    fitted,
    literal,
    log_scale,
    tell_apart,
    width,
    wrapped,
)
from lossgeometry.plots.training import (
    plot_curvature,
    plot_families,
    plot_history,
    plot_optimisation_plane,
    plot_points,
)
