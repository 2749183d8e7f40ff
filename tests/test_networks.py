"""A part of ``python -m tests.networks``: random networks are right, or refused in one line."""

import re

import pytest

from tests.networks.verdict import judge

NETWORKS = 200
REFUSALS = (
    r"micro_batch: \d would change the result: .*",
    r"model: PyTorch has no second derivative of multi_margin_loss, expected .*",
    r"check: wrong",  # what is computed without a gradient depends on the weights
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(0, NETWORKS, 50))
def test_random_networks_are_right_or_refused_in_one_line(first):
    verdicts = {seed: judge(seed) for seed in range(first, first + 50)}
    wrong = {(seed, v.text): v.wrong for seed, v in verdicts.items() if v.wrong}
    assert not wrong
    refused = [v for v in verdicts.values() if v.refused]
    assert len(refused) < 50 / 3
    for verdict in refused:
        for message in verdict.refused.values():
            assert any(re.fullmatch(known, message) for known in REFUSALS), message
