"""Random networks, losses and batches, and whether curvature and slices of them are right."""
