"""Eigenvalues, spectral densities and traces of operators."""
