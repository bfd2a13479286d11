"""A protocol as an object: its name, its line in a table, and what it refuses."""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mshnet.errors import InputError
from mshnet.protocols import EPISODES, Draw, Episodes, Ignore, Protocol, Resize, named

PUBLISHED = Protocol(
    name="published", draw="published", episodes=1000, seeds=(0,), shot=1, resize="square", side_px=473,
    ignore="excluded", mask_mode="labels", split_lists="lists:4f2c1a9be07d", novel_removed=True, selection="last epoch",
)  # fmt: skip

protocols = st.builds(
    Protocol,
    name=st.sampled_from(list(EPISODES)),
    draw=st.sampled_from(typing.get_args(Draw)),
    episodes=st.integers(1, 20_000),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True).map(tuple),
    shot=st.integers(1, 10),
    resize=st.sampled_from(typing.get_args(Resize)),
    side_px=st.sampled_from([33, 473]),
    ignore=st.sampled_from(typing.get_args(Ignore)),
    mask_mode=st.just("labels"),
    split_lists=st.just("rule"),
    novel_removed=st.booleans(),
    selection=st.just("last epoch"),
    classes=st.sampled_from(["", "4 of 5 classes"]),
)


def test_the_published_protocol_is_the_official_list() -> None:
    assert EPISODES["published"] == Episodes("published", 1000, (0,))


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "published draw, 1000 episodes, 1-shot, square 473 px"),
        ({"shot": 5, "seeds": (0, 1, 2, 3, 4)}, "published draw, 1000 episodes, 5-shot, square 473 px, 5 seeds"),
        ({"seeds": (7,)}, "published draw, 1000 episodes, 1-shot, square 473 px, seed 7"),
        ({"seeds": (3, 1)}, "published draw, 1000 episodes, 1-shot, square 473 px, seeds 3, 1"),
        (
            {"classes": "4 of 5 classes", "draw": "balanced", "episodes": 40, "side_px": 65},
            "balanced draw, 40 episodes, 1-shot, square 65 px, 4 of 5 classes",
        ),
        (
            {"resize": "original", "ignore": "background"},
            "published draw, 1000 episodes, 1-shot, square 473 px, original size, ignored pixels as background",
        ),
    ],
)
def test_the_label_says_what_is_not_usual(changes: dict[str, typing.Any], label: str) -> None:
    assert replace(PUBLISHED, **changes).label == label


@given(protocols, protocols)
def test_one_label_is_one_way_of_testing(one: Protocol, other: Protocol) -> None:
    """Of the fields that a label shows; the others have places of their own beside a number."""

    def shown(protocol: Protocol) -> Protocol:
        return replace(protocol, name="", novel_removed=True)

    assert (one.label == other.label) == (shown(one) == shown(other))


@pytest.mark.parametrize("name", list(EPISODES))
def test_a_name_is_found_again_from_what_was_drawn(name: str) -> None:
    known = EPISODES[name]
    assert named(known.draw, known.episodes, known.seeds) == name


def test_the_page_about_protocols_has_each_of_them_and_each_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "protocols.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    for name, known in EPISODES.items():
        (row,) = [cells for cells in rows if cells[0].split(" ")[0] == f"`{name}`" and len(cells) == 5]
        assert row[1:4] == [known.draw, f"{known.episodes:,}", ", ".join(map(str, known.seeds))]
    named_in_rows = {word for cells in rows for word in re.findall(r"`(\w+)`", cells[0])}
    assert {field.name for field in dataclasses.fields(Protocol)} <= named_in_rows


def test_what_has_no_name_is_said_in_words() -> None:
    assert named("published", 40, (0,)) == "published draw, 40 episodes"
    assert named("published", 1000, (1,)) == "published draw, 1000 episodes, seed 1"
    assert named("balanced", 1000, (0, 1)) == "balanced draw, 1000 episodes, 2 seeds"


@pytest.mark.parametrize("changes", [{"episodes": 0}, {"shot": 0}, {"seeds": ()}])
def test_a_test_of_nothing_is_refused(changes: dict[str, typing.Any]) -> None:
    with pytest.raises(InputError, match="needs 1 or more episodes, shots and seeds, got"):
        replace(PUBLISHED, **changes)
