"""Which of a fold's episodes the report shows, and their pictures: typical ones and failures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from pipelines import storage
from pipelines.config import CrossValidationConfig
from pipelines.results import EpisodeOutcome

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mshnet.data.batches import EpisodeLoader
    from mshnet.data.episodes import Episode
    from mshnet.engine import Predictor
    from mshnet.features import FeatureCache
    from mshnet.outcomes import Outcomes

MISSED_IOU = 0.5
"""A small object with less than this was missed."""


def draw_pictures(
    config: CrossValidationConfig,
    folder: str,
    loader: EpisodeLoader,
    episodes: Sequence[Episode[int]],
    outcomes: Outcomes,
    predict: Predictor,
    features: FeatureCache,
    relation: nn.Module,
) -> list[EpisodeOutcome]:
    """Draw the best, the median and the worst episodes and the failures into the folder, each query at most once.

    `episodes` are the outcomes' own, in their order; `predict` gives scores that are above 0 on the object. The first
    of each rank has its energy maps drawn too where `relation` has similarities to show.
    """
    import torch

    from mshnet.visualize import episode_panel, png_bytes

    store = loader.store
    iou = episode_iou(outcomes)
    ranked = ranked_episodes(outcomes, [e.query for e in episodes], config.evaluation.panels_each)
    panels = []
    for (rank, index), batch in zip(ranked, loader.batches(episodes, [[index] for _, index in ranked]), strict=True):
        with torch.no_grad():
            predicted = (predict(*features.of(batch), batch)[0] > 0).cpu().numpy()
        episode = episodes[index].named(store.image_id)
        name = store.manifest.class_names[episode.class_id]
        picture = episode_panel(
            _pixels(batch.query_images[0]),
            batch.query_masks[0].cpu().numpy(),
            predicted,
            [
                (_pixels(image), mask.cpu().numpy() > 0)
                for image, mask in zip(batch.support_images[0], batch.support_masks[0], strict=True)
            ],
            name,
            f"{rank}: {episode.query}",
        )
        file = f"{rank.replace(' ', '-')}-{index:05d}.png"
        storage.write_bytes(storage.join(folder, file), png_bytes(picture))
        panels.append(
            EpisodeOutcome(
                query=episode.query,
                supports=list(episode.supports),
                class_name=name,
                iou=float(iou[index]),
                picture=file,
                rank=rank,
            )
        )
    return panels


def episode_iou(outcomes: Outcomes) -> Float[np.ndarray, " n"]:
    """Each episode's IoU of the object, 0 to 1; 0 where neither truth nor prediction has any."""
    found: Float[np.ndarray, " n"] = outcomes.counts.intersection[:, 1] / np.maximum(outcomes.counts.union[:, 1], 1)
    return found


def ranked_episodes(outcomes: Outcomes, queries: Sequence[int], each: int) -> list[tuple[str, int]]:
    """(rank, position) of up to `each` episodes per rank, in the order of RANKS; no query twice.

    worst: lowest IoU. false foreground: most predicted pixels that are no object, as a share of those that count.
    missed small object: of the objects below the size called small, the lowest IoU, below MISSED_IOU.
    """
    shown: set[int] = set()
    chosen: list[tuple[str, int]] = []
    for rank, candidates in _candidates(outcomes):
        fresh: list[tuple[str, int]] = []
        for index in candidates:
            if len(fresh) < each and queries[index] not in shown:
                shown.add(queries[index])
                fresh.append((rank, index))
        chosen += fresh
    return chosen


def _candidates(outcomes: Outcomes) -> Iterator[tuple[str, list[int]]]:
    from mshnet.statistics import SIZES

    iou = episode_iou(outcomes)
    best = np.argsort(-iou, kind="stable")
    yield "best", best.tolist()
    # From the median outwards, so that the first one found is the nearest.
    outwards = np.argsort(np.abs(np.arange(len(best)) - len(best) // 2), kind="stable")
    yield "median", best[outwards].tolist()
    yield "worst", best[::-1].tolist()
    counted = np.maximum(outcomes.counted_px, 1)
    false = (outcomes.counts.union[:, 1] - outcomes.object_px) / counted
    most = np.argsort(-false, kind="stable")
    yield "false foreground", most[false[most] > 0].tolist()
    small = outcomes.object_px / counted < SIZES["small"]
    missed = small & (iou < MISSED_IOU)
    yield "missed small object", [i for i in best[::-1].tolist() if missed[i]]


def _pixels(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).cpu().numpy()
