"""Loss landscapes: directions in weight space and the slices of the loss along them."""

from typing import TYPE_CHECKING

import lazy_loader

# Lazy, so that --help and the figures need not wait for (or have) PyTorch.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "connectivity": ["Bezier", "Path", "bezier_path", "fit_bezier", "linear_path"],
        "directions": [
            "Direction",
            "Plane",
            "eigenvector_directions",
            "gradient_direction",
            "pca_directions",
            "plane",
            "random_directions",
            "towards",
        ],
        "sampling": ["Slice"],
        "slices": ["line", "surface"],
        "summary": ["Flatness", "flatness"],
        "trajectories": ["PolarTrajectory", "Trajectory", "polar", "project", "trajectory"],
    },
)

if TYPE_CHECKING:
    from analysis.landscape.connectivity import (
        Bezier,
        Path,
        bezier_path,
        fit_bezier,
        linear_path,
    )
    from analysis.landscape.directions import (
        Direction,
        Plane,
        eigenvector_directions,
        gradient_direction,
        pca_directions,
        plane,
        random_directions,
        towards,
    )
    from analysis.landscape.sampling import Slice
    from analysis.landscape.slices import line, surface
    from analysis.landscape.summary import Flatness, flatness
    from analysis.landscape.trajectories import (
        PolarTrajectory,
        Trajectory,
        polar,
        project,
        trajectory,
    )
