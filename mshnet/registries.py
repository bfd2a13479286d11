"""Models by address, kept by whoever is installed to keep them: the method need not know who.

A registry is an entry point of the group `mshnet.registries`, named as its addresses' scheme, that leads to a module
with `download(address: str, folder: Path, tracking_uri: str) -> Path`: a model folder, somewhere below `folder`.
"""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path

from mshnet.errors import InputError

GROUP = "mshnet.registries"


def is_address(text: str) -> bool:
    """Whether it is a registry's address (`models:/NAME@champion`, `models:/NAME/3`) and no path or URI."""
    return re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", text) is not None


def download(address: str, folder: Path, tracking_uri: str = "") -> Path:
    """The model folder of an address. Raises InputError where there is no such model, or nobody who knows of it."""
    if not is_address(address):
        raise InputError(f"expected a registry's address, as models:/NAME@champion or models:/NAME/3, got {address!r}")
    scheme = address.partition(":")[0]
    known = {point.name: point for point in entry_points(group=GROUP)}
    if scheme not in known:
        raise InputError(
            f"expected a registry of {scheme}:/ addresses, found {', '.join(known) or 'none'} installed; "
            "pip install 'mshnet[pipelines]', or give a model folder"
        )
    try:
        registry = known[scheme].load()
    except ImportError as error:
        raise InputError(
            f"the registry of {scheme}:/ addresses cannot be loaded ({error}); pip install 'mshnet[pipelines]', or "
            "give a model folder"
        ) from error
    return Path(registry.download(address, folder, tracking_uri))
