"""Print the test episodes of a fold; needs the field's list files and no images.

`python -m pipelines.episodes --dataset pascal --split-lists DIR --fold 0 --shot 1 --protocol published`
"""

from __future__ import annotations

import json
from typing import Literal

from mshnet.command_line import run


def episodes(
    dataset: Literal["pascal", "coco", "shapes"],
    split_lists: str,
    fold: int,
    shot: int,
    protocol: Literal["published", "balanced"] = "published",
    count: int = 1000,
    seed: int = 0,
) -> None:
    """Print one JSON list of [query, [supports], class (0-based)]: the test episodes of a fold.

    Args:
        dataset: Whose classes and folds.
        split_lists: Folder or URI that holds pascal/ and coco/ (or trn/ and val/) with the field's lists.
        fold: 0..3.
        shot: Supports per episode, 1 or more.
        protocol: published draws exactly the published evaluation's episodes; balanced draws classes in
            balanced turns with all images of an episode different.
        count: Number of episodes.
        seed: Of the balanced protocol; the published one has none.
    """
    from mshnet.data.episodes import published_episodes, sampled_episodes
    from mshnet.data.folds import class_names
    from mshnet.data.splits import read_split_lists

    val = read_split_lists(dataset, split_lists, fold).val
    if protocol == "published":
        drawn = published_episodes(dataset, val, fold, shot, count)
    else:
        drawn = sampled_episodes(val, shot, count, seed, class_names(dataset))
    print(json.dumps([[e.query, list(e.supports), e.class_id] for e in drawn]))


if __name__ == "__main__":
    run(episodes, "python -m pipelines.episodes")
