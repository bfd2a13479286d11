"""What MSHNet costs before anything runs: floating-point operations per episode and memory of an update.

Both are counted on tensors without data, on any machine, by running the network's own layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mshnet.backbone import LEVELS, Features
from mshnet.config import PAPER_INNER_WEIGHT, ModelConfig
from mshnet.errors import InputError
from mshnet.loss import segmentation_loss
from mshnet.model import FewShotModel, MSHNet, Prediction


@dataclass(frozen=True)
class EpisodeFlops:
    """Operations of one episode, one query; a multiplication and its addition are two.

    Convolutions and matrix products only: what is left (norms, activations, resizing) is memory traffic.
    """

    backbone: int
    """All images, forward only: it is frozen."""
    cosine: int
    prototype: int
    merging: int
    """The three symmetric merging blocks, forward."""
    pyramid: int
    """The decoder with its heads, forward."""
    backward: int
    """Of merging and pyramid."""

    @property
    def evaluation(self) -> int:
        """Forward only."""
        return self.backbone + self.cosine + self.prototype + self.merging + self.pyramid

    @property
    def training(self) -> int:
        """Forward and backward."""
        return self.evaluation + self.backward


def episode_flops(
    config: ModelConfig, shot: int, image_size_px: int = 473, object_share: float = 1.0, batch: int = 8
) -> EpisodeFlops:
    """Counted on the network itself; the similarities, whose work depends on the data, by formula.

    `object_share`: how much of a support's positions is object, 0 to 1. 1 is what multiplying with every
    position costs. `batch`: the episodes that share what is done once per update, such as merging weights.
    """
    with FakeTensorMode():
        network = _network(config).train()
        images = torch.empty(1 + shot, 3, image_size_px, image_size_px)
        features: list[Features] = []
        backbone = _flops(lambda: features.append(network.backbone(images)))
        maps = _similarity_maps(network, features[0], batch, shot)
        merged: list[Tensor] = []
        merging = _flops(lambda: merged.extend(_merged(network, *maps)))
        outputs: list[Tensor] = []
        pyramid = _flops(lambda: outputs.extend(_flat(network.relation.pyramid(*merged))))
        backward = _flops(lambda: torch.stack([output.sum() for output in outputs]).sum().backward())
    cosine, prototype = _similarity_flops(config, features[0], shot, object_share)
    return EpisodeFlops(backbone, cosine, prototype, merging // batch, pyramid // batch, backward // batch)


def _similarity_flops(config: ModelConfig, features: Features, shot: int, object_share: float) -> tuple[int, int]:
    cosine = prototype = 0
    for level in features:
        layers, channels, h, w = level.shape[1:]
        objects = round(object_share * h * w)
        cosine += 2 * shot * layers * channels * h * w * objects
        # The prototype's sum over the object, and the linear map of the query and of the prototype.
        prototype += 2 * layers * channels * (shot * objects + h * w + shot)
    return cosine if config.similarity != "prototype" else 0, prototype if config.similarity != "cosine" else 0


def batch_norm_calls(config: ModelConfig, shot: int) -> int:
    """How often an update's forward pass asks for batch statistics: each is a message where workers share them."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with FakeTensorMode():
        network = _network(config).train()
        for module in network.relation.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(count)
        features = network.backbone(torch.empty(1, 3, 65, 65))
        network.relation.pyramid(*_merged(network, *_similarity_maps(network, features, episodes=2, shot=shot)))
    return calls


@dataclass(frozen=True)
class UpdateMemory:
    """Bytes of one update by plain layers, without compilation."""

    weights: int
    """Backbone and learnable part, float32."""
    gradients: int
    optimizer: int
    """SGD's momentum."""
    features: int
    """Of all images of the batch."""
    peak: int
    """Most that is alive at once, of all of these and the activations."""


def update_memory(
    config: ModelConfig,
    shot: int,
    batch: int,
    image_size_px: int = 473,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
) -> UpdateMemory:
    """An estimate for a GPU: every tensor of an update counted while it is alive, under autocast.

    Not in it: what the allocator rounds up and cuDNN takes for itself, the CUDA context, and inside the
    similarities anything but three copies of the features (weighted, and both divided by their norms).
    """
    with FakeTensorMode():
        network = _network(config).train()
        optimizer = torch.optim.SGD(network.relation.parameters(), lr=0.01, momentum=0.9)
        alive = _LiveBytes()
        alive.count([*network.parameters(), *network.buffers()])
        weights = alive.now
        with alive:
            for parameter in network.relation.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # makes the momentum
            momentum = alive.now - weights - learnable_bytes(network)
            features = _update(network, optimizer, alive, shot, batch, image_size_px, precision)
    return UpdateMemory(weights, learnable_bytes(network), momentum, features, alive.peak)


def _network(config: ModelConfig) -> MSHNet:
    if config.architecture != "mshnet":
        raise InputError(f"expected architecture mshnet, whose layers are counted here, got {config.architecture!r}")
    return MSHNet(config)


def learnable_bytes(network: FewShotModel) -> int:
    """Of the learnable part's weights, and so of its gradients."""
    return sum(parameter.numel() * parameter.element_size() for parameter in network.relation.parameters())


def _update(
    network: MSHNet,
    optimizer: torch.optim.Optimizer,
    alive: _LiveBytes,
    shot: int,
    batch: int,
    image_size_px: int,
    precision: str,
) -> int:
    """One update on tensors without data; the bytes of its features."""
    autocast: AbstractContextManager[Any] = nullcontext()
    if precision == "bfloat16":
        autocast = torch.autocast("cpu", torch.bfloat16)
    images = torch.empty(batch * (1 + shot), 3, image_size_px, image_size_px, dtype=torch.uint8)
    with autocast:
        features = network.backbone(images.float())
        feature_bytes: int = sum(maps.numel() * maps.element_size() for maps in features)
        alive.peak = max(alive.peak, alive.now + 3 * feature_bytes)
        merged = _merged(network, *_similarity_maps(network, features, batch, shot))
        logits, inner = network.relation.pyramid(*merged)
    prediction = Prediction(
        logits_low=logits.float(),
        inner_logits=tuple(part.float() for part in inner),
        size=(image_size_px, image_size_px),
    )
    masks = torch.zeros(batch, image_size_px, image_size_px, dtype=torch.uint8)
    losses = segmentation_loss(prediction, masks, PAPER_INNER_WEIGHT)
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    optimizer.step()
    return feature_bytes


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def count(self, tree: Any) -> None:
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, Tensor) or tensor.untyped_storage()._cdata in self._alive:
                continue
            storage = tensor.untyped_storage()
            self._alive.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _free(self, storage: int, size: int) -> None:
        self._alive.discard(storage)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(result)
        return result


def _flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _similarity_maps(
    network: MSHNet, features: Features, episodes: int, shot: int
) -> tuple[dict[int, Tensor] | None, dict[int, Tensor] | None]:
    """Cosine and prototype maps of these features' shapes; only the latter have anything learnable behind them."""
    shapes = {
        level: (episodes, shot, maps.shape[1], *maps.shape[-2:]) for level, maps in zip(LEVELS, features, strict=True)
    }
    similarity = network.config.similarity
    cosine = {level: torch.empty(shape) for level, shape in shapes.items()}
    prototype = {level: torch.empty(shape, requires_grad=True) for level, shape in shapes.items()}
    return cosine if similarity != "prototype" else None, prototype if similarity != "cosine" else None


def _merged(network: MSHNet, cosine: dict[int, Tensor] | None, prototype: dict[int, Tensor] | None) -> list[Tensor]:
    return [
        network.relation.merging[str(level)](cosine[level] if cosine else None, prototype[level] if prototype else None)
        for level in LEVELS
    ]


def _flat(outputs: tuple[Tensor, tuple[Tensor, ...]]) -> list[Tensor]:
    return [outputs[0], *outputs[1]]
