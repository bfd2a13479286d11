"""SIGTERM as an orderly end: `ray job stop`, systemd and batch systems send it, and SIGKILL soon after."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM
"""As a shell says it."""
ENDING_S = 30.0
"""For so long after the first one, others do not disturb the end."""


class Stopped(SystemExit):
    """Raised in the main thread where it stands."""


@contextmanager
def orderly() -> Iterator[None]:
    """SIGTERM raises `Stopped` for the time of a block; what was in place before is there again afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and time.monotonic() - asked < ENDING_S:
            return
        asked = time.monotonic()
        raise Stopped(EXIT_CODE)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
