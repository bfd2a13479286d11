"""Whether a process runs what the job's driver runs: the packages of requirements.lock, and this very code."""

from __future__ import annotations

import os
import platform
import socket
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mshnet.errors import InputError
from pipelines import sources
from pipelines.config import fingerprint

VARIABLE = "MSHNET_CODE"
"""In the environment of a job's processes on a cluster: `identity()` of the driver; empty or absent: anything goes."""
SHOWN = 4
MEND = "run `make setup` there, or `ray up` again"


def lock() -> str:
    """The text of requirements.lock. Raises InputError where it was not brought along."""
    path = Path(__file__).resolve().parents[1] / "requirements.lock"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(
            f"expected the packages' versions in {str(path)!r}, found no such file; submit the whole repository "
            "(ray job submit --working-dir .), or give --any-versions"
        ) from error


def python() -> str:
    """The version of Python as far as packages are made for it, such as 3.11."""
    return ".".join(platform.python_version_tuple()[:2])


def identity(locked: str) -> str:
    """What is the same for two processes that run the same: code, lock and Python. Not what is installed."""
    return fingerprint(sources.trees(), locked, python())


@cache
def differences(locked: str) -> tuple[str, ...]:
    """What is installed in other versions than a lock's, or not at all. Packages that it does not name may be there."""
    # Comes with the other packages, so it may be what is missing.
    from packaging.requirements import Requirement

    found = []
    for line in filter(None, (line.partition("#")[0].strip() for line in locked.splitlines())):
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate():
            try:
                installed = version(wanted.name)
            except PackageNotFoundError:
                found.append(f"{wanted.name} absent")
                continue
            if not wanted.specifier.contains(installed, prereleases=True):
                found.append(f"{wanted.name} {installed} instead of {str(wanted.specifier).removeprefix('==')}")
    return tuple(found)


def packages_problem(locked: str) -> str:
    """In words what `differences` finds, and what to do; "" where nothing."""
    found = differences(locked)
    if not found:
        return ""
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"expected the packages of requirements.lock, found {', '.join(found[:SHOWN])}{more}; {MEND}"


def check() -> None:
    """At the start of a job's tasks and workers: raise InputError on a node that runs something else than the driver.

    Nodes that were there when the job began have been looked at by then; others come later.
    """
    wanted = os.environ.get(VARIABLE, "")
    problem = _problem(wanted) if wanted else ""
    if problem:
        raise InputError(f"node {socket.gethostname()}: {problem}")


@cache
def _problem(wanted: str) -> str:
    locked = lock()
    if identity(locked) != wanted:
        return f"expected the code, the lock and the Python of the job's driver, found others; {MEND}"
    return packages_problem(locked)
