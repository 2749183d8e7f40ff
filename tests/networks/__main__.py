"""``python -m tests.networks``: curvature and slices of random networks, against plain PyTorch.

For each seed a network, a loss and data are made up. Products with the Hessian and the GGN,
gradients and the loss on a line have to equal what double backward in double precision gives of
the loss written down plainly, and the model has to be what it was. Each network ends as right, as
refused in one line, or as wrong; the last of these are described. Ctrl-C stops; the same command
goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tqdm import tqdm

from tests.networks.verdict import judge, reason


def verdicts(first: int, count: int, file: Path) -> list[dict]:
    """Of so many seeds; those that `file` has are not judged again."""
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {entry["seed"] for entry in known}
    left = [seed for seed in range(first, first + count) if seed not in done]
    bar = tqdm(left, initial=count - len(left), total=count, unit="network")
    with file.open("a") as log:
        for seed in bar:
            verdict = judge(seed)
            entry = {"seed": seed, "outcome": verdict.outcome, **vars(verdict)}
            known.append(entry)
            print(json.dumps(entry), file=log, flush=True)
            if verdict.wrong:
                bar.write(f"{seed}: {verdict.text}")
                for what, how in verdict.wrong.items():
                    bar.write(f"    {what}: {how}")
    return [entry for entry in known if first <= entry["seed"] < first + count]


def table(entries: list[dict]) -> str:
    """How many are right, refused (and why), and wrong."""
    outcomes = Counter(entry["outcome"] for entry in entries)
    why = Counter(
        cause
        for entry in entries
        if entry["outcome"] == "refused"
        for cause in {reason(message) for message in entry["refused"].values()}
    )
    rows = [
        ("networks", len(entries)),
        ("right", outcomes["right"]),
        ("refused in one line", outcomes["refused"]),
        *((f"- {cause}", count) for cause, count in why.most_common()),
        ("wrong", outcomes["wrong"]),
    ]
    return "\n".join(["| | |", "|---|---:|", *(f"| {what} | {n:,} |" for what, n in rows)])


def main() -> int:
    """Parse the options, judge, print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.networks", description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="the first of as many as there are")
    parser.add_argument("--file", type=Path, help="where verdicts are kept, a line each")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of PyTorch, about what the networks do
    torch.set_num_threads(1)
    file = options.file or Path(tempfile.gettempdir(), f"networks-{torch.__version__}.jsonl")
    try:
        entries = verdicts(options.seed, options.count, file)
    except KeyboardInterrupt:
        print(f"\nverdicts so far are in {file}")
        return 130
    print(table(entries))
    print(f"\nPython {platform.python_version()}, PyTorch {torch.__version__}; details in {file}")
    return int(any(entry["outcome"] == "wrong" for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
