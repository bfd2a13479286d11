"""The inverted pyramid from the deepest level to the logits (paper, figure 2)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mshnet.masking import resize
from mshnet.merging import MERGED_CHANNELS, ConvBlock
from mshnet.parallel import ChannelDropout

PYRAMID_CHANNELS = 512
DECODER_CHANNELS = 256
CLASSES = 2  # background, foreground


class Head(nn.Sequential):
    """Two convolutions to background and foreground logits."""

    def __init__(self, channels: int) -> None:
        first = nn.Conv2d(channels, 128, 3, padding=1, bias=False)
        super().__init__(first, nn.ReLU(inplace=True), nn.Conv2d(128, CLASSES, 3, padding=1))


class FuseDeepest(nn.Module):
    """Level 5, already at level 4's size, joined with level 4."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.deeper = nn.Conv2d(MERGED_CHANNELS, PYRAMID_CHANNELS, 1)
        self.lateral = nn.Conv2d(MERGED_CHANNELS, PYRAMID_CHANNELS, 1)
        self.join = ConvBlock(2 * PYRAMID_CHANNELS, PYRAMID_CHANNELS, kernel=3)
        self.refine = ConvBlock(PYRAMID_CHANNELS, PYRAMID_CHANNELS, kernel=3)
        self.dropout = ChannelDropout(dropout)

    def forward(self, deeper: Float[Tensor, "b c h w"], lateral: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """The deeper half comes first in the concatenation."""
        joined = self.join(torch.cat([self.deeper(deeper), self.lateral(lateral)], dim=1))
        return self.dropout(self.refine(joined))  # type: ignore[no-any-return]


class FuseFinest(nn.Module):
    """The pyramid so far, already at level 3's size, joined with level 3."""

    def __init__(self) -> None:
        super().__init__()
        self.deeper = ConvBlock(PYRAMID_CHANNELS, PYRAMID_CHANNELS, kernel=3)
        self.lateral = nn.Conv2d(MERGED_CHANNELS, PYRAMID_CHANNELS, 1)
        self.join = ConvBlock(2 * PYRAMID_CHANNELS, PYRAMID_CHANNELS, kernel=3)
        self.refine = ConvBlock(PYRAMID_CHANNELS, PYRAMID_CHANNELS, kernel=3)

    def forward(self, deeper: Float[Tensor, "b d h w"], lateral: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """The deeper half comes first in the concatenation."""
        joined = self.join(torch.cat([self.deeper(deeper), self.lateral(lateral)], dim=1))
        return self.refine(joined)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A residual refinement of the pyramid's output."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = ConvBlock(PYRAMID_CHANNELS, DECODER_CHANNELS, kernel=1)
        self.residual = ConvBlock(DECODER_CHANNELS, DECODER_CHANNELS, kernel=3)
        self.output = ConvBlock(DECODER_CHANNELS, DECODER_CHANNELS, kernel=3)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c h w"]:
        """Same size, half the width."""
        reduced = self.reduce(x)
        return self.output(reduced + self.residual(reduced))  # type: ignore[no-any-return]


class InvertedPyramid(nn.Module):
    """From one hyperrelation map per level to the logits of the query mask."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.fuse_deepest = FuseDeepest(dropout)
        self.fuse_finest = FuseFinest()
        self.decoder = Decoder()
        self.head = Head(DECODER_CHANNELS)
        self.inner_heads = nn.ModuleList([Head(MERGED_CHANNELS) for _ in range(3)])

    def forward(
        self,
        level3: Float[Tensor, "b c h3 w3"],
        level4: Float[Tensor, "b c h4 w4"],
        level5: Float[Tensor, "b c h5 w5"],
    ) -> tuple[Float[Tensor, "b 2 _ _"], tuple[Float[Tensor, "b 2 _ _"], ...]]:
        """Logits at twice level 3's size, and the inner logits of levels 5, 4, 3.

        Fidelity: level 5's inner head reads the map already resized to level 4 (published code).
        """
        h3, w3 = level3.shape[-2:]
        deepest = resize(level5, (level4.shape[-2], level4.shape[-1]))
        pyramid = resize(self.fuse_deepest(deepest, level4), (h3, w3))
        decoded = self.decoder(self.fuse_finest(pyramid, level3))
        logits = self.head(resize(decoded, (2 * h3, 2 * w3)))
        inner = zip(self.inner_heads, (deepest, level4, level3), strict=True)
        return logits, tuple(head(x) for head, x in inner)
