"""Curvature while Lightning trains."""

from __future__ import annotations

from typing import Any

from lossgeometry.batches import Data
from lossgeometry.objective import LossFunction
from lossgeometry.tracking import CurvatureTracker

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; this callback needs: pip install lightning") from error


class CurvatureCallback(Callback):
    """A `CurvatureTracker` as a callback of Lightning's Trainer, with rows for its loggers.

    Parameters
    ----------
    loss_fn
        ``loss_fn(outputs, targets)`` of what the module returns for a batch of the probe.
    probe
        As of `CurvatureTracker`.
    precondition
        Measure what the trainer's optimizer sees; with several of them, the first.
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
    >>> from torch.nn.functional import mse_loss
    >>> callback = CurvatureCallback(mse_loss, (torch.ones(8, 2), torch.ones(8, 1)), every=50)
    >>> trainer = Trainer(callbacks=[callback], logger=False)  # doctest: +SKIP
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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on where the trainer does."""
        if not trainer.is_global_zero:
            return
        log = self._options.get("log")

        def to_loggers(row: dict[str, float]) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(row, step=int(row["step"]))
            if log is not None:
                log(row)

        options = {
            **self._options,
            "precondition": trainer.optimizers[0] if self._precondition else None,
            "start": trainer.global_step or None,
            "log": to_loggers,
        }
        self.tracker = CurvatureTracker(pl_module, self._loss_fn, self._probe, **options)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *batch: Any, **named: Any
    ) -> None:
        """Measure if the optimizer has made a step, and it is time."""
        if trainer.is_global_zero:
            self.tracker.step(trainer.global_step)
