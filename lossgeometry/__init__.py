"""Curvature and slices of the loss of any PyTorch module.

Operators (`Hessian`, `GGN`, `Fisher`) and what is computed of them (`eigsh`, `spectral_density`,
`trace`, ...), the loss along directions in weight space (`line`, `surface`, ...), and
`lossgeometry.plots`.
"""

import lazy_loader

# Lazy, so that plots need not wait for (or have) PyTorch; the names are those of __init__.pyi.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
