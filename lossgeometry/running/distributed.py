"""Processes that work on one thing together: those that torchrun started, or this one alone."""

from __future__ import annotations

import os
from functools import cache

from lossgeometry.running.team import ALONE, Team


@cache
def join(device: str = "cpu") -> Team:
    """The team of all processes that ``torchrun`` started; this process alone without it.

    Parameters
    ----------
    device : {"cpu", "cuda", "auto"}
        What the processes compute on: they talk by gloo or NCCL, and each takes the GPU of its
        local rank. "auto" is a GPU if there is one.

    See Also
    --------
    lossgeometry.Hessian : takes a team, whose processes share the data.
    lossgeometry.surface : takes a team, whose processes share the points.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    from lossgeometry.running.processes import connect

    return connect(device)
