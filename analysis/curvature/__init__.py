"""Curvature of a training objective: operators, eigenvalues, spectral densities, traces."""

from analysis.curvature.density import SpectralDensity, spectral_density
from analysis.curvature.eigensolver import Eigenpairs, SymmetricOperator, eigsh
from analysis.curvature.estimate import Estimate
from analysis.curvature.ggn import GGN, Fisher
from analysis.curvature.hessian import Hessian
from analysis.curvature.layers import per_layer
from analysis.curvature.operators import Check, CurvatureOperator
from analysis.curvature.spectrum import MaxEigenvalueSpectrum, max_eigenvalue_spectrum
from analysis.curvature.trace import diagonal, frobenius_norm, trace
from analysis.functional import FunctionModule

__all__ = [
    "GGN",
    "Check",
    "CurvatureOperator",
    "Eigenpairs",
    "Estimate",
    "Fisher",
    "FunctionModule",
    "Hessian",
    "MaxEigenvalueSpectrum",
    "SpectralDensity",
    "SymmetricOperator",
    "diagonal",
    "eigsh",
    "frobenius_norm",
    "max_eigenvalue_spectrum",
    "per_layer",
    "spectral_density",
    "trace",
]
