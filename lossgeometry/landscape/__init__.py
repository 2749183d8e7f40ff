"""Directions in weight space, and slices of the loss along them."""
