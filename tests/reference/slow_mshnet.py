"""MSHNet once more, slowly: one episode, shot, layer and object position at a time, from the equations.

Written independently of `mshnet`, so that a shared mistake is unlikely. It works on a plain dict of tensors
in the published names (`backbone.` + torchvision's name, and `merge.*`), in whatever dtype they have. Only
convolution and max-pooling are torch's; batch norm, resizing, attention and the loss are spelled out.
Dropout is left out: this is the network with dropout 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]

LEVELS = (3, 4, 5)
BLOCKS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}


@dataclass
class SlowPrediction:
    """Everything that a test may want to look at; the keys of the dicts are the levels 3, 4, 5."""

    cosine: dict[int, Tensor] | None
    prototype: dict[int, Tensor] | None
    merged: dict[int, Tensor] = field(default_factory=dict)
    inner_logits: tuple[Tensor, ...] = ()
    logits_low: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, align_corners=True: output i reads the input at i * (n_in - 1) / (n_out - 1)."""
    rows = _interpolation(x.shape[-2], height).to(x)
    columns = _interpolation(x.shape[-1], width).to(x)
    return rows @ x @ columns.T


def _interpolation(n_in: int, n_out: int) -> Tensor:
    weights = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_out):
        position = i * (n_in - 1) / (n_out - 1) if n_out > 1 else 0.0
        below = int(position)
        above = min(below + 1, n_in - 1)
        weights[i, below] += 1 - (position - below)
        weights[i, above] += position - below
    return weights


def nearest(labels: Tensor, height: int, width: int) -> Tensor:
    """Output (i, j) reads the input at (floor(i H / h), floor(j W / w))."""
    full_height, full_width = labels.shape[-2:]
    rows = [i * full_height // height for i in range(height)]
    columns = [j * full_width // width for j in range(width)]
    return labels[..., rows, :][..., columns]


# Layers


def conv(x: Tensor, state: State, name: str, dilation: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    padding = dilation if weight.shape[-1] == 3 else 0
    return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=padding, dilation=dilation)


def batch_norm(x: Tensor, state: State, name: str, training: bool) -> Tensor:
    """(x - mean) / sqrt(var + 1e-5) * weight + bias; in training of the batch, updating `state`."""
    if training:
        count = x.numel() // x.shape[1]
        mean = x.sum((0, 2, 3)) / count
        variance = (x - mean[:, None, None]).square().sum((0, 2, 3)) / count
        unbiased = variance.detach() * count / (count - 1)
        state[f"{name}.running_mean"] = 0.9 * state[f"{name}.running_mean"] + 0.1 * mean.detach()
        state[f"{name}.running_var"] = 0.9 * state[f"{name}.running_var"] + 0.1 * unbiased
        state[f"{name}.num_batches_tracked"] = state[f"{name}.num_batches_tracked"] + 1
    else:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    normal = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return normal * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def conv_bn_relu(x: Tensor, state: State, conv_name: str, bn_name: str, training: bool, dilation: int = 1) -> Tensor:
    return batch_norm(conv(x, state, conv_name, dilation), state, bn_name, training).clamp(min=0)


# 1. Backbone


def backbone_features(image: Tensor, state: State, backbone: str) -> dict[int, list[Tensor]]:
    """Of one image (3, H, W): level -> (c, h, w) per block, after the addition and before the last ReLU."""

    def frozen_bn(y: Tensor, name: str) -> Tensor:
        return batch_norm(y, state, f"backbone.{name}", training=False)

    def strided(y: Tensor, name: str, stride: int) -> Tensor:
        weight = state[f"backbone.{name}.weight"]
        return F.conv2d(y, weight, stride=stride, padding=weight.shape[-1] // 2)

    with torch.no_grad():
        x = frozen_bn(strided(image[None], "conv1", 2), "bn1").clamp(min=0)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        features: dict[int, list[Tensor]] = {}
        for layer, blocks in enumerate(BLOCKS[backbone], start=1):
            for block in range(blocks):
                name = f"layer{layer}.{block}"
                stride = 2 if layer > 1 and block == 0 else 1
                bottleneck = f"backbone.{name}.conv3.weight" in state
                # torchvision puts a bottleneck's stride on its 3x3 convolution.
                first, second = (1, stride) if bottleneck else (stride, 1)
                y = frozen_bn(strided(x, f"{name}.conv1", first), f"{name}.bn1").clamp(min=0)
                y = frozen_bn(strided(y, f"{name}.conv2", second), f"{name}.bn2")
                if bottleneck:
                    y = frozen_bn(strided(y.clamp(min=0), f"{name}.conv3", 1), f"{name}.bn3")
                if f"backbone.{name}.downsample.0.weight" in state:
                    x = frozen_bn(strided(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
                features.setdefault(layer + 1, []).append((y + x)[0])
                x = (y + x).clamp(min=0)
    return {level: features[level] for level in LEVELS}


# 2. Object positions


def level_masks(mask: Tensor, sizes: dict[int, tuple[int, int]]) -> dict[int, Tensor]:
    """A {0,1} mask (H, W) resized to twice level 3, then each level from the one before."""
    soft = resize(mask, 2 * sizes[3][0], 2 * sizes[3][1])
    masks = {}
    for level in LEVELS:
        soft = resize(soft, *sizes[level])
        masks[level] = soft
    return masks


def object_positions(soft_mask: Tensor) -> list[tuple[int, int]]:
    """Where the mask is at least the mean of its positive values; none if nothing is positive."""
    positive = soft_mask[soft_mask > 0]
    if positive.numel() == 0:
        return []
    threshold = positive.mean()
    height, width = soft_mask.shape
    return [(i, j) for i in range(height) for j in range(width) if soft_mask[i, j] >= threshold]


def object_vectors(support: Tensor, soft_mask: Tensor) -> list[Tensor]:
    """Equation 2: the soft-masked features (c,) at the object positions; one zero vector if there is none."""
    vectors = [support[:, i, j] * soft_mask[i, j] for i, j in object_positions(soft_mask)]
    return vectors or [torch.zeros_like(support[:, 0, 0])]


# 3., 4. The two similarities of one layer


def cosine_map(query: Tensor, objects: list[Tensor]) -> Tensor:
    """Equation 5, (h, w): mean over the object's vectors of relu(cosine)."""
    unit_query = query / (query.square().sum(0).sqrt() + 1e-5)
    total = torch.zeros_like(query[0])
    for vector in objects:
        unit = vector / (vector.square().sum().sqrt() + 1e-5)
        total = total + (unit_query * unit[:, None, None]).sum(0).clamp(min=0)
    return total / len(objects)


def prototype_map(query: Tensor, objects: list[Tensor], weight: Tensor) -> Tensor:
    """Equations 3 and 4, (h, w): sigmoid(W [x_q, x_p]) with the mean object vector as x_p."""
    total = torch.zeros_like(objects[0])
    for vector in objects:
        total = total + vector
    prototype = total / len(objects)
    if prototype.sum() == 0:
        query = torch.zeros_like(query)
    both = torch.cat([query, prototype[:, None, None].expand_as(query)])
    return 1 / (1 + torch.exp(-(both * weight.reshape(-1, 1, 1)).sum(0)))


def similarities(
    query: Tensor, supports: Tensor, masks: Tensor, state: State, backbone: str
) -> tuple[dict[int, Tensor] | None, dict[int, Tensor] | None]:
    """Both similarities, level -> (B, K, L, h, w); None for the one that these weights do without."""
    with_cosine = "merge.conv4.conv1.weight" in state
    with_prototype = "merge.conv4.conv2.weight" in state
    cosine: dict[int, list[Tensor]] = {level: [] for level in LEVELS}
    prototype: dict[int, list[Tensor]] = {level: [] for level in LEVELS}
    for b in range(query.shape[0]):
        of_query = backbone_features(query[b], state, backbone)
        sizes = {level: (of_query[level][0].shape[1], of_query[level][0].shape[2]) for level in LEVELS}
        for k in range(supports.shape[1]):
            of_support = backbone_features(supports[b, k], state, backbone)
            soft_masks = level_masks(masks[b, k].to(query), sizes)
            for level in LEVELS:
                for query_map, support_map in zip(of_query[level], of_support[level], strict=True):
                    objects = object_vectors(support_map, soft_masks[level])
                    if with_cosine:
                        cosine[level].append(cosine_map(query_map, objects))
                    if with_prototype:
                        weight = state[f"merge.query_sup_corrConv.{5 - level}.conv2.weight"]
                        prototype[level].append(prototype_map(query_map, objects, weight))

    def stacked(maps: dict[int, list[Tensor]]) -> dict[int, Tensor]:
        shape = (supports.shape[0], supports.shape[1], -1)
        return {level: torch.stack(maps[level]).reshape(*shape, *maps[level][0].shape) for level in LEVELS}

    return (stacked(cosine) if with_cosine else None, stacked(prototype) if with_prototype else None)


# 5. Symmetric merging block


def block_conv(maps: Tensor, state: State, name: str, training: bool) -> Tensor:
    """(B, K, L, h, w) -> (B, c, h, w): every shot on its own, in order, then their mean."""
    total = None
    shots = maps.shape[1]
    for k in range(shots):
        x = conv_bn_relu(maps[:, k], state, f"{name}.conv0", f"{name}.bn0", training)
        x = conv_bn_relu(x, state, f"{name}.conv1", f"{name}.bn1", training)
        total = x if total is None else total + x
    assert total is not None
    return total / shots


def prototype_shot_conv(x: Tensor, state: State, name: str, training: bool) -> Tensor:
    branches = [
        conv_bn_relu(x, state, f"{name}.conv{i}.0", f"{name}.conv{i}.1", training, dilation)
        for i, dilation in enumerate((1, 2, 4))
    ]
    return conv_bn_relu(torch.cat(branches, 1), state, f"{name}.conv3.0", f"{name}.conv3.1", training)


def attention(x: Tensor, state: State, name: str) -> Tensor:
    """The factor of each channel, (B, C, 1, 1)."""

    def mlp(pooled: Tensor) -> Tensor:
        hidden = (pooled @ state[f"{name}.mlp.1.weight"].T + state[f"{name}.mlp.1.bias"]).clamp(min=0)
        return hidden @ state[f"{name}.mlp.3.weight"].T + state[f"{name}.mlp.3.bias"]

    flat = x.flatten(2)
    score = mlp(flat.mean(2)) + mlp(flat.max(2).values)
    return (1 / (1 + torch.exp(-score)))[:, :, None, None]


def merging_block(cosine: Tensor | None, prototype: Tensor | None, state: State, level: int, training: bool) -> Tensor:
    """(B, K, L, h, w) of one level -> (B, 256, h, w)."""
    name = f"merge.conv{level - 1}"
    parts = []
    if cosine is not None:
        x = block_conv(cosine, state, f"merge.sim_layer_corrConv.{5 - level}", training)
        shot = f"merge.simShotConv{level - 1}"
        x = conv_bn_relu(x, state, f"{shot}.conv0", f"{shot}.bn0", training)
        parts.append(conv(x, state, f"{name}.conv1"))
    if prototype is not None:
        x = block_conv(prototype, state, f"merge.qs_layer_corrConv.{5 - level}", training)
        x = prototype_shot_conv(x, state, f"merge.sqShotConv{level - 1}", training)
        parts.append(conv(x, state, f"{name}.conv2"))
    merged = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    merged = conv_bn_relu(merged, state, f"{name}.merge.conv0", f"{name}.merge.bn0", training)
    merged = merged * attention(merged, state, f"{name}.chATT")
    return conv_bn_relu(merged, state, f"{name}.merge2.conv0", f"{name}.merge2.bn0", training)


# 6. Inverted pyramid


def head(x: Tensor, state: State, name: str) -> Tensor:
    return conv(conv(x, state, f"{name}.0").clamp(min=0), state, f"{name}.2")


def forward(
    state: State, query: Tensor, supports: Tensor, masks: Tensor, backbone: str, training: bool = False
) -> SlowPrediction:
    """The whole network on normalised images; in training the running statistics in `state` are replaced."""
    cosine, prototype = similarities(query, supports, masks, state, backbone)
    result = SlowPrediction(cosine, prototype)
    for level in (5, 4, 3):
        result.merged[level] = merging_block(
            cosine[level] if cosine else None, prototype[level] if prototype else None, state, level, training
        )

    def block(x: Tensor, name: str) -> Tensor:
        return conv_bn_relu(x, state, f"{name}.conv0", f"{name}.bn0", training)

    level4_size, level3_size = result.merged[4].shape[2:], result.merged[3].shape[2:]
    level5 = resize(result.merged[5], *level4_size)
    upper, lower = (
        conv(level5, state, "merge.conv43.conv1"),
        conv(result.merged[4], state, "merge.conv43.conv2"),
    )
    x = torch.cat([upper, lower], 1)
    x = block(block(x, "merge.conv43.merge"), "merge.conv43.merge2")
    x = block(resize(x, *level3_size), "merge.conv432.conv1")
    x = torch.cat([x, conv(result.merged[3], state, "merge.conv432.conv2")], 1)
    x = block(block(x, "merge.conv432.merge"), "merge.conv432.convout")

    a = conv_bn_relu(x, state, "merge.decoder1.conv0.0", "merge.decoder1.conv0.1", training)
    x = block(a + block(a, "merge.decoder1.conv1"), "merge.decoder1.conv2")
    result.logits_low = head(resize(x, 2 * level3_size[0], 2 * level3_size[1]), state, "merge.decoderOut")
    result.logits = resize(result.logits_low, *query.shape[2:])
    result.inner_logits = (
        head(level5, state, "merge.decoder4"),
        head(result.merged[4], state, "merge.decoder3"),
        head(result.merged[3], state, "merge.decoder2"),
    )
    return result


# 7. Loss


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over all pixels of log(sum_c exp z_c) - z_label; a label other than 1 is background."""
    total = logits.new_zeros(())
    for b in range(logits.shape[0]):
        background, foreground = logits[b, 0], logits[b, 1]
        largest = torch.maximum(background, foreground).detach()
        log_sum = largest + ((background - largest).exp() + (foreground - largest).exp()).log()
        total = total + (log_sum - torch.where(labels[b] == 1, foreground, background)).sum()
    return total / labels.numel()


def outer_loss(prediction: SlowPrediction, query_mask: Tensor) -> Tensor:
    """Of the final logits at twice the level-3 size; what the published code calls its loss in eval mode."""
    return cross_entropy(prediction.logits_low, nearest(query_mask, *prediction.logits_low.shape[2:]))


def inner_loss(prediction: SlowPrediction, query_mask: Tensor) -> Tensor:
    """Sum over the three levels, each resized to the level-3 size."""
    size = prediction.inner_logits[2].shape[2:]
    labels = nearest(query_mask, *size)
    total = prediction.logits_low.new_zeros(())
    for logits in prediction.inner_logits:
        total = total + cross_entropy(resize(logits, *size), labels)
    return total


def loss(prediction: SlowPrediction, query_mask: Tensor, inner_weight: float = 0.3) -> Tensor:
    return outer_loss(prediction, query_mask) + inner_weight * inner_loss(prediction, query_mask)
