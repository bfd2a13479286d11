"""Where an update's time goes: named regions of the code."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch

Region = Literal[
    "loader wait",
    "backbone",
    "similarity",
    "merging",
    "loss",
    "backward",
    "optimizer",
    "communication",
    "checkpoint copy",
]
REGIONS: tuple[Region, ...] = get_args(Region)
"""The parts of an update, in the order in which it meets them."""

_NOTHING: AbstractContextManager[Any] = nullcontext()


def region(name: Region) -> AbstractContextManager[Any]:
    """Names what runs inside `with region(name):` in a profiler's trace; nothing while no profiler records.

    Regions may nest; time counts for the innermost. Inside compiled code they do nothing: put them around it.
    """
    if torch.compiler.is_compiling() or not torch.autograd.profiler._is_profiler_enabled:
        return _NOTHING
    return torch.profiler.record_function(name)
