"""The inverted pyramid from the deepest level to the logits (paper, figure 2)."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mshnet.folding import conv_after_projection, conv_of_resized, projected_bias
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

    def of_resized(self, x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b 2 i j"]:
        """The logits of x resized, at that size."""
        first = cast(nn.Conv2d, self[0])
        return self[2](self[1](conv_of_resized(x, first.weight, size)))  # type: ignore[no-any-return]


class FuseDeepest(nn.Module):
    """Level 5, resized to level 4's size, joined with level 4.

    Two 1x1 convolutions, a concatenation, the deeper half first, and a 3x3 convolution: all linear, so
    computed as one 3x3 convolution of each input, the deeper one at its own size.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.deeper = nn.Conv2d(MERGED_CHANNELS, PYRAMID_CHANNELS, 1)
        self.lateral = nn.Conv2d(MERGED_CHANNELS, PYRAMID_CHANNELS, 1)
        self.join = ConvBlock(2 * PYRAMID_CHANNELS, PYRAMID_CHANNELS, kernel=3)
        self.refine = ConvBlock(PYRAMID_CHANNELS, PYRAMID_CHANNELS, kernel=3)
        self.dropout = ChannelDropout(dropout)

    def forward(
        self, deeper: Float[Tensor, "b c h5 w5"], lateral: Float[Tensor, "b c h4 w4"]
    ) -> Float[Tensor, "b d h4 w4"]:
        """Twice the width, at level 4's size."""
        conv = self.join.conv
        size = (lateral.shape[-2], lateral.shape[-1])
        of_deeper, of_lateral = conv.weight.chunk(2, dim=1)
        joined = F.conv2d(lateral, conv_after_projection(of_lateral, self.lateral.weight), conv.bias, padding=1)
        joined = joined + conv_of_resized(deeper, conv_after_projection(of_deeper, self.deeper.weight), size)
        joined = joined + projected_bias(conv.weight, torch.cat([_bias(self.deeper), _bias(self.lateral)]), size)
        return self.dropout(self.refine(self.join.finish(joined)))  # type: ignore[no-any-return]


class FuseFinest(nn.Module):
    """The pyramid so far, resized to level 3's size, joined with level 3.

    The 1x1 convolution of level 3 and the 3x3 convolution behind the concatenation are computed as one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.deeper = ConvBlock(PYRAMID_CHANNELS, PYRAMID_CHANNELS, kernel=3)
        self.lateral = nn.Conv2d(MERGED_CHANNELS, PYRAMID_CHANNELS, 1)
        self.join = ConvBlock(2 * PYRAMID_CHANNELS, PYRAMID_CHANNELS, kernel=3)
        self.refine = ConvBlock(PYRAMID_CHANNELS, PYRAMID_CHANNELS, kernel=3)

    def forward(
        self, deeper: Float[Tensor, "b d h4 w4"], lateral: Float[Tensor, "b c h3 w3"]
    ) -> Float[Tensor, "b d h3 w3"]:
        """Same width, at level 3's size."""
        size = (lateral.shape[-2], lateral.shape[-1])
        conv = self.deeper.conv
        deeper = self.deeper.finish(conv_of_resized(deeper, conv.weight, size, conv.bias))
        conv = self.join.conv
        of_deeper, of_lateral = conv.weight.chunk(2, dim=1)
        weight = torch.cat(
            [of_deeper, conv_after_projection(of_lateral, self.lateral.weight).to(of_deeper.dtype)], dim=1
        )
        joined = F.conv2d(torch.cat([deeper, lateral], dim=1), weight, conv.bias, padding=1)
        joined = joined + projected_bias(of_lateral, _bias(self.lateral), size)
        return self.refine(self.join.finish(joined))  # type: ignore[no-any-return]


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
        decoded = self.decoder(self.fuse_finest(self.fuse_deepest(level5, level4), level3))
        logits = self.head.of_resized(decoded, (2 * h3, 2 * w3))
        of_5, of_4, of_3 = self.inner_heads
        size4 = (level4.shape[-2], level4.shape[-1])
        return logits, (cast(Head, of_5).of_resized(level5, size4), of_4(level4), of_3(level3))


def _bias(conv: nn.Conv2d) -> Float[Tensor, " c"]:
    assert conv.bias is not None
    return conv.bias
