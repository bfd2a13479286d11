"""Models by address, kept by whoever is installed to keep them: the method need not know who.

A registry is an entry point of the group `mshnet.registries`, named as its addresses' scheme, that leads to a module
with `download(address: str, folder: Path, tracking_uri: str) -> Path`: a model folder, somewhere below `folder`; and
`register(folder: str, name: str, tracking_uri: str, description: str) -> str`: the number of the new version.
"""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from mshnet.errors import InputError

GROUP = "mshnet.registries"


def is_address(text: str) -> bool:
    """Whether it is a registry's address (`models:/NAME@champion`, `models:/NAME/3`) and no path or URI."""
    return re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", text) is not None


def download(address: str, folder: Path, tracking_uri: str = "") -> Path:
    """The model folder of an address. Raises InputError where there is no such model, or nobody who knows of it."""
    if not is_address(address):
        raise InputError(f"expected a registry's address, as models:/NAME@champion or models:/NAME/3, got {address!r}")
    return Path(keeper(address.partition(":")[0]).download(address, folder, tracking_uri))


def keeper(scheme: str) -> Any:
    """The module that keeps the models of a scheme. Raises InputError where none is installed."""
    known = {point.name: point for point in entry_points(group=GROUP)}
    if scheme not in known:
        raise InputError(
            f"expected a registry of {scheme}:/ addresses, found {', '.join(known) or 'none'} installed; "
            "pip install 'mshnet[pipelines]', or use a model folder alone"
        )
    try:
        return known[scheme].load()
    except ImportError as error:
        raise InputError(
            f"the registry of {scheme}:/ addresses cannot be loaded ({error}); pip install 'mshnet[pipelines]', or "
            "use a model folder alone"
        ) from error
