"""The cache's tests count bytes: how full the disk below happens to be must not count among them."""

from __future__ import annotations

import pytest

from mshnet.data.store import cache


@pytest.fixture(autouse=True)
def nothing_kept_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FREE_SHARE", 0.0)
