"""`python -m mshnet VERB ...`, also the console script `mshnet`: a verb's module is loaded when asked for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from mshnet.command_line import run

VERBS: Mapping[str, tuple[str, str]] = {
    "segment": ("mshnet.commands.segment", "pictures of your own, by a few labelled examples or learnt classes"),
    "learn": ("mshnet.commands.learn", "a class from a few labelled examples, as a small file"),
    "import-published": ("mshnet.commands.import_published", "turn the published code's weights into a model folder"),
    "page": ("mshnet.commands.page", "try a model in the browser, on this machine"),
}
"""Verb to its module, which has a function `command`, and what it does in a line."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb that the arguments name. Exit codes: 0 done, 1 failed on bad input, 2 usage."""
    given = list(sys.argv[1:] if argv is None else argv)
    verb = given[0] if given else ""
    if verb in ("-h", "--help"):
        print(_overview())
        return
    if verb not in VERBS:
        found = f"found {verb!r}" if verb else "found none"
        print(f"mshnet: expected a verb ({', '.join(VERBS)}), {found}; see mshnet --help", file=sys.stderr)
        raise SystemExit(2)
    module, _ = VERBS[verb]
    run(import_module(module).command, f"mshnet {verb}", given[1:])


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {line}" for verb, (_, line) in VERBS.items())
    return f"usage: mshnet VERB ...   (mshnet VERB --help for its flags)\n\n{verbs}"


if __name__ == "__main__":
    main()
