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
    """What a block ended with."""


@contextmanager
def orderly() -> Iterator[None]:
    """SIGTERM raises SystemExit in a block, and the block then `Stopped`; afterwards what was in place before is again.

    Inside it can be any SystemExit: Ray makes one of its own of what is raised while it waits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and time.monotonic() - asked < ENDING_S:
            return
        asked = time.monotonic()
        raise SystemExit(EXIT_CODE)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit:
        if asked:
            raise Stopped(EXIT_CODE) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
