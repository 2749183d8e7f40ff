"""Curvature of a training objective: operators, eigenvalues, spectral densities, traces."""
