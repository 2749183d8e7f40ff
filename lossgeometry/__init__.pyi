from . import plots
from .algorithms.density import SpectralDensity, spectral_density
from .algorithms.eigensolver import Eigenpairs, SymmetricOperator, eigsh
from .algorithms.estimate import Estimate
from .algorithms.spectrum import MaxEigenvalueSpectrum, max_eigenvalue_spectrum
from .algorithms.trace import diagonal, frobenius_norm, trace
from .errors import InputError
from .functional import FunctionModule
from .landscape.connectivity import Bezier, Path, bezier_path, fit_bezier, linear_path
from .landscape.directions import (
    Direction,
    Plane,
    eigenvector_directions,
    gradient_direction,
    pca_directions,
    plane,
    random_directions,
    towards,
)
from .landscape.flatness import Flatness, flatness
from .landscape.sampling import Slice
from .landscape.slices import line, surface
from .landscape.trajectories import PolarTrajectory, Trajectory, polar, project, trajectory
from .operators.base import CurvatureOperator
from .operators.checking import Check
from .operators.ggn import GGN, Fisher
from .operators.hessian import Hessian
from .operators.layers import per_layer
from .operators.precondition import Preconditioned, stability_threshold
from .pages.results import report
from .storing import open_measurement
from .tracking import CurvatureHistory, CurvatureTracker

__all__ = [
    "GGN",
    "Bezier",
    "Check",
    "CurvatureHistory",
    "CurvatureOperator",
    "CurvatureTracker",
    "Direction",
    "Eigenpairs",
    "Estimate",
    "Fisher",
    "Flatness",
    "FunctionModule",
    "Hessian",
    "InputError",
    "MaxEigenvalueSpectrum",
    "Path",
    "Plane",
    "PolarTrajectory",
    "Preconditioned",
    "Slice",
    "SpectralDensity",
    "SymmetricOperator",
    "Trajectory",
    "bezier_path",
    "diagonal",
    "eigenvector_directions",
    "eigsh",
    "fit_bezier",
    "flatness",
    "frobenius_norm",
    "gradient_direction",
    "line",
    "linear_path",
    "max_eigenvalue_spectrum",
    "open_measurement",
    "pca_directions",
    "per_layer",
    "plane",
    "plots",
    "polar",
    "project",
    "random_directions",
    "report",
    "spectral_density",
    "stability_threshold",
    "surface",
    "towards",
    "trace",
    "trajectory",
]
