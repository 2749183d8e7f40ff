"""Stored measurements: their files, their form, and what they are called."""
