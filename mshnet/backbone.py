"""The frozen feature extractor: one feature map per residual block of levels 3, 4, 5 (paper, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
import torchvision
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck

from mshnet.config import BackboneName
from mshnet.data.transforms import normalise
from mshnet.errors import InputError

LEVELS = (3, 4, 5)


class Features(NamedTuple):
    """Feature maps of n images: one tensor per level, its layers stacked.

    With ResNet-50 at 473 px: (n, 4, 512, 60, 60), (n, 6, 1024, 30, 30), (n, 3, 2048, 15, 15).
    """

    level3: Float[Tensor, "n l3 c3 h3 w3"]
    level4: Float[Tensor, "n l4 c4 h4 w4"]
    level5: Float[Tensor, "n l5 c5 h5 w5"]


class Backbone(nn.Module):
    """A torchvision ResNet without its head, always in eval mode, without gradients.

    A feature map is taken after a block's residual addition and *before* its last ReLU.
    Construction downloads nothing: the weights are random until `load_torchvision_state_dict`.
    """

    def __init__(self, name: BackboneName) -> None:
        super().__init__()
        resnet = getattr(torchvision.models, name)(weights=None)
        self.conv1, self.bn1, self.maxpool = resnet.conv1, resnet.bn1, resnet.maxpool
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4
        self.name = name
        levels = (self.layer2, self.layer3, self.layer4)
        self.layers = {level: len(blocks) for level, blocks in zip(LEVELS, levels, strict=True)}
        self.channels = {
            level: width * levels[0][0].expansion for level, width in zip(LEVELS, (128, 256, 512), strict=True)
        }
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode whatever is asked: the backbone is frozen, its batch norm with it."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "n 3 H W"] | UInt8[Tensor, "n 3 H W"]) -> Features:
        """Features of images, any size from 32 px: RGB 0..255 in uint8, or floats already normalised."""
        images = images if images.is_floating_point() else normalise(images)
        x = self.maxpool(torch.relu(self.bn1(self.conv1(images))))
        x = self.layer1(x)
        maps = []
        for blocks in (self.layer2, self.layer3, self.layer4):
            level = []
            for block in blocks:
                level.append(_before_last_relu(block, x))
                x = torch.relu(level[-1])
            maps.append(torch.stack(level, dim=1))
        return Features(*maps)

    @torch.no_grad()
    def calibrate(self, images: Float[Tensor, "n 3 H W"]) -> None:
        """Set the batch norms' statistics to those of normalised images, layer by layer.

        For random weights only: without it all their features point the same way, and similarities say little.
        """
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, before = None, norm.momentum  # a plain average: of this one batch
            norm.train()
        self(images)
        for norm in norms:
            norm.momentum = before
            norm.eval()

    def load_torchvision_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights under torchvision's names; the classifier's (`fc.*`) are left out.

        Raises InputError when a name is missing, unknown or of another shape.
        """
        weights = {name: value for name, value in state_dict.items() if not name.startswith("fc.")}
        own = self.state_dict()
        missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        # Files from before PyTorch 0.4 have no batch counters, and inference needs none.
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        wrong = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
        if missing or unknown or wrong:
            first = (missing + unknown + sorted(wrong))[0]
            raise InputError(
                f"expected the weights of a torchvision {self.name}, found a state dict with {len(missing)} names "
                f"missing, {len(unknown)} unknown and {len(wrong)} of another shape (first: {first}); "
                f"give a file of the same architecture"
            )
        self.load_state_dict(weights, strict=False)


def _before_last_relu(block: BasicBlock | Bottleneck, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
    """One residual block up to and including its addition."""
    out = torch.relu(block.bn1(block.conv1(x)))
    if isinstance(block, Bottleneck):
        out = torch.relu(block.bn2(block.conv2(out)))
        out = block.bn3(block.conv3(out))
    else:
        out = block.bn2(block.conv2(out))
    shortcut = x if block.downsample is None else block.downsample(x)
    summed: Tensor = out + shortcut
    return summed


class InferenceBackbone(nn.Module):
    """What a `Backbone` computes, for speed: batch norm folded into the convolutions, channels_last, any precision.

    It is made of copies, from the backbone's weights and statistics as they are at the time; the
    backbone keeps its own, and its names. In float32 it agrees with it within 1e-5 of each map's scale.
    Features lie in memory as (n, l, h, w, c), as the similarity reads them.
    """

    def __init__(self, backbone: Backbone, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.stem, self.maxpool = fuse_conv_bn_eval(backbone.conv1, backbone.bn1), backbone.maxpool
        stages = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
        self.stages = nn.ModuleList(nn.Sequential(*(_FoldedBlock(block) for block in stage)) for stage in stages)
        self.dtype = dtype
        self.requires_grad_(False)
        self.to(dtype=dtype).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "n 3 H W"]) -> Features:
        """Features of RGB images of 0..255, in this backbone's precision."""
        x = normalise(images).to(self.dtype, memory_format=torch.channels_last)
        x = self.maxpool(self.stem(x).relu_())
        first, *others = (cast(nn.Sequential, stage) for stage in self.stages)
        for block in first:
            x = block(x).relu_()
        maps = []
        for stage in others:
            level, x = _stage(stage, x)
            maps.append(level)
        return Features(*maps)


def _stage(blocks: nn.Sequential, x: Tensor) -> tuple[Float[Tensor, "n l c h w"], Float[Tensor, "n c h w"]]:
    """A level's maps, each written where it stays, and the input of the next stage."""
    maps: Tensor | None = None
    for i, block in enumerate(blocks):
        summed = block(x)
        if maps is None:
            n, c, h, w = summed.shape
            maps = summed.new_empty(n, len(blocks), h, w, c).movedim(-1, 2)
        maps[:, i] = summed
        x = summed.relu_()
    assert maps is not None
    return maps, x


class _FoldedBlock(nn.Module):
    """A residual block without batch norm, up to and including its addition."""

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if isinstance(block, Bottleneck):
            pairs.append((block.conv3, block.bn3))
        self.convs = nn.ModuleList(fuse_conv_bn_eval(conv, norm) for conv, norm in pairs)
        self.shortcut = None if block.downsample is None else fuse_conv_bn_eval(*block.downsample)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        out = x
        for conv in self.convs[:-1]:
            out = conv(out).relu_()
        summed: Tensor = self.convs[-1](out)
        return summed.add_(x if self.shortcut is None else self.shortcut(x))
