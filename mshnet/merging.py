"""The symmetric merging block (SMB; paper, section 4.3, figure 3): layers, shots and similarities become one map."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mshnet.config import Similarity
from mshnet.parallel import ChannelDropout

COSINE_CHANNELS = 256
PROTOTYPE_CHANNELS = 128
MERGED_CHANNELS = 256
SHOTS_TOGETHER = 8
"""That share a batch in eval mode: with all of 50 it would be 50 times one's memory."""


class ConvBlock(nn.Sequential):
    """Convolution with bias, batch norm, ReLU; the size is kept."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    @property
    def conv(self) -> nn.Conv2d:
        """The first of the three, for those who compute it together with what is before it."""
        return cast(nn.Conv2d, self[0])

    def finish(self, convolved: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """What follows the convolution: batch norm and ReLU."""
        return self[2](self[1](convolved))  # type: ignore[no-any-return]


class BlockConv(nn.Module):
    """Merges the layers of a block, shot by shot, then takes the mean over the shots."""

    def __init__(self, layers: int, channels: int) -> None:
        super().__init__()
        self.layers = ConvBlock(layers, channels, kernel=1)
        self.local = ConvBlock(channels, channels, kernel=3)

    def forward(self, similarity: Float[Tensor, "b k l h w"]) -> Float[Tensor, "b c h w"]:
        """Similarity maps of k shots to one feature map.

        Fidelity: the paper sums the shots; the published code takes the mean. In training every shot
        has its own batch statistics, so the shots cannot share one batch; in eval mode they do.
        """
        if self.training:
            first, *others = (self.local(self.layers(_laid_out(shot))) for shot in similarity.unbind(1))
            total: Tensor = sum(others, start=first)
            return total / similarity.shape[1] if others else total
        shots = similarity.shape[1]
        mean: Tensor
        if shots <= SHOTS_TOGETHER:
            mean = self._each(similarity).mean(1)
        else:
            sums = [self._each(part).sum(1) for part in similarity.split(SHOTS_TOGETHER, dim=1)]
            mean = torch.stack(sums).sum(0) / shots
        return mean

    def _each(self, similarity: Float[Tensor, "b k l h w"]) -> Float[Tensor, "b k c h w"]:
        merged: Tensor = self.local(self.layers(_laid_out(similarity.flatten(0, 1))))
        shots: Tensor = merged.unflatten(0, similarity.shape[:2])
        return shots


def _laid_out(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """In the memory layout that the convolutions prefer; all that follows keeps it.

    channels_last on a GPU and in bfloat16; in float32 on a CPU it was measured 13% slower in the backward pass.
    """
    prefers_channels_last = x.is_cuda or (x.is_cpu and torch.is_autocast_enabled("cpu"))
    return x.contiguous(memory_format=torch.channels_last if prefers_channels_last else torch.contiguous_format)


class AtrousShotConv(nn.Module):
    """Shot-Conv of the prototype branch: three receptive fields side by side, fused."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                ConvBlock(channels, channels, kernel=1),
                ConvBlock(channels, channels, kernel=3, dilation=2),
                ConvBlock(channels, channels, kernel=3, dilation=4),
            ]
        )
        self.fuse = ConvBlock(3 * channels, channels, kernel=3)
        self.dropout = ChannelDropout(dropout)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Same size and width."""
        fused = self.fuse(torch.cat([branch(x) for branch in self.branches], dim=1))
        return self.dropout(fused)  # type: ignore[no-any-return]


class ChannelAttention(nn.Module):
    """CBAM's channel attention: one MLP on the average- and the max-pooled vector, summed, sigmoid."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = channels // reduction
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The channels, each scaled by its attention in 0..1."""
        scale = torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))
        return x * scale[:, :, None, None]


class SymmetricMergingBlock(nn.Module):
    """One level's SMB: Block-Conv and Shot-Conv per similarity, then Merge-Conv over both."""

    def __init__(self, layers: int, similarity: Similarity, dropout: float) -> None:
        super().__init__()
        if similarity != "prototype":
            self.cosine_block = BlockConv(layers, COSINE_CHANNELS)
            self.cosine_shot = ConvBlock(COSINE_CHANNELS, COSINE_CHANNELS, kernel=3)
            self.cosine_project = nn.Conv2d(COSINE_CHANNELS, MERGED_CHANNELS, 1)
        if similarity != "cosine":
            self.prototype_block = BlockConv(layers, PROTOTYPE_CHANNELS)
            self.prototype_shot = AtrousShotConv(PROTOTYPE_CHANNELS, dropout)
            self.prototype_project = nn.Conv2d(PROTOTYPE_CHANNELS, MERGED_CHANNELS, 1)
        self.similarity = similarity
        self.merge = ConvBlock(MERGED_CHANNELS, MERGED_CHANNELS, kernel=3)
        self.attention = ChannelAttention(MERGED_CHANNELS)
        self.refine = ConvBlock(MERGED_CHANNELS, MERGED_CHANNELS, kernel=3)
        self.dropout = ChannelDropout(dropout)

    def forward(
        self,
        cosine: Float[Tensor, "b k l h w"] | None,
        prototype: Float[Tensor, "b k l h w"] | None,
    ) -> Float[Tensor, "b c h w"]:
        """The level's hyperrelation, c = 256. An absent similarity is None."""
        parts = []
        if cosine is not None:
            parts.append(self.cosine_project(self.cosine_shot(self.cosine_block(cosine))))
        if prototype is not None:
            parts.append(self.prototype_project(self.prototype_shot(self.prototype_block(prototype))))
        merged = self.merge(sum(parts[1:], start=parts[0]))
        return self.dropout(self.refine(self.attention(merged)))  # type: ignore[no-any-return]
