"""Which of a fold's episodes the report shows, and their pictures: typical ones and failures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from pipelines import storage
from pipelines.config import CrossValidationConfig
from pipelines.results import EpisodeOutcome

if TYPE_CHECKING:
    from torch import nn

    from mshnet.backbone import Features
    from mshnet.data.batches import EpisodeBatch, EpisodeLoader
    from mshnet.data.episodes import Episode
    from mshnet.data.store.images import ImageStore
    from mshnet.engine import Predictor
    from mshnet.features import FeatureCache
    from mshnet.judging import Segmentation
    from mshnet.outcomes import Outcomes
    from mshnet.visualize import Shown

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

    `episodes` are the outcomes' own, in their order. The first of each rank has its energy maps drawn too, where
    `relation` has similarities to show.
    """
    import torch

    from mshnet.visualize import energy_picture, episode_panel, png_bytes

    iou = episode_iou(outcomes)
    ranked = ranked_episodes(outcomes, [e.query for e in episodes], config.evaluation.panels_each)
    with_energy = dict(reversed(ranked))  # the first of each
    panels = []
    for (rank, index), batch in zip(ranked, loader.batches(episodes, [[index] for _, index in ranked]), strict=True):
        with torch.no_grad():
            found = features.of(batch)
            segmented = predict(*found, batch)
        shown = _shown(config, loader.store, batch, segmented, float(iou[index]))
        episode = episodes[index].named(loader.store.image_id)
        file = f"{rank.replace(' ', '-')}-{index:05d}.png"
        storage.write_bytes(storage.join(folder, file), png_bytes(episode_panel(shown, f"{rank}: {episode.query}")))
        energy = ""
        if with_energy[rank] == index and hasattr(relation, "similarities"):
            energy = f"energy-{file}"
            energies = _energies(relation, *found, batch)
            storage.write_bytes(storage.join(folder, energy), png_bytes(energy_picture(shown, energies)))
        panels.append(
            EpisodeOutcome(
                query=episode.query,
                supports=list(episode.supports),
                class_name=shown.class_name,
                iou=shown.iou,
                picture=file,
                rank=rank,
                energy=energy,
                note=_note(outcomes, index),
            )
        )
    return panels


def _note(outcomes: Outcomes, index: int) -> str:
    counted = max(int(outcomes.counted_px[index]), 1)
    object_px = int(outcomes.object_px[index])
    false_px = int(outcomes.counts.union[index, 1]) - object_px
    return f"Object {100 * object_px / counted:.1f} %, false foreground {100 * false_px / counted:.1f} % of the picture"


def _shown(
    config: CrossValidationConfig, store: ImageStore, batch: EpisodeBatch, found: Segmentation, iou: float
) -> Shown:
    """The batch's only episode at its images' own proportions, as it was judged."""
    from mshnet.config import IGNORE_INDEX
    from mshnet.visualize import Shown

    row, class_id = batch.query_rows[0], batch.class_ids[0]
    truth = store.original_mask(row, class_id, with_ignore=True).numpy()
    if config.evaluation.ignored == "background":
        truth = np.where(truth == IGNORE_INDEX, 0, truth).astype(np.uint8)
    size = (truth.shape[0], truth.shape[1])
    return Shown(
        query=stretched(store, row),
        truth=truth,
        prediction=found.masks(size)[0].cpu().numpy(),
        supports=[
            (stretched(store, support), store.original_mask(support, class_id).numpy() == 1)
            for support in batch.support_rows[0]
        ],
        class_name=store.manifest.class_names[class_id],
        iou=iou,
    )


def stretched(store: ImageStore, row: int) -> UInt8[np.ndarray, "h w 3"]:
    """The stored square, stretched back to the image's own size."""
    from PIL import Image

    height, width = store.size_px(row)
    square = Image.fromarray(store.image(row).permute(1, 2, 0).numpy())
    return np.asarray(square.resize((width, height), Image.Resampling.BICUBIC))


def _energies(
    relation: Any, query: Features, support: Features, batch: EpisodeBatch
) -> dict[tuple[int, str], Float[np.ndarray, "H W"]]:
    import torch

    from mshnet.explain import energy_maps

    masks = batch.support_masks.float()
    with torch.no_grad():
        similarities = relation.similarities(query, support, masks)
    maps = energy_maps(similarities, (masks.shape[-2], masks.shape[-1]))
    return {key: energy[0].cpu().numpy() for key, energy in maps.items()}


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
