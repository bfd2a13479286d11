"""MSHNet as the published code computes it, loop by loop: what our training step is measured against.

Written in our words from the facts of the published implementation, with its habits kept: float32 and contiguous
tensors; the backbone once for the queries and once for each shot, batch norm as a layer; the similarities in Python
loops over episodes, layers and shots, the whole product of query and object positions written out, the prototype
repeated and concatenated with the query's features; the merging shot by shot; logits at the image's size in every
forward pass. Modules have the names of `mshnet.model.RelationNetwork`, so that the same weights load into both.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mshnet.backbone import LEVELS, Backbone

Maps = list[list[Tensor]]
"""Feature or similarity maps: by level, then by layer."""


class LiteralMSHNet(nn.Module):
    """The published network's loops. `backbone` is shared with an `MSHNet`; weights come by `load_state_dict`."""

    def __init__(self, backbone: Backbone, similarity: str = "both", dropout: float = 0.2) -> None:
        super().__init__()
        self.backbone = backbone
        self.relation = LiteralRelation(backbone.layers, backbone.channels, similarity, dropout)

    def forward(self, queries: Tensor, supports: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Normalised images (B,3,H,W), (B,K,3,H,W), masks (B,K,H,W): logits at full size, before, and inner ones."""
        query, shots = self.features(queries, supports)
        return self.relation(query, shots, masks)

    def features(self, queries: Tensor, supports: Tensor) -> tuple[Maps, list[Maps]]:
        """Of the queries, and of every shot: the backbone once for each."""
        return self._maps(queries), [self._maps(shot) for shot in supports.unbind(1)]

    @torch.no_grad()
    def _maps(self, images: Tensor) -> Maps:
        net = self.backbone
        x = net.maxpool(torch.relu(net.bn1(net.conv1(images.contiguous()))))
        x = net.layer1(x)
        maps = []
        for level in (net.layer2, net.layer3, net.layer4):
            maps.append([])
            for block in level:
                y = torch.relu(block.bn1(block.conv1(x)))
                y = block.bn2(block.conv2(y))
                if hasattr(block, "conv3"):
                    y = block.bn3(block.conv3(torch.relu(y)))
                y = y + (x if block.downsample is None else block.downsample(x))
                maps[-1].append(y.clone())
                x = torch.relu(y)
        return maps


class LiteralRelation(nn.Module):
    """Similarities and everything learnable."""

    def __init__(self, layers: dict[int, int], channels: dict[int, int], similarity: str, dropout: float) -> None:
        super().__init__()
        self.similarity = similarity
        if similarity != "cosine":
            self.gps = nn.ModuleDict({str(v): _Linear(channels[v]) for v in LEVELS})
        self.merging = nn.ModuleDict({str(v): _Merging(layers[v], similarity, dropout) for v in LEVELS})
        self.pyramid = _Pyramid(dropout)

    def similarities(self, query: Maps, shots: list[Maps], masks: Tensor) -> tuple[list[list[Tensor]], ...]:
        """Cosine and prototype maps, each by level, then by shot: (B, L, h, w)."""
        cosine: list[list[Tensor]] = [[] for _ in LEVELS]
        prototype: list[list[Tensor]] = [[] for _ in LEVELS]
        for support, mask in zip(shots, masks.unbind(1), strict=True):
            pyramid = _mask_pyramid(mask, [maps[0].shape[-2:] for maps in query])
            for i, level in enumerate(LEVELS):
                objects = [[_object_vectors(x[b], pyramid[i][b]) for b in range(len(mask))] for x in support[i]]
                if self.similarity != "prototype":
                    maps = [_cosine(q, vectors) for q, vectors in zip(query[i], objects, strict=True)]
                    cosine[i].append(torch.stack(maps, dim=1))
                if self.similarity != "cosine":
                    linear = self.gps[str(level)].linear
                    maps = [_prototype(q, vectors, linear) for q, vectors in zip(query[i], objects, strict=True)]
                    prototype[i].append(torch.cat(maps, dim=1))
        return cosine, prototype

    def forward(self, query: Maps, shots: list[Maps], masks: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits at the masks' size, logits before that resize, inner logits of levels 5, 4, 3."""
        cosine, prototype = self.similarities(query, shots, masks)
        merged = [self.merging[str(v)](cosine[i], prototype[i]) for i, v in enumerate(LEVELS)]
        low, inner = self.pyramid(*merged)
        return _resize(low, masks.shape[-2:]), low, inner


def literal_loss(low: Tensor, inner: list[Tensor], query_masks: Tensor, inner_weight: float) -> Tensor:
    """The training loss, as `mshnet.loss.segmentation_loss` has it."""
    truth = (query_masks == 1).unsqueeze(1).float()
    size = low.shape[-2:]
    loss = F.cross_entropy(low, F.interpolate(truth, size=size, mode="nearest").squeeze(1).long())
    small = [size[0] // 2, size[1] // 2]
    small_truth = F.interpolate(truth, size=small, mode="nearest").squeeze(1).long()
    return loss + inner_weight * sum(F.cross_entropy(_resize(logits, small), small_truth) for logits in inner)


# Similarities


def _resize(x: Tensor, size: torch.Size | list[int]) -> Tensor:
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=True)


def _mask_pyramid(mask: Tensor, sizes: list[torch.Size]) -> list[Tensor]:
    soft = _resize(mask.unsqueeze(1), [2 * sizes[0][0], 2 * sizes[0][1]])
    pyramid = []
    for size in sizes:
        soft = _resize(soft, size)
        pyramid.append(soft)
    return pyramid


def _object_vectors(support: Tensor, soft: Tensor) -> Tensor:
    """(c, n): the masked features at the positions that count as object."""
    weighted = (support * soft).flatten(1)
    values = soft.flatten()
    positive = values[values > 0]
    if len(positive) == 0:
        return weighted.new_zeros(len(weighted), 1)
    return weighted[:, values >= positive.mean()]


def _cosine(query: Tensor, objects: list[Tensor]) -> Tensor:
    """(B, h, w), episode by episode."""
    maps = []
    for q, vectors in zip(query, objects, strict=True):
        unit_query = q.flatten(1)
        unit_query = unit_query / (unit_query.norm(dim=0, keepdim=True) + 1e-5)
        unit_object = vectors / (vectors.norm(dim=0, keepdim=True) + 1e-5)
        product = torch.relu(unit_query.T @ unit_object)
        maps.append(product.mean(1).reshape(q.shape[1:]))
    return torch.stack(maps)


def _prototype(query: Tensor, objects: list[Tensor], linear: nn.Conv2d) -> Tensor:
    """(B, 1, h, w): a 1x1 convolution of the query's features beside the repeated prototype."""
    prototypes = torch.stack([vectors.mean(1) for vectors in objects])[:, :, None, None]
    present = (prototypes.sum(1, keepdim=True) != 0).float()
    both = torch.cat([query * present, prototypes.expand_as(query)], dim=1)
    return torch.sigmoid(linear(both))


# Learnable part


class _Linear(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(2 * channels, 1, 1, bias=False)


def _block(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _shot_by_shot(layers: int, channels: int) -> nn.Sequential:
    blocks = [("layers", _block(layers, channels, 1)), ("local", _block(channels, channels, 3))]
    return nn.Sequential(OrderedDict(blocks))


class _Atrous(nn.Module):
    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        branches = [_block(channels, channels, kernel, d) for kernel, d in ((1, 1), (3, 2), (3, 4))]
        self.branches = nn.ModuleList(branches)
        self.fuse = _block(3 * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fuse(torch.cat([branch(x) for branch in self.branches], dim=1)))


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, channels // 4), nn.ReLU(), nn.Linear(channels // 4, channels))

    def forward(self, x: Tensor) -> Tensor:
        average = F.avg_pool2d(x, x.shape[-2:]).flatten(1)
        largest = F.max_pool2d(x, x.shape[-2:]).flatten(1)
        return x * torch.sigmoid(self.mlp(average) + self.mlp(largest))[:, :, None, None].expand_as(x)


class _Merging(nn.Module):
    def __init__(self, layers: int, similarity: str, dropout: float) -> None:
        super().__init__()
        if similarity != "prototype":
            self.cosine_block = _shot_by_shot(layers, 256)
            self.cosine_shot = _block(256, 256, 3)
            self.cosine_project = nn.Conv2d(256, 256, 1)
        if similarity != "cosine":
            self.prototype_block = _shot_by_shot(layers, 128)
            self.prototype_shot = _Atrous(128, dropout)
            self.prototype_project = nn.Conv2d(128, 256, 1)
        self.merge, self.attention = _block(256, 256, 3), _Attention(256)
        self.refine, self.dropout = _block(256, 256, 3), nn.Dropout2d(dropout)

    def forward(self, cosine: list[Tensor], prototype: list[Tensor]) -> Tensor:
        parts = []
        if cosine:
            shots = sum(self.cosine_block(shot) for shot in cosine) / len(cosine)
            parts.append(self.cosine_project(self.cosine_shot(shots)))
        if prototype:
            shots = sum(self.prototype_block(shot) for shot in prototype) / len(prototype)
            parts.append(self.prototype_project(self.prototype_shot(shots)))
        return self.dropout(self.refine(self.attention(self.merge(sum(parts)))))


class _Deepest(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.deeper, self.lateral = nn.Conv2d(256, 512, 1), nn.Conv2d(256, 512, 1)
        self.join, self.refine = _block(1024, 512, 3), _block(512, 512, 3)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, deeper: Tensor, lateral: Tensor) -> Tensor:
        both = torch.cat([self.deeper(deeper), self.lateral(lateral)], dim=1)
        return self.dropout(self.refine(self.join(both)))


class _Finest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deeper, self.lateral = _block(512, 512, 3), nn.Conv2d(256, 512, 1)
        self.join, self.refine = _block(1024, 512, 3), _block(512, 512, 3)

    def forward(self, deeper: Tensor, lateral: Tensor) -> Tensor:
        return self.refine(self.join(torch.cat([self.deeper(deeper), self.lateral(lateral)], dim=1)))


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.residual, self.output = _block(512, 256, 1), _block(256, 256, 3), _block(256, 256, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        return self.output(x + self.residual(x))


def _head() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(256, 128, 3, padding=1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(128, 2, 3, padding=1)
    )


class _Pyramid(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.fuse_deepest, self.fuse_finest, self.decoder = _Deepest(dropout), _Finest(), _Decoder()
        self.head, self.inner_heads = _head(), nn.ModuleList([_head() for _ in range(3)])

    def forward(self, level3: Tensor, level4: Tensor, level5: Tensor) -> tuple[Tensor, list[Tensor]]:
        height, width = level3.shape[-2:]
        deepest = _resize(level5, level4.shape[-2:])
        joined = _resize(self.fuse_deepest(deepest, level4), [height, width])
        decoded = self.decoder(self.fuse_finest(joined, level3))
        logits = self.head(_resize(decoded, [2 * height, 2 * width]))
        return logits, [head(x) for head, x in zip(self.inner_heads, (deepest, level4, level3), strict=True)]
