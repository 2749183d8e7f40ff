"""What checkpoints make of corrupted images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from analysis.measurements.recording import Recording
from analysis.outcomes import outcomes
from models.checkpoint import Checkpoint
from models.data.corruptions import CORRUPTIONS, SEVERITIES, corrupted_dataset
from models.data.datasets import ImageDataset

SHAPE = (len(CORRUPTIONS), SEVERITIES)


def measure_robustness(
    checkpoints: Mapping[Recording, Checkpoint],
    dataset: ImageDataset,
    *,
    official: Path | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Measure the robustness of checkpoints of one dataset, and record it.

    Every corruption is taken from the `official` arrays or generated, once for all checkpoints, by
    one of the recordings' team.
    """
    team = next(iter(checkpoints)).team
    arrays = {recording: recording.begun or _blank(len(dataset)) for recording in checkpoints}
    for recording, own in arrays.items():
        nll, correct = outcomes(checkpoints[recording], dataset, device, team)
        own["clean_nll"], own["clean_error"] = nll.mean(dtype=float), 1 - correct.mean()
    lacking = [[r for r in checkpoints if not arrays[r]["done"][k]] for k in range(SHAPE[0])]
    todo = [k for k, lack in enumerate(lacking) if lack]

    def corrupted(i: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """NLL (5,), error (5,) and how often each image is wrong, of each who lacks them."""
        k = todo[i]
        scores = [(np.empty(5), np.empty(5), np.zeros(len(dataset), np.uint8)) for _ in lacking[k]]
        for s in range(SEVERITIES):
            images = corrupted_dataset(dataset, CORRUPTIONS[k], s + 1, official=official, seed=seed)
            for recording, (nll, error, wrong) in zip(lacking[k], scores, strict=True):
                nlls, correct = outcomes(checkpoints[recording], images, device)
                nll[s], error[s] = nlls.mean(dtype=float), 1 - correct.mean()
                wrong += ~correct
        return scores

    total = SHAPE[0] * len(checkpoints)
    there = total - sum(map(len, lacking))
    bar = tqdm(total=total, initial=there, desc="robustness", unit="corruption", disable=None)
    for i, scores in team.share(len(todo), corrupted):
        k = todo[i]
        for recording, (nll, error, wrong) in zip(lacking[k], scores, strict=True):
            own = arrays[recording]
            own["nll"][k], own["error"][k], own["wrong"][:, k] = nll, error, wrong
            own["done"][k] = True
            if team.rank == 0:
                recording.save(own)
            bar.update()
    bar.close()
    for recording, own in arrays.items():
        recording.finish(_summary(own))


def _blank(images: int) -> dict[str, Any]:
    """Arrays to fill: mean NLL and error (15, 5), and how often each image was wrong of 5."""
    return {
        "nll": np.full(SHAPE, np.nan),
        "error": np.full(SHAPE, np.nan),
        "wrong": np.zeros((images, SHAPE[0]), dtype=np.uint8),
        "done": np.zeros(SHAPE[0], dtype=bool),
    }


def _summary(filled: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: array for key, array in filled.items() if key != "done"},
        "corruptions": np.array(CORRUPTIONS, dtype=bytes),
        "mean_corruption_error": filled["error"].mean(),
        "image_error": np.float32(filled["wrong"].sum(1) / filled["error"].size),
    }
