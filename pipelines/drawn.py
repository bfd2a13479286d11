"""What the drawing of episodes leaves for training and evaluation: its records, and the test episodes read back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mshnet.errors import InputError
from mshnet.protocols import Protocol
from pipelines import storage
from pipelines.config import CrossValidationConfig, fingerprint
from pipelines.results import Record

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mshnet.data.episodes import Episode
    from mshnet.data.store.images import ImageStore

EPISODES, PAIRS = "episodes.arrow", "pairs.arrow"


@dataclass(frozen=True, kw_only=True)
class DrawnTraining(Record):
    """What a fold trains on, and on what its best epoch is chosen."""

    fold: int
    folder: str
    """Of the tables, below the store's root."""
    store: str
    """Of the images, below the store's root."""
    split_lists: str
    """lists:HASH or the rule."""
    selection: str
    """Of the best epoch, in words."""
    base_classes: tuple[int, ...]
    """That training draws from."""
    left_out: tuple[str, ...]
    """Base classes with too few images, where leaving them out was asked for."""
    training_pairs: int
    removed_pairs: int
    """Training pairs removed because their image shows a novel class."""
    pairs_sha256: str
    """Of the table of training pairs."""
    validation_sha256: str
    """Of the table of validation episodes."""


@dataclass(frozen=True, kw_only=True)
class TestList(Record):
    """One list of test episodes."""

    shot: int
    seed: int
    split: str
    """Its name in the table."""
    episodes_hash: str


@dataclass(frozen=True, kw_only=True)
class DrawnTest(Record):
    """What a fold is tested on, and how it is judged."""

    fold: int
    folder: str
    """Of the tables, below the store's root."""
    store: str
    """Of the images, below the store's root."""
    protocol: Protocol
    """Of the lists of `--shot`; those of other shots differ in nothing but the shot."""
    tests: list[TestList]
    """Of `--shot`, seed after seed; then of the other shots, each with all seeds."""
    novel_classes: tuple[int, ...]
    """That the test episodes of `--shot` show."""
    left_out: tuple[str, ...]
    """Novel classes with too few images for `--shot`, where leaving them out was asked for."""
    test_pairs: int
    episodes_hash: str
    """Of the test episodes of `--shot`, all seeds, by image id, whatever store holds the images: see
    `episodes_hash`. Of one seed it is its list's."""
    episodes_sha256: str
    """Of the table of test and threshold episodes."""


def episodes_hash(episodes: Iterable[Episode[str]]) -> str:
    """Names the test: who is query and support of what, in order."""
    return fingerprint([[e.query, list(e.supports), e.class_id] for e in episodes])


def read_test(
    config: CrossValidationConfig, drawn: DrawnTest, images: ImageStore
) -> list[tuple[TestList, list[Episode[int]]]]:
    """The lists of test episodes by row, as `drawn.tests` has them. InputError where they are not what was drawn."""
    from mshnet.data.tables import read_episodes

    uri = storage.join(config.store, drawn.folder, EPISODES)
    lists = []
    for test in drawn.tests:
        episodes = read_episodes(uri, drawn.episodes_sha256, test.split)
        found = episodes_hash(episode.named(images.image_id) for episode in episodes)
        if found != test.episodes_hash:
            raise InputError(
                f"expected test episodes {test.episodes_hash} in {uri!r}, found {found} with the images of "
                f"{images.uri!r}: table and images do not belong together; delete the folder "
                f"{storage.join(config.store, drawn.folder)!r} and submit the job again"
            )
        lists.append((test, episodes))
    return lists
