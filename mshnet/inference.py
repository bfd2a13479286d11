"""A trained model at work on one device at one precision: from pictures to what is kept of a support, and to logits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mshnet import memory
from mshnet.backbone import Features, InferenceBackbone
from mshnet.data.squares import squared
from mshnet.errors import InputError
from mshnet.masking import resize
from mshnet.model import FewShotModel

Precision = Literal["float32", "bfloat16"]


class Network:
    """Backbone and relation, in eval mode. Call it under `torch.inference_mode`; safe to share between threads."""

    def __init__(self, model: FewShotModel, image_size_px: int, device: str, precision: Precision) -> None:
        """Takes the model's relation over; its backbone is copied."""
        if precision not in ("float32", "bfloat16"):
            raise InputError(f"precision must be float32 or bfloat16, got {precision!r}")
        self.device = named_device(device)
        self.precision = precision
        self.image_size_px = image_size_px
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.backbone = InferenceBackbone(model.backbone, dtype).to(self.device)
        self.relation = model.relation.to(self.device).eval().requires_grad_(False)

    def square(self, pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[Tensor, "3 S S"]:
        """A picture as the network sees it."""
        return torch.from_numpy(np.array(squared(pixels, self.image_size_px))).permute(2, 0, 1)

    def features(self, squares: UInt8[Tensor, "n 3 S S"]) -> Features:
        """Of pictures, on the device."""
        found: Features = self.backbone(squares.to(self.device))
        return found

    def remember(self, square: UInt8[Tensor, "3 S S"], mask: UInt8[Tensor, "S S"]) -> Any:
        """What is kept of a support (mask: 1 object, 0 not)."""
        features = self.features(square[None])
        with self._computing():
            return memory.remember(self.relation, features, mask.to(self.device).float()[None, None])

    def logits(self, query: Features, supports: Sequence[Any]) -> Float[Tensor, "b 2 _ _"]:
        """Of b queries by what was kept of k supports, float32, at the network's own resolution."""
        size = (self.image_size_px, self.image_size_px)
        with self._computing():
            logits: Tensor = memory.recall(self.relation, query, supports, size).logits_low
            return logits.float()

    def _computing(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")


def foreground_lead(logits: Float[Tensor, "2 _ _"], size: tuple[int, int]) -> Float[Tensor, "H W"]:
    """Foreground's logit less background's at a picture's size: above 0 exactly where it is the larger one."""
    resized = resize(logits[None], size)[0]
    return resized[1] - resized[0]


def named_device(name: str) -> torch.device:
    """auto (a GPU where there is one), cpu, cuda or cuda:N. Raises InputError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    is_there = device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())
    if not is_there:
        raise InputError(f"expected a device that torch can use here, got {name!r}; use cpu, or auto")
    return device


def fingerprint(model: FewShotModel, image_size_px: int) -> str:
    """SHA-256 (hex) of a model's configuration and weights, and of the image size."""
    digest = hashlib.sha256(json.dumps([model.config.identity(), image_size_px], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
