"""Noticing a loss that is not finite, without waiting for the device at every update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mshnet.errors import TrainingDivergedError

if TYPE_CHECKING:
    import torch
    from jaxtyping import Bool
    from torch import Tensor

    from mshnet.engine import Update


class DivergenceGuard:
    """Keeps the first update that was not finite, on the device, and raises when it is looked at.

    Every rank sees the same update, so all of them raise at the same one.
    """

    def __init__(self, fold: int, episodes: Callable[[int], Sequence[str]], every: int, device: torch.device) -> None:
        """`episodes` names those of an update. A GPU is looked at every so many updates, a CPU after each."""
        import torch

        self.fold, self.episodes = fold, episodes
        self.every = every if device.type == "cuda" else 1
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._losses = torch.zeros(3, device=device)

    @property
    def stopped(self) -> Bool[Tensor, ""]:
        """Whether an update was not finite, on the device: from then on none may change the weights."""
        return self._step >= 0

    def after(self, step: int, update: Update) -> None:
        """Take note of an update (counted from 0); raises TrainingDivergedError when it is time to look."""
        import torch

        first = ~update.finite & ~self.stopped
        self._step = self._step.masked_fill(first, step)  # `where` would send the number to a GPU and wait for it
        self._losses = torch.where(first, update.losses, self._losses)
        if (step + 1) % self.every == 0:
            self.look(step)

    def look(self, step: int) -> None:
        """Wait for the device. Raises TrainingDivergedError if any update up to `step` was not finite."""
        bad = int(self._step)
        if bad < 0:
            return
        total, outer, inner = (float(loss) for loss in self._losses)
        episodes = "; ".join(self.episodes(bad))
        raise TrainingDivergedError(
            f"fold {self.fold} diverged at update {bad + 1}: expected finite losses and gradients, found losses of "
            f"{total} (total), {outer} (outer), {inner} (inner); noticed after update {step + 1}. The weights were not "
            "updated by it or after it, and the checkpoints are of before. Lower --learning-rate, or look at its "
            f"episodes: {episodes}"
        )
