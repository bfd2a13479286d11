"""Progress: bars on a terminal, in a file or a job's log lines now and then."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE_S = 60.0
"""Between two lines of the same progress, where nothing else asks for one."""
FORMAT = "{desc}: {n_fmt}/{total_fmt}{postfix}, after {elapsed}"


class Lines(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A bar that is written as a line each time that it is shown."""

    disable: bool

    def __init__(self, *arguments: Any, **options: Any) -> None:
        counted = options.get("unit") == "image"
        bar_format = f"{FORMAT}, {{rate_fmt}}" if counted else FORMAT
        self._last_line = counted
        super().__init__(*arguments, **{"mininterval": LINE_S, **options, "bar_format": bar_format, "miniters": 1})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Not before anything was done."""
        if self.n:
            print(self, file=sys.stderr, flush=True)
        return True

    def update(self, n: int | float | None = 1) -> bool | None:
        """Images end with a line, for their rate: at once, not when the rest of the job has ended too."""
        shown: bool | None = super().update(n)
        if self._last_line and self.n >= self.total:
            self._last_line = False
            return self.display()
        return shown

    def close(self) -> None:
        """The last line is there, and no bar to be wiped out."""
        self.disable = True


def bar(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """tqdm's, on stderr."""
    return (tqdm if sys.stderr.isatty() else Lines)(items, file=sys.stderr, **options)
