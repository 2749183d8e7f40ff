"""Tables on terminals of any width."""

import re

import pytest

from analysis.tables import print_table

COLUMNS = ["checkpoint", "train NLL", "95 % interval", "verdict"]
ROWS = [
    [
        "    NLL_train(3, 3 heads) - NLL_train(3, 1 head) > 0",
        "0.123456 ± 0.001234",
        "-1.25 to +0.25",
        "",
    ],
    ["checkpoints/a_long_folder/csan3.pt", "inf", "–", "does not hold (unpaired: undecided)"],
]


@pytest.mark.parametrize("width", [20, 80, 100, 120, 200])
def test_no_number_is_cut(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    print_table("A title", COLUMNS, ROWS)
    printed = capsys.readouterr().out
    assert "…" not in printed
    printed = re.sub(r"\x1b\[\d*m", "", printed)
    assert {word for row in ROWS for cell in row for word in cell.split()} <= set(printed.split())
    assert width < 80 or max(map(len, printed.split("\n"))) <= width
