"""How it is measured: curvature, loss landscapes, train NLL, and the figures of all three."""
