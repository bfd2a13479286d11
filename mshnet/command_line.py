"""How every command of this project ends: 0 done, 1 failed on bad input (one line on stderr), 2 usage."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from mshnet.errors import InputError


def run(
    command: Callable[..., None] | Mapping[str, Callable[..., None]], prog: str, argv: Sequence[str] | None = None
) -> None:
    """Run a function as a command; its parameters become flags, its docstring the help text.

    Several functions by name are its sub-commands. Without `argv`, the process's own arguments.
    """
    import tyro

    try:
        if isinstance(command, Mapping):
            tyro.extras.subcommand_cli_from_dict(dict(command), prog=prog, args=argv)
        else:
            tyro.cli(command, prog=prog, args=argv)
    except InputError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
