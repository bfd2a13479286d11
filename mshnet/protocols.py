"""How a number was made: what has to agree before two of them may be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mshnet.errors import InputError

Draw = Literal["published", "balanced"]
Resize = Literal["square", "original"]
Ignore = Literal["excluded", "background"]


@dataclass(frozen=True)
class Episodes:
    """Which test episodes: as many as `episodes` for each of the seeds."""

    draw: Draw
    """published: the very draws of the published evaluation; balanced: classes in turn, supports distinct."""
    episodes: int
    seeds: tuple[int, ...] = (0,)


EPISODES: dict[str, Episodes] = {
    "published": Episodes("published", 1000),
    "published-5x1000": Episodes("published", 1000, (0, 1, 2, 3, 4)),
    "published-10000": Episodes("published", 10_000),
    "balanced": Episodes("balanced", 1000),
}
"""By name. The field's numbers are of `published`; the longer ones are what some peers use on COCO."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """All that a test number depends on beside the model."""

    name: str
    """Of its episodes: a key of EPISODES, or what they are in words."""
    draw: Draw
    episodes: int
    """For each seed."""
    seeds: tuple[int, ...]
    """Of the draws; the official episodes are the published draw's of seed 0."""
    shot: int
    """Supports per episode (k)."""
    resize: Resize
    """square: judged at the training size; original: the prediction is resized to the query's own."""
    side_px: int
    """Of the square that the network sees."""
    ignore: Ignore
    """Pixels labelled 255: excluded from the counts, or background."""
    mask_mode: str
    """How the source's annotations become masks."""
    split_lists: str
    """lists:HASH or the rule."""
    novel_removed: bool
    """Whether training left out images that show a novel class."""
    selection: str
    """On what the epoch was chosen."""
    classes: str = ""
    """Where not every class of the fold could be tested: "4 of 5 classes"."""

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.shot < 1 or not self.seeds:
            raise InputError(
                "a protocol needs 1 or more episodes, shots and seeds, got "
                f"{self.episodes}, {self.shot} and {len(self.seeds)}"
            )

    @property
    def label(self) -> str:
        """One line for a table's cell: what is usual is left out, what is not is said."""
        parts = [
            f"{self.draw} draw, {self.episodes} episodes, {self.shot}-shot, square {self.side_px} px",
            _seeds(self.seeds),
            self.classes,
            "original size" if self.resize == "original" else "",
            "ignored pixels as background" if self.ignore == "background" else "",
        ]
        return ", ".join(part for part in parts if part)


def named(draw: Draw, episodes: int, seeds: tuple[int, ...]) -> str:
    """The name in EPISODES of test episodes drawn so; where they have none, what they are in words."""
    drawn = Episodes(draw, episodes, seeds)
    for name, known in EPISODES.items():
        if known == drawn:
            return name
    return ", ".join(part for part in (f"{draw} draw", f"{episodes} episodes", _seeds(seeds)) if part)


def _seeds(seeds: tuple[int, ...]) -> str:
    if seeds == (0,):
        return ""
    if seeds == tuple(range(len(seeds))):
        return f"{len(seeds)} seeds"
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
