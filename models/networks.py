"""Networks by name, as checkpoints describe them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

from torch import nn

from models.convnext import ConvNeXt
from models.csan import CSAN
from models.description import PYRAMIDS, require
from models.meta import without_weights
from models.pyramids import build_pyramid
from models.replknet import RepLKNet
from models.van import VAN, GatedConvNet

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "csan": CSAN,
    "convnext": ConvNeXt,
    "replknet": RepLKNet,
    "van": VAN,
    "gated": GatedConvNet,
    **{name: partial(build_pyramid, name) for name in PYRAMIDS},
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
    return _parameters_of(tuple(architecture.items()))


@lru_cache
def _parameters_of(options: tuple[tuple[str, Any], ...]) -> int:
    with without_weights():
        return count_parameters(build_network(dict(options)))


def with_parameters(architecture: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    """An architecture with the mlp_ratio that brings it closest to so many parameters.

    The perceptrons keep at least one hidden unit.
    """

    def of_width(hidden: int) -> dict[str, Any]:
        return {**architecture, "mlp_ratio": hidden / architecture["dim"]}

    one, two = (parameters_of(of_width(hidden)) for hidden in (1, 2))
    return of_width(max(1 + round((parameters - one) / (two - one)), 1))


def with_width(architecture: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    """An architecture of `models.pyramids` with the dim that brings it closest to so many.

    Of those up to twice its own that its heads divide; of a ResNet, which has none, of the even
    ones.
    """
    step = architecture.get("heads", 2)

    def of_width(steps: int) -> dict[str, Any]:
        return {**architecture, "dim": step * steps}

    def count(steps: int) -> int:
        return parameters_of(of_width(steps))

    above = bisect_left(range(1, 2 * architecture["dim"] // step), parameters, key=count) + 1
    return of_width(min((max(above - 1, 1), above), key=lambda n: abs(count(n) - parameters)))
