"""The trainable models by name: everything that builds one asks here (docs/models.md says how to add one)."""

from __future__ import annotations

from collections.abc import Callable

from mshnet.config import Architecture, ModelConfig
from mshnet.errors import InputError
from mshnet.model import FewShotModel, MSHNet
from mshnet.panet import PANet

__all__ = ["BUILDERS", "FewShotModel", "build"]

BUILDERS: dict[Architecture, Callable[[ModelConfig], FewShotModel]] = {"mshnet": MSHNet, "panet": PANet}


def build(config: ModelConfig) -> FewShotModel:
    """The model that a configuration describes, with weights drawn from torch's generator; nothing is downloaded."""
    if config.architecture not in BUILDERS:
        raise InputError(f"expected an architecture of {', '.join(BUILDERS)}, got {config.architecture!r}")
    return BUILDERS[config.architecture](config)
