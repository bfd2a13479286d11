"""docs/threat_model.md claims nothing whose test is not there, and is one page."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = (REPOSITORY / "docs/threat_model.md").read_text()


def test_every_test_that_it_names_is_there() -> None:
    tests = "".join(path.read_text() for path in (REPOSITORY / "tests").rglob("*.py"))
    names, places = set(re.findall(r"`(test_\w+)`", TEXT)), set(re.findall(r"`(tests/[\w/.]+)`", TEXT))
    assert len(names) > 15
    assert len(places) > 10
    assert [name for name in names if f"def {name}(" not in tests] == []
    assert [place for place in places if not (REPOSITORY / place).exists()] == []


def test_it_is_one_page() -> None:
    assert len(TEXT.splitlines()) <= 60
    assert len(TEXT.split()) <= 900
