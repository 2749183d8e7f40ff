"""A part of ``python -m tests.fuzz``: random input ends in success or one line."""

from tests.fuzz.__main__ import OUTCOMES, fuzz

INPUTS = 2000


def test_random_inputs_end_in_success_or_one_line(tmp_path):
    _, shared, done = fuzz(INPUTS, 1, float("inf"), tmp_path / "kept", quiet=True)
    assert done == INPUTS
    total = dict.fromkeys(OUTCOMES, 0)
    for i, count in enumerate(shared.counts):
        total[OUTCOMES[i % len(OUTCOMES)]] += count
    assert sum(total.values()) == INPUTS
    assert total["refused"] > INPUTS / 3
    assert total["accepted"] > INPUTS / 20
    failed = {f.name: f.read_text() for f in (tmp_path / "kept").glob("*.txt")}
    assert not failed
    assert sum(total[key] for key in OUTCOMES[2:]) == 0
