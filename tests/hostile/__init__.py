"""Input that was made to do harm: each kind refused with one line."""

MEBIBYTE = 2**20
