"""What is studied: networks, datasets, training and checkpoints."""

from typing import TYPE_CHECKING

import lazy_loader

# Lazy, so that --help and the figures need not wait for (or have) PyTorch.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoint": ["Checkpoint", "load_checkpoint"],
        "csan": ["CSAN"],
        "data.datasets": ["ImageDataset", "load_dataset"],
    },
)

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint, load_checkpoint
    from models.csan import CSAN
    from models.data.datasets import ImageDataset, load_dataset
