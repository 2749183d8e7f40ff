"""Networks by name, as checkpoints describe them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from models.convnext import ConvNeXt
from models.csan import CSAN
from models.description import require
from models.replknet import RepLKNet
from models.van import VAN, GatedConvNet

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "csan": CSAN,
    "convnext": ConvNeXt,
    "replknet": RepLKNet,
    "van": VAN,
    "gated": GatedConvNet,
}

CSAN_OPTIONS = ("heads", "window", "head_window", "border", "pooling")  # beside the skeleton's


def build_network(architecture: Mapping[str, Any]) -> nn.Module:
    """Build the network that an architecture describes, with weights yet to be loaded.

    Parameters
    ----------
    architecture : mapping
        Options of the network, and as "network" its name; without one it is a CSAN.

    Raises
    ------
    InputError
        If there is no such network, or an option is out of range.
    TypeError
        If there is no such option.
    """
    options = dict(architecture)
    name = options.pop("network", "csan")
    require(name in NETWORKS, "network", name, f"one of {', '.join(NETWORKS)}")
    return NETWORKS[name](**options)


def count_parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters())


def parameters_of(architecture: Mapping[str, Any]) -> int:
    """How many parameters the network has that an architecture describes."""
    with torch.device("meta"):
        return count_parameters(build_network(architecture))


def with_parameters(architecture: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    """An architecture with the mlp_ratio that brings it closest to so many parameters.

    What a large kernel takes is given up by the perceptrons, which keep one hidden unit.
    """

    def of_width(hidden: int) -> dict[str, Any]:
        return {**architecture, "mlp_ratio": hidden / architecture["dim"]}

    one, two = (parameters_of(of_width(hidden)) for hidden in (1, 2))
    return of_width(max(1 + round((parameters - one) / (two - one)), 1))
