"""Curvature while the Trainer of HuggingFace's transformers trains."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from lossgeometry.batches import Data
from lossgeometry.objective import LossFunction
from lossgeometry.tracking import CurvatureTracker

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; this callback needs: pip install transformers") from error


class CurvatureCallback(TrainerCallback):
    """A `CurvatureTracker` as a callback of HuggingFace's Trainer.

    Parameters
    ----------
    loss_fn
        None: the loss that the model itself computes, of batches with labels.
    probe
        As of `CurvatureTracker`: a batch as the data collator makes them, say.
    precondition
        Measure what the trainer's optimizer sees.
    **options
        As of `CurvatureTracker`, but `start`, which is where the trainer starts.

    Attributes
    ----------
    tracker : CurvatureTracker
        From the start of the training on; of the main process only.

    See Also
    --------
    lossgeometry.CurvatureTracker : what it measures, and the options.

    Examples
    --------
    >>> import torch
    >>> probe = {"input_ids": torch.ones(4, 8, dtype=torch.long), "labels": torch.zeros(4)}
    >>> callback = CurvatureCallback(None, probe, every=50, path="curvature.h5")
    """

    tracker: CurvatureTracker

    def __init__(
        self,
        loss_fn: LossFunction | None,
        probe: Data,
        *,
        precondition: bool = False,
        **options: Any,
    ) -> None:
        self._loss_fn, self._probe = loss_fn, probe
        self._precondition, self._options = precondition, options

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **others: Any,
    ) -> None:
        """Begin, or go on where the trainer does."""
        model: nn.Module = others["model"]
        optimizer: Optimizer = others["optimizer"]
        if state.is_world_process_zero:
            options = {
                **self._options,
                "precondition": optimizer if self._precondition else None,
                "start": state.global_step or None,
            }
            self.tracker = CurvatureTracker(model, self._loss_fn, self._probe, **options)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Measure if it is time."""
        if state.is_world_process_zero:
            self.tracker.step(state.global_step)
