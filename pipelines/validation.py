"""Choosing the best epoch: episodes judged by all ranks, each its share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mshnet.data.batches import EpisodeLoader
    from mshnet.data.episodes import Episode
    from mshnet.engine import Relation
    from mshnet.features import FeatureCache


class Validation:
    """A fold's validation episodes, of which this rank judges its share.

    What the ranks sum are integer counts, so the outcome does not know how the episodes were shared.
    """

    def __init__(self, episodes: Sequence[Episode[int]], rank: int, world_size: int, batch: int) -> None:
        """`batch` is how many episodes go through the network at once."""
        self.world_size, self.batch = world_size, batch
        self.own = episodes[rank::world_size]
        self.classes = sorted({episode.class_id for episode in episodes})

    def miou(
        self, relation: Relation, features: FeatureCache, loader: EpisodeLoader, device: torch.device
    ) -> float | None:
        """Mean IoU, 0 to 1, the same on all ranks; None without episodes.

        `relation` in eval mode and bare: a rank with fewer episodes must not wait for the others' gradients.
        """
        import numpy as np
        import torch

        from mshnet.engine import evaluate, network_predictor
        from mshnet.metrics import Counts, miou, sum_by_class

        if not self.classes:
            return None
        counts = np.zeros((2, len(self.classes), 2), dtype=np.int64)
        if self.own:
            batches = loader.batches(self.own, self._positions())
            outcome = evaluate({"network": network_predictor(relation)}, features, batches)["network"]
            summed = sum_by_class(outcome.counts, outcome.class_ids.tolist(), self.classes)
            counts = np.stack([summed.intersection, summed.union])
        tensor = torch.from_numpy(counts).to(device)
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        intersection, union = tensor.cpu().numpy()
        return miou(Counts(intersection, union))

    def _positions(self) -> list[range]:
        count = len(self.own)
        return [range(start, min(start + self.batch, count)) for start in range(0, count, self.batch)]
