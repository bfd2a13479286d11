"""What the bars of Ray's workers come to where there is no terminal; the bars themselves are the method's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from mshnet.progress import LINE_S, Lines, bar

__all__ = ["LINE_S", "Lines", "WorkersLines", "bar"]


class WorkersLines:
    """What the bars of Ray's workers come to where there is no terminal. Takes the states that they send."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said: dict[str, float] = {}

    def __call__(self, state: Mapping[str, Any]) -> None:
        now = self._clock()
        if state["closed"]:
            self._said.pop(state["uuid"], None)  # the worker says itself how it ended
        elif now - self._said.setdefault(state["uuid"], now) >= LINE_S:
            self._said[state["uuid"]] = now
            print(f"{state['desc']} · {state['unit']} {state['x']}/{state['total']}", file=sys.stderr, flush=True)
