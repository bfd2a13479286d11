"""Under what a score was measured: two scores are compared only where all of it agrees."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mshnet.protocols import Protocol
from pipelines.results import Record


@dataclass(frozen=True, kw_only=True)
class Conditions(Record):
    """A fold's protocol, its very episodes, and the data that they are of."""

    protocol: Protocol
    episodes_hash: str
    """Of the test episodes by image id."""
    data_fingerprint: str
    """Of the source."""

    def differences(self, other: Conditions) -> list[str]:
        """Each field that keeps two scores from being compared, as "resize: square, not original"."""
        mine, theirs = _fields(self), _fields(other)
        return [f"{name}: {mine[name]}, not {theirs[name]}" for name in mine if mine[name] != theirs[name]]


def _fields(conditions: Conditions) -> dict[str, Any]:
    values = {f.name: getattr(conditions.protocol, f.name) for f in dataclasses.fields(Protocol)}
    # Which classes were held out follows from the training's seed; that some were is the rule.
    values["selection"] = conditions.protocol.selection.split(" (")[0]
    return values | {"episodes_hash": conditions.episodes_hash, "data_fingerprint": conditions.data_fingerprint}
