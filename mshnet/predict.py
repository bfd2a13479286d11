"""Segment one's own pictures by a few labelled examples: no ground truth of the query, no training.

segmenter = Segmenter.from_checkpoint("model/")
segmenter.learn("scratch", ["a.jpg", "b.jpg"], ["a_mask.png", "b_mask.png"])
mask = segmenter("c.jpg").mask
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8, UInt16
from torch import Tensor

from mshnet import checkpoint, memory
from mshnet.backbone import Features, InferenceBackbone
from mshnet.data.squares import squared
from mshnet.data.transforms import nearest
from mshnet.errors import InputError
from mshnet.inputs import ImageInput, MaskInput, read_image, read_mask
from mshnet.masking import resize
from mshnet.model import FewShotModel
from mshnet.support_set import NEUTRAL_THRESHOLD, SupportSet

LOG = logging.getLogger(__name__)
Precision = Literal["float32", "bfloat16"]

__all__ = ["ImageInput", "MaskInput", "Precision", "Segmented", "Segmenter", "SupportSet", "read_image"]


@dataclass(frozen=True, eq=False)
class Segmented:
    """A picture segmented by n learned classes, at its own size."""

    classes: tuple[str, ...]
    probabilities: Float32[np.ndarray, "n H W"]
    """Of each class against everything else, 0..1; 0.5 or more exactly where the foreground logit is the larger one.
    Each class is judged alone, so they need not add up to 1."""
    thresholds: tuple[float, ...]
    """Of each class, 0..1."""

    @functools.cached_property
    def labels(self) -> UInt16[np.ndarray, "H W"]:
        """i + 1 where class i is; 0, background, where no class's probability is at or above its own threshold.

        Where several are, the most probable of them; of equal ones the first.
        """
        limits = np.array(self.thresholds, dtype=np.float32)[:, None, None]
        candidates = np.where(self.probabilities >= limits, self.probabilities, -1)
        best = candidates.argmax(0)
        found = np.take_along_axis(candidates, best[None], axis=0)[0] >= 0
        return np.where(found, best + 1, 0).astype(np.uint16)

    @property
    def mask(self) -> Bool[np.ndarray, "H W"]:
        """Where any class is."""
        return self.labels > 0

    def mask_of(self, name: str) -> Bool[np.ndarray, "H W"]:
        """Where a class is: the pixels that `labels` gives to it. Raises InputError for a class not asked for."""
        if name not in self.classes:
            raise InputError(f"expected one of the classes {', '.join(self.classes)}, got {name!r}")
        return np.equal(self.labels, self.classes.index(name) + 1)


class Segmenter:
    """A trained model with the classes that it has learned since. May be used from several threads.

    On a CPU, pictures go through the network one by one, as in evaluation, so that a mask has the same bits whatever
    is asked beside it.
    """

    def __init__(
        self, model: FewShotModel, image_size_px: int, *, device: str = "auto", precision: Precision = "float32"
    ) -> None:
        """`device`: auto (a GPU where there is one), cpu, cuda, cuda:1. Raises InputError for one that is not there."""
        if precision not in ("float32", "bfloat16"):
            raise InputError(f"precision must be float32 or bfloat16, got {precision!r}")
        self.device = _device(device)
        self.precision = precision
        self.image_size_px = image_size_px
        self.fingerprint = _fingerprint(model, image_size_px)
        """Of the weights, and the image size: SHA-256, hex."""
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._backbone = InferenceBackbone(model.backbone, dtype).to(self.device)
        self._relation = model.relation.to(self.device).eval().requires_grad_(False)
        self._learned: dict[str, _Learned] = {}

    @classmethod
    def from_checkpoint(
        cls, path_or_uri: str | os.PathLike[str], *, device: str = "auto", precision: Precision = "float32"
    ) -> Segmenter:
        """Of a model folder, as training or `checkpoint.save_model` writes it. Raises InputError for any other."""
        folder = os.fspath(path_or_uri)
        side = checkpoint.read_config(folder).get("image_size_px")
        if not isinstance(side, int) or side < 33:
            raise InputError(
                f"expected image_size_px, 33 or more, in {checkpoint.CONFIG_FILE} of {folder!r}, found {side!r}; write "
                "the side of the square images that the model was trained with there"
            )
        return cls(checkpoint.load_model(folder), side, device=device, precision=precision)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of what was learned, in order."""
        return tuple(self._learned)

    def learn(
        self, name: str, images: Sequence[ImageInput], masks: Sequence[MaskInput], *, calibrate: bool = False
    ) -> SupportSet:
        """Learn a class from k labelled examples, k of 1 or more; one of the same name is replaced.

        Each mask is its image's, at the image's size. With `calibrate` (k of 2 or more) the threshold is the one that
        is best when each example is segmented by the others. Raises InputError, naming the example, for what cannot
        be used.
        """
        if len(images) != len(masks) or not len(images):
            raise InputError(
                f"{name}: expected one mask for each of one or more images, found {len(images)} images and "
                f"{len(masks)} masks"
            )
        pairs = [
            self._example(f"{name}, example {i + 1}", *pair) for i, pair in enumerate(zip(images, masks, strict=True))
        ]
        support = SupportSet(
            name, torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs]), model=self.fingerprint
        )
        if calibrate:
            support = replace(support, threshold=self._calibrated(support))
        self.add(support)
        return support

    def add(self, support: SupportSet) -> None:
        """Take a class over as it was learned before; one of the same name is replaced.

        Raises InputError for one of another image size. A threshold that another model was calibrated for is not taken
        over: 0.5 then, which is said in the log.
        """
        if support.image_size_px != self.image_size_px:
            raise InputError(
                f"expected examples of {self.image_size_px} px for {support.name!r}, as the model's, found "
                f"{support.image_size_px} px; learn the class again from its pictures"
            )
        threshold = support.threshold
        if threshold != NEUTRAL_THRESHOLD and support.model != self.fingerprint:
            LOG.warning(
                "%s: the threshold %.2f was calibrated for another model; 0.5 is used: learn it again to calibrate",
                support.name,
                threshold,
            )
            threshold = NEUTRAL_THRESHOLD
        self._learned[support.name] = _Learned(self._remembered(support), threshold)

    def forget(self, name: str) -> None:
        """Unlearn a class. Raises InputError for one that was not learned."""
        self._chosen([name])
        del self._learned[name]

    def memory_bytes(self, name: str) -> int:
        """What is held of a class's supports. Raises InputError for one that was not learned."""
        ((_, learned),) = self._chosen([name])
        return sum(support.nbytes for support in learned.supports)

    def __call__(
        self, image: ImageInput, *, classes: Sequence[str] = (), tile_px: int = 0, overlap: float = 0.25
    ) -> Segmented:
        """Segment a picture by some learned classes (empty: by all), at its own size.

        With `tile_px` it is looked at in overlapping windows of that many of its own pixels; see `mshnet.tiles`.
        Raises InputError for what is no picture, and for a class that was not learned.
        """
        chosen = self._chosen(classes)
        return self._segmented(read_image(image), chosen, tile_px, overlap)

    def batch(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int = 8,
        classes: Sequence[str] = (),
        tile_px: int = 0,
        overlap: float = 0.25,
    ) -> Iterator[Segmented]:
        """Segment pictures in order; on a GPU `batch_size` of them at a time."""
        chosen = self._chosen(classes)
        for image in images:
            yield self._segmented(read_image(image), chosen, tile_px, overlap)

    # How it is done -------------------------------------------------------------------------------------

    def _chosen(self, names: Sequence[str]) -> list[tuple[str, _Learned]]:
        learned = dict(self._learned)
        if not learned:
            raise InputError("expected a class that was learned, found none; call learn(name, images, masks) first")
        unknown = [name for name in names if name not in learned]
        if unknown:
            raise InputError(f"expected classes of those learned ({', '.join(learned)}), got {', '.join(unknown)}")
        return [(name, learned[name]) for name in names or learned]

    def _example(
        self, what: str, image: ImageInput, mask: MaskInput
    ) -> tuple[UInt8[Tensor, "3 S S"], UInt8[Tensor, "S S"]]:
        pixels = read_image(image, f"{what}, image")
        marked = read_mask(mask, pixels.shape[:2], f"{what}, mask")
        square = nearest(torch.from_numpy(marked.view(np.uint8)), self.image_size_px)
        if not square.any():
            raise InputError(
                f"{what}: expected an object that is seen at {self.image_size_px} px, found one of {marked.sum()} of "
                f"{marked.size} pixels that vanishes; give the part of the picture around it"
            )
        return self._square(pixels), square

    def _square(self, pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[Tensor, "3 S S"]:
        return torch.from_numpy(np.array(squared(pixels, self.image_size_px))).permute(2, 0, 1)

    @torch.inference_mode()
    def _remembered(self, support: SupportSet) -> tuple[Any, ...]:
        remembered = []
        with self._computing():
            for image, mask in zip(support.images, support.masks, strict=True):
                features = self._features(image[None])
                remembered.append(memory.remember(self._relation, features, mask.to(self.device).float()[None, None]))
        return tuple(remembered)

    def _features(self, images: UInt8[Tensor, "n 3 S S"]) -> Features:
        features: Features = self._backbone(images.to(self.device))
        return features

    def _computing(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")

    @torch.inference_mode()
    def _segmented(
        self, pixels: UInt8[np.ndarray, "H W 3"], chosen: list[tuple[str, _Learned]], tile_px: int, overlap: float
    ) -> Segmented:
        query = self._features(self._square(pixels)[None])
        height, width = pixels.shape[:2]
        found = [_probability(resize(self._logits(query, each), (height, width)))[0] for _, each in chosen]
        return Segmented(
            classes=tuple(name for name, _ in chosen),
            probabilities=torch.stack(found).cpu().numpy(),
            thresholds=tuple(each.threshold for _, each in chosen),
        )

    def _logits(self, query: Features, learned: _Learned) -> Float[Tensor, "b 2 _ _"]:
        size = (self.image_size_px, self.image_size_px)
        with self._computing():
            return memory.recall(self._relation, query, learned.supports, size).logits_low.float()

    def _calibrated(self, support: SupportSet) -> float:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class _Learned:
    """A class as it is held: what `memory.remember` gave for each support."""

    supports: tuple[Any, ...]
    threshold: float


def _probability(logits: Float[Tensor, "b 2 H W"]) -> Float[Tensor, "b H W"]:
    """The softmax's foreground. Rounding would give 0.5 to both sides of it: that is for the foreground alone."""
    difference = logits[:, 1] - logits[:, 0]
    probability = torch.sigmoid(difference)
    below = np.nextafter(np.float32(0.5), np.float32(0)).item()
    return torch.where(logits[:, 1] > logits[:, 0], probability.clamp(min=0.5), probability.clamp(max=below))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise InputError(f"expected a device that torch can use, got {name!r}; use cpu, or auto")
    return device


def _fingerprint(model: FewShotModel, image_size_px: int) -> str:
    digest = hashlib.sha256(json.dumps([model.config.identity(), image_size_px], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
