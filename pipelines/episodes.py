"""Print the test episodes of a fold; needs the field's list files and no images.

`python -m pipelines.episodes --dataset pascal --split-lists DIR --fold 0 --shot 1 --protocol published`
`python -m pipelines.episodes --list-protocols`
"""

from __future__ import annotations

import json
import sys
from typing import Literal

from mshnet.command_line import run
from mshnet.errors import InputError
from mshnet.protocols import EPISODES
from pipelines.config import EvaluationConfig, ProtocolName


def episodes(
    dataset: Literal["pascal", "coco", "shapes"] = "pascal",
    split_lists: str = "",
    fold: int = 0,
    shot: int = 1,
    protocol: ProtocolName = "published",
    count: int = 0,
    seeds: tuple[int, ...] = (),
    list_protocols: bool = False,
) -> None:
    """Print one JSON list of [query, [supports], class (0-based)]: the test episodes of a fold, seed after seed.

    Their hash, by which results name them, goes to stderr.

    Args:
        dataset: Whose classes and folds.
        split_lists: Folder or URI that holds pascal/ and coco/ (or trn/ and val/) with the field's lists.
        fold: 0..3.
        shot: Supports per episode, 1 or more.
        protocol: published, published-5x1000 and published-10000 draw as the published evaluation does; balanced
            draws classes in balanced turns with all images of an episode different.
        count: Episodes per seed; 0: as many as the protocol has.
        seeds: Of the draws; none: the protocol's own. The official episodes are the published draw's of seed 0.
        list_protocols: Print the named protocols as a table instead.
    """
    if list_protocols:
        print(protocol_table())
        return
    if not split_lists:
        raise InputError("expected --split-lists DIR, the folder of the field's list files, got none")
    from mshnet.data.episodes import published_episodes, sampled_episodes
    from mshnet.data.folds import class_names
    from mshnet.data.splits import read_split_lists
    from pipelines.drawn import episodes_hash

    wanted = EvaluationConfig(protocol=protocol, evaluation_episodes=count, evaluation_seeds=seeds).episodes
    val = read_split_lists(dataset, split_lists, fold).val
    drawn = []
    for seed in wanted.seeds:
        if wanted.draw == "published":
            of_seed = published_episodes(dataset, val, fold, shot, wanted.episodes, seed)
        else:
            of_seed = sampled_episodes(val, shot, wanted.episodes, seed, class_names(dataset))
        drawn += of_seed
        print(f"seed {seed}: {len(of_seed)} episodes, hash {episodes_hash(of_seed)}", file=sys.stderr)
    if len(wanted.seeds) > 1:
        print(f"all seeds: {len(drawn)} episodes, hash {episodes_hash(drawn)}", file=sys.stderr)
    print(json.dumps([[e.query, list(e.supports), e.class_id] for e in drawn]))


def protocol_table() -> str:
    """The named protocols, one a line below a heading."""
    rows = [("protocol", "draw", "episodes per seed", "seeds", "episodes per fold")]
    for name, known in EPISODES.items():
        seeds = ", ".join(map(str, known.seeds))
        rows.append((name, known.draw, f"{known.episodes:,}", seeds, f"{known.episodes * len(known.seeds):,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    run(episodes, "python -m pipelines.episodes")
