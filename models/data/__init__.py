"""Datasets, their augmentation and their corruption."""
