"""What keeps two scores from being compared."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mshnet.errors import InputError
from mshnet.protocols import Protocol
from pipelines.conditions import Conditions
from tests.pipelines.test_tracking_registry import CONDITIONS, PROTOCOL

OTHER: dict[str, Any] = {
    "name": "balanced",
    "draw": "balanced",
    "episodes": 200,
    "seeds": (0, 1),
    "shot": 5,
    "resize": "original",
    "side_px": 65,
    "ignore": "background",
    "mask_mode": "another",
    "split_lists": "rule: at least 2048 px",
    "novel_removed": False,
    "selection": "last epoch, none chosen",
    "classes": "4 of 5 classes",
}


def test_every_field_of_the_protocol_counts() -> None:
    assert OTHER.keys() == {field.name for field in dataclasses.fields(Protocol)}
    for name, value in OTHER.items():
        other = dataclasses.replace(CONDITIONS, protocol=dataclasses.replace(PROTOCOL, **{name: value}))
        (difference,) = CONDITIONS.differences(other)
        assert difference.startswith(f"{name}: ")
        assert difference.endswith(f"not {value}")


def test_other_episodes_and_data_count_the_same_do_not() -> None:
    assert CONDITIONS.differences(CONDITIONS) == []
    other = dataclasses.replace(CONDITIONS, episodes_hash="0" * 12, data_fingerprint="a")
    assert CONDITIONS.differences(other) == [
        "episodes_hash: e68ad4a7d8d5, not 000000000000",
        f"data_fingerprint: {'f' * 64}, not a",
    ]


def test_they_survive_as_text() -> None:
    assert Conditions.from_json(CONDITIONS.to_text()) == CONDITIONS
    with pytest.raises(InputError, match=r"Conditions.protocol"):
        Conditions.from_json({**CONDITIONS.to_json(), "protocol": "published"})
