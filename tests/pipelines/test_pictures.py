"""Which episodes are shown, against definitions in plain loops; and the files that are drawn of a real fold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mshnet.metrics import Counts
from mshnet.outcomes import Outcomes
from pipelines.pictures import MISSED_IOU, draw_pictures, episode_iou, ranked_episodes
from pipelines.results import RANKS
from tests.pipelines.drawn_fold import draw_fold, small_config


def outcomes(rows: list[tuple[int, int, int, int]]) -> Outcomes:
    """From pixels of each episode: hit, missed, false, and background that is left alone."""
    hit, missed, false, rest = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    counts = Counts(np.stack([rest, hit], axis=1), np.stack([rest + missed + false, hit + missed + false], axis=1))
    return Outcomes(counts, np.zeros(len(rows), dtype=np.int64), hit + missed, hit + missed + false + rest)


def by_iou(*percent: int) -> Outcomes:
    """Large objects of 100 px, so many of them hit, nothing false."""
    return outcomes([(p, 100 - p, 0, 100) for p in percent])


def test_the_best_the_median_and_the_worst_are_shown() -> None:
    found = by_iou(50, 90, 10, 70, 30, 80, 20)
    queries = list(range(10, 17))
    assert ranked_episodes(found, queries, 1) == [("best", 1), ("median", 0), ("worst", 2)]
    # From the median (50) outwards; of two equally near ones, the better.
    assert ranked_episodes(found, queries, 2) == [
        ("best", 1), ("best", 5), ("median", 0), ("median", 3), ("worst", 2), ("worst", 6)
    ]  # fmt: skip


def test_a_query_is_shown_once_however_often_it_is_among_the_best() -> None:
    found, queries = by_iou(90, 80, 70, 50, 40, 20, 10), [5, 5, 8, 5, 2, 8, 9]
    # The median is 5's, which is shown; then its neighbours in turn; the worst after that is 9's.
    assert ranked_episodes(found, queries, 1) == [("best", 0), ("median", 2), ("worst", 6)]
    assert sorted(queries[i] for _, i in ranked_episodes(found, queries, 3)) == [2, 5, 8, 9]


def test_equal_episodes_keep_their_order() -> None:
    assert ranked_episodes(by_iou(0, 0, 0, 0, 0), list(range(5)), 1) == [("best", 0), ("median", 2), ("worst", 4)]


def test_failures_are_what_their_names_say() -> None:
    found = outcomes([
        (50, 0, 0, 50),  # best
        (40, 10, 0, 50),  # median
        (30, 20, 0, 50),
        (0, 50, 0, 50),  # lowest IoU
        (40, 0, 30, 30),  # most false foreground: 30 % of the picture
        (300, 0, 200, 500),  # less of it in a larger picture: 20 %
        (3, 1, 0, 96),  # small, and found
        (1, 3, 0, 96),  # small, and missed
        (2, 4, 0, 94),  # too large to be small
    ])  # fmt: skip
    assert dict(reversed(ranked_episodes(found, list(range(9)), 1))) == {
        "best": 0, "median": 5, "worst": 3, "false foreground": 4, "missed small object": 7
    }  # fmt: skip


def test_an_episode_without_any_pixel_to_find_is_no_division_by_zero() -> None:
    empty = outcomes([(0, 0, 0, 0), (0, 0, 0, 10)])
    assert episode_iou(empty).tolist() == [0.0, 0.0]
    assert [rank for rank, _ in ranked_episodes(empty, [1, 2], 1)] == ["best", "median"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 40)] * 3, st.integers(0, 400)), min_size=1, max_size=25),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_ranks_agree_with_their_definitions_in_plain_loops(rows: list[tuple], each: int, random: object) -> None:
    queries = [random.randrange(8) for _ in rows]  # type: ignore[attr-defined]
    found = ranked_episodes(outcomes(rows), queries, each)
    assert [rank for rank, _ in found] == sorted((rank for rank, _ in found), key=RANKS.index)
    assert len({queries[i] for _, i in found}) == len(found), "each query once"

    def iou(i: int) -> float:
        hit, missed, false, _ = rows[i]
        return hit / (hit + missed + false) if hit + missed + false else 0.0

    def share(i: int, px: int) -> float:
        return px / sum(rows[i]) if sum(rows[i]) else 0.0

    # By falling merit of each rank; earlier episodes first where equal, but the worst from the end.
    descending = sorted(range(len(rows)), key=lambda i: (-iou(i), i))
    middle = len(rows) // 2
    merits = {
        "best": descending,
        "median": sorted(descending, key=lambda i: abs(descending.index(i) - middle)),
        "worst": descending[::-1],
        "false foreground": sorted((i for i in descending if rows[i][2]), key=lambda i: (-share(i, rows[i][2]), i)),
        "missed small object": [
            i for i in descending[::-1] if share(i, rows[i][0] + rows[i][1]) < 0.05 and iou(i) < MISSED_IOU
        ],
    }
    shown: set[int] = set()
    for rank, candidates in merits.items():
        expected: list[int] = []
        for i in candidates:
            if queries[i] not in shown and len(expected) < each:
                expected.append(i)
                shown.add(queries[i])
        assert [i for of, i in found if of == rank] == expected, rank


@pytest.fixture(scope="module")
def store_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fold")


@pytest.mark.parametrize("shot", [1, 2])
def test_the_pictures_of_a_fold_are_files_of_what_was_judged(shot: int, store_root: Path, tmp_path: Path) -> None:
    import torch

    from mshnet.data.batches import EpisodeLoader
    from mshnet.data.episodes import Episode
    from mshnet.data.store.images import ImageStore
    from mshnet.engine import evaluate, network_predictor
    from mshnet.features import FeatureCache
    from pipelines.network import build_network

    config = small_config(store_root)
    config = replace(config, evaluation=replace(config.evaluation, panels_each=1))
    drawn = draw_fold(config)
    store = ImageStore(str(store_root / "store" / drawn.store))
    of_class = [row for row, (_, _, pixels) in enumerate(store.contents()) if 0 in pixels][: 4 + shot]
    episodes = [Episode(q, tuple(r for r in of_class if r != q)[:shot], 0) for q in of_class]
    network = build_network(config, store).eval()
    features = FeatureCache(network.backbone, 2**30)
    predict = network_predictor(network.relation)
    with EpisodeLoader(store) as loader:
        judged = evaluate({"trained": predict}, features, loader.batches(episodes, [range(len(episodes))]))["trained"]
        panels = draw_pictures(config, str(tmp_path), loader, episodes, judged, predict, features, network.relation)
        without = draw_pictures(
            config, str(tmp_path / "plain"), loader, episodes, judged, predict, features, torch.nn.Identity()
        )
    ranked = ranked_episodes(judged, of_class, 1)
    assert [(p.rank, p.query) for p in panels] == [(rank, store.image_id(of_class[i])) for rank, i in ranked]
    for panel, (_, i) in zip(panels, ranked, strict=True):
        assert panel.iou == episode_iou(judged)[i]
        assert panel.supports == [store.image_id(row) for row in episodes[i].supports]
        object_share = judged.object_px[i] / judged.counted_px[i]
        assert panel.note.startswith(f"Object {100 * object_share:.1f} %, ")
        assert Image.open(tmp_path / panel.picture).width > 3 * 240
        assert Image.open(tmp_path / panel.energy).width > Image.open(tmp_path / panel.picture).width
    assert [panel.energy for panel in without] == [""] * len(panels), "a network without similarities has none"
