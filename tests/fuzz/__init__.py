"""Hostile and broken input, made at random from small valid files; see `tests.fuzz.__main__`."""
