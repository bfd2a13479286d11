"""How every command of this project ends: 0 done, 1 failed on bad input (one line on stderr), 2 usage."""

from __future__ import annotations

import sys
from collections.abc import Callable

from mshnet.errors import InputError


def run(command: Callable[..., None], prog: str) -> None:
    """Run a function as a command; its parameters become flags, its docstring the help text."""
    import tyro

    try:
        tyro.cli(command, prog=prog)
    except InputError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
