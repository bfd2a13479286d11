"""What makes an update the same however many processes share it: shares, batch norm, dropout.

The rule: an update is a function of (seed, epoch, position), never of who computes it. Episodes that go
through the network together are a *part*; the processes share it, each one a run of neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, distributed, nn

from mshnet.errors import InputError


@dataclass(frozen=True)
class Share:
    """A process's episodes of a part: `start` to below `stop` of `total`."""

    start: int
    stop: int
    total: int

    def __len__(self) -> int:
        return self.stop - self.start


def share_of(total: int, rank: int, world_size: int) -> Share:
    """The episodes of one rank: neighbours, in order, shares that differ by one at most."""
    if total < world_size:
        raise InputError(
            f"expected at least one episode for each of {world_size} workers, found {total} that share batch "
            "statistics: use fewer workers or a larger statistics_batch"
        )
    return Share(start=total * rank // world_size, stop=total * (rank + 1) // world_size, total=total)


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the episodes of all processes."""


def synchronise_batch_norm(module: nn.Module) -> None:
    """Replace every `nn.BatchNorm2d` below by a `BatchNorm2d` with the same parameters and buffers."""


class ChannelDropout(nn.Module):
    """Dropout of whole channels, by an episode's place in its part.

    In training every process draws the masks of the whole part and takes those of its own share, so
    that an episode meets the same mask whoever computes it. Without a share the batch is the part:
    `nn.Dropout2d`, bit for bit.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.share: Share | None = None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same size; in training, channels are zero with probability p, else scaled by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return x
        share = self.share or Share(0, len(x), len(x))
        kept = x.new_empty(share.total, x.shape[1], 1, 1).bernoulli_(1 - self.p).div_(1 - self.p)
        return x * kept[share.start : share.stop]

    def extra_repr(self) -> str:
        return f"p={self.p}"


def set_share(module: nn.Module, share: Share) -> None:
    """Tell every `ChannelDropout` below which episodes of the part are this process's."""
    for child in module.modules():
        if isinstance(child, ChannelDropout):
            child.share = share
