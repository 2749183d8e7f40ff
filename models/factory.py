"""Models by name: torchvision's, timm's, or what a function of your own returns."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from operator import attrgetter
from typing import Any

from torch import nn

from lossgeometry.errors import InputError, one_line, shown
from models.specs import split_spec

_FORMS = "expected torchvision:NAME, timm:NAME or MODULE:FACTORY, with options as NAME?key=1&key=2"


def build_model(spec: str, *, classes: int, channels: int) -> nn.Module:
    """Build the model that a spec names, with weights that are yet to be loaded.

    Parameters
    ----------
    spec : str
        ``torchvision:resnet18``, ``timm:vit_tiny_patch16_224?img_size=32&patch_size=4`` or
        ``package.module:factory?width=2``: where the model comes from, its name, and the options it
        is built with, each value a Python literal or else a text. A module of your own is looked
        for in the current folder, too; importing it runs it.
    classes, channels : int
        Passed as the options ``num_classes`` and ``in_chans`` where the model has them, unless the
        spec does.

    Raises
    ------
    InputError
        If the spec is malformed or the model cannot be built.
    """
    place, given = split_spec(spec, "model", _FORMS)
    source, _, name = place.partition(":")
    if not source or not name:
        raise InputError(f"model: {shown(spec)} found, {_FORMS}")
    options = {"num_classes": classes, "in_chans": channels}
    try:
        match source:
            case "torchvision":
                from torchvision.models import get_model

                del options["in_chans"]  # none of them has it
                model = get_model(name, **options | given)
            case "timm":
                import timm

                model = timm.create_model(name, **options | given)
            case _:
                factory = attrgetter(name)(_import(source))
                accepted = inspect.signature(factory).parameters
                options = {key: value for key, value in options.items() if key in accepted}
                model = factory(**options | given)
    # SystemExit: a script that ends itself when it is imported.
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == source == "timm":
            needed = "timm is not installed, expected pip install timm"
            raise InputError(f"model: {shown(spec)}: {needed}") from error
        reason = one_line(f"{type(error).__name__}: {error}")
        raise InputError(f"model: {shown(spec)} cannot be built: {reason}") from error
    if not isinstance(model, nn.Module):
        found = type(model).__name__
        raise InputError(f"model: {shown(spec)} gives a {found}, expected a torch.nn.Module")
    return model


def _import(module: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:  # it is with python -m, but not everywhere else
        sys.path.insert(0, here)
    return importlib.import_module(module)
