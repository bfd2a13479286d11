"""Episode batches of noise with a bright object, for tests that need pictures and no store."""

from __future__ import annotations

import torch
from torch import Tensor

from mshnet.data.batches import EpisodeBatch

SIDE = 65


def picture(row: int, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Image (3, side, side) and mask (side, side) of a row: always the same for the same row."""
    random = torch.Generator().manual_seed(row)
    image = torch.randint(0, 128, (3, side, side), generator=random, dtype=torch.uint8)
    mask = torch.zeros(side, side, dtype=torch.uint8)
    top, left = (int(x) for x in torch.randint(2, side // 2, (2,), generator=random))
    mask[top : top + side // 2, left : left + side // 2] = 1
    image[:, mask == 1] += 100
    return image, mask


def episode_batch(
    rows: list[tuple[int, tuple[int, ...]]], class_ids: tuple[int, ...] | None = None, side: int = SIDE
) -> EpisodeBatch:
    """Episodes given as (query's row, supports' rows); the first line of a query is ignored."""
    queries = [picture(query, side) for query, _ in rows]
    supports = [[picture(row, side) for row in supports] for _, supports in rows]
    query_masks = torch.stack([mask for _, mask in queries])
    query_masks[:, 0] = 255
    return EpisodeBatch(
        query_images=torch.stack([image for image, _ in queries]),
        query_masks=query_masks,
        support_images=torch.stack([torch.stack([image for image, _ in shots]) for shots in supports]),
        support_masks=torch.stack([torch.stack([mask for _, mask in shots]) for shots in supports]),
        query_rows=tuple(query for query, _ in rows),
        support_rows=tuple(supports for _, supports in rows),
        class_ids=class_ids if class_ids is not None else (0,) * len(rows),
    )
