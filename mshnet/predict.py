"""Segment one's own pictures by a few labelled examples: no ground truth of the query, no training.

segmenter = Segmenter.from_checkpoint("model/")
segmenter.learn("scratch", ["a.jpg", "b.jpg"], ["a_mask.png", "b_mask.png"])
mask = segmenter("c.jpg").mask
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mshnet import checkpoint, registries
from mshnet.calibration import best_threshold, counts_by_threshold
from mshnet.data.transforms import nearest
from mshnet.errors import InputError
from mshnet.inference import Network, Precision, fingerprint, foreground_lead
from mshnet.inputs import ImageInput, MaskInput, read_example, read_image
from mshnet.model import FewShotModel
from mshnet.segmented import Segmented, probability
from mshnet.support_set import NEUTRAL_THRESHOLD, SupportSet
from mshnet.tiles import Blend, Window, check_tiles, windows

LOG = logging.getLogger(__name__)
READERS = 4
"""Threads that decode pictures ahead of a batch."""
GPU_VIEWS = 8
"""Windows of a picture that go through the network together on a GPU."""

__all__ = ["ImageInput", "MaskInput", "Precision", "Segmented", "Segmenter", "SupportSet", "read_image"]


@dataclass(frozen=True, eq=False)
class Learned:
    """A class as it is held: what `memory.remember` gave for each of its examples."""

    name: str
    supports: tuple[Any, ...]
    threshold: float


View = tuple[np.ndarray, Window, Blend]
"""Pixels (h, w, 3), where in their picture they are, and where what is found goes."""


class Segmenter:
    """A trained model with the classes that it has learned since. May be used from several threads.

    On a CPU pictures go through the network one by one, as in evaluation, so that a mask has the same bits whatever
    is asked beside it.
    """

    def __init__(
        self, model: FewShotModel, image_size_px: int, *, device: str = "auto", precision: Precision = "float32"
    ) -> None:
        """`device`: auto (a GPU where there is one), cpu, cuda, cuda:1. Raises InputError for one that is not there."""
        self.network = Network(model, image_size_px, device, precision)
        self.image_size_px = image_size_px
        self.fingerprint = fingerprint(model, image_size_px)
        """Of the weights and the image size: SHA-256, hex."""
        self._learned: dict[str, Learned] = {}

    @classmethod
    def from_checkpoint(
        cls, path_or_uri: str | os.PathLike[str], *, device: str = "auto", precision: Precision = "float32"
    ) -> Segmenter:
        """Of a model folder, as training and `import-published` write it. Raises InputError for any other."""
        folder = os.fspath(path_or_uri)
        side = checkpoint.read_config(folder).get("image_size_px")
        if not isinstance(side, int) or side < 33:
            raise InputError(
                f"expected image_size_px, 33 or more, in {checkpoint.CONFIG_FILE} of {folder!r}, found {side!r}; write "
                "the side of the square images that the model was trained with there"
            )
        return cls(checkpoint.load_model(folder), side, device=device, precision=precision)

    @classmethod
    def from_registry(
        cls, address: str, *, tracking_uri: str = "", device: str = "auto", precision: Precision = "float32"
    ) -> Segmenter:
        """Of a registered model: `models:/NAME@champion`, `models:/NAME/3`. `tracking_uri`: empty for the usual one.

        Raises InputError where there is none of that name, or the registry's packages are not installed.
        """
        with tempfile.TemporaryDirectory(prefix="mshnet-model-") as folder:
            found = registries.download(address, Path(folder), tracking_uri)
            return cls.from_checkpoint(found, device=device, precision=precision)

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str],
        *,
        tracking_uri: str = "",
        device: str = "auto",
        precision: Precision = "float32",
    ) -> Segmenter:
        """Whichever it is: a registry's address, or the path or URI of a model folder."""
        if registries.is_address(os.fspath(model)):
            return cls.from_registry(os.fspath(model), tracking_uri=tracking_uri, device=device, precision=precision)
        return cls.from_checkpoint(model, device=device, precision=precision)

    # Classes --------------------------------------------------------------------------------------------

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
        be used; nothing is learned then.
        """
        if len(images) != len(masks) or not len(images):
            raise InputError(
                f"{name}: expected one mask for each of one or more images, found {len(images)} images and "
                f"{len(masks)} masks"
            )
        if calibrate and len(images) < 2:
            raise InputError(f"{name}: calibrating takes 2 examples or more, found {len(images)}; give another one")
        pairs = zip(images, masks, strict=True)
        squares = [self._example(f"{name}, example {i}", *pair) for i, pair in enumerate(pairs, start=1)]
        support = SupportSet(
            name, torch.stack([x for x, _ in squares]), torch.stack([y for _, y in squares]), model=self.fingerprint
        )
        kept = self._remembered(support)
        if calibrate:
            support = replace(support, threshold=self._calibrated(support, kept))
        self._learned[name] = Learned(name, kept, support.threshold)
        return support

    def add(self, support: SupportSet) -> None:
        """Take over a class that was learned before, by this or another model; one of the same name is replaced.

        Raises InputError for one of another image size. A threshold that was calibrated for other weights is not taken
        over: 0.5 then, and a warning in the log.
        """
        if support.image_size_px != self.image_size_px:
            raise InputError(
                f"expected examples of {self.image_size_px} px for {support.name!r}, as the model's, found "
                f"{support.image_size_px} px; learn the class again from its pictures"
            )
        threshold = support.threshold
        if threshold != NEUTRAL_THRESHOLD and support.model != self.fingerprint:
            LOG.warning("%s: the threshold %.2f is another model's; 0.5 is used", support.name, threshold)
            threshold = NEUTRAL_THRESHOLD
        self._learned[support.name] = Learned(support.name, self._remembered(support), threshold)

    def forget(self, name: str) -> None:
        """Unlearn a class. Raises InputError for one that was not learned."""
        self._chosen([name])
        self._learned.pop(name, None)

    def memory_bytes(self, name: str) -> int:
        """What is held of a class's examples. Raises InputError for one that was not learned."""
        (learned,) = self._chosen([name])
        return sum(support.nbytes for support in learned.supports)

    # Pictures -------------------------------------------------------------------------------------------

    def __call__(
        self, image: ImageInput, *, classes: Sequence[str] = (), tile_px: int = 0, overlap: float = 0.25
    ) -> Segmented:
        """Segment a picture by some learned classes (empty: by all, in the order learned), at its own size.

        With `tile_px` it is looked at in windows of that many of its own pixels, which overlap by that share of their
        side at least (`mshnet.tiles`). Raises InputError for what is no picture, and for a class not learned.
        """
        chosen = self._chosen(classes)
        check_tiles(tile_px, overlap)
        (found,) = self._segmented([read_image(image)], chosen, tile_px, overlap)
        return found

    def batch(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int = 8,
        classes: Sequence[str] = (),
        tile_px: int = 0,
        overlap: float = 0.25,
    ) -> Iterator[Segmented]:
        """Segment pictures in order, as a call for each would; they are decoded ahead.

        On a GPU `batch_size` of them go through the network together. Raises InputError as a call does; for one that
        cannot be read in its turn, after which there are no more: where others are to be done, give what `read_image`
        made of each.
        """
        chosen = self._chosen(classes)
        check_tiles(tile_px, overlap)
        if batch_size < 1:
            raise InputError(f"batch_size must be 1 or more, got {batch_size}")
        together = batch_size if self.network.device.type == "cuda" else 1
        return self._batches(images, chosen, together, tile_px, overlap)

    # How it is done -------------------------------------------------------------------------------------

    def _chosen(self, names: Sequence[str]) -> list[Learned]:
        learned = dict(self._learned)
        if not learned:
            raise InputError("expected a class that was learned, found none; call learn(name, images, masks) first")
        if isinstance(names, str):
            raise InputError(f"expected a sequence of classes' names, got one text; give [{names!r}]")
        if unknown := [name for name in names if name not in learned]:
            raise InputError(f"expected classes of those learned ({', '.join(learned)}), got {', '.join(unknown)}")
        return [learned[name] for name in dict.fromkeys(names) or learned]

    def _example(
        self, what: str, image: ImageInput, mask: MaskInput
    ) -> tuple[UInt8[Tensor, "3 S S"], UInt8[Tensor, "S S"]]:
        try:
            pixels, marked = read_example(image, mask)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error
        square = nearest(torch.from_numpy(marked.view(np.uint8)), self.image_size_px)
        if not square.any():
            raise InputError(
                f"{what}: expected an object that is seen at {self.image_size_px} px, found one of {marked.sum()} of "
                f"{marked.size} pixels, which vanishes; give the part of the picture around it"
            )
        return self.network.square(pixels), square

    @torch.inference_mode()
    def _remembered(self, support: SupportSet) -> tuple[Any, ...]:
        # One by one, so that memory is bounded by what is kept.
        return tuple(map(self.network.remember, support.images, support.masks))

    @torch.inference_mode()
    def _calibrated(self, support: SupportSet, kept: Sequence[Any]) -> float:
        """The threshold that is best when each example is segmented by the others, at the network's size."""
        counts = []
        for i, (image, mask) in enumerate(zip(support.images, support.masks, strict=True)):
            others = [*kept[:i], *kept[i + 1 :]]
            logits = self.network.logits(self.network.features(image[None]), others)[0]
            found = probability(foreground_lead(logits, (len(mask), len(mask))))
            counts.append(counts_by_threshold(found, mask.to(found.device)))
        return best_threshold(torch.stack(counts).sum(0))

    def _batches(
        self, images: Iterable[ImageInput], chosen: list[Learned], together: int, tile_px: int, overlap: float
    ) -> Iterator[Segmented]:
        left = iter(images)
        with ThreadPoolExecutor(READERS) as pool:
            reading: deque[Future[Any]] = deque()
            while True:
                reading.extend(pool.submit(read_image, image) for image in islice(left, 2 * together - len(reading)))
                if not reading:
                    return
                pictures = [reading.popleft().result() for _ in range(min(together, len(reading)))]
                yield from self._segmented(pictures, chosen, tile_px, overlap)

    @torch.inference_mode()
    def _segmented(
        self, pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]], chosen: list[Learned], tile_px: int, overlap: float
    ) -> list[Segmented]:
        views: list[View] = []
        blends = []
        for pixels in pictures:
            height, width = pixels.shape[:2]
            blends.append(Blend(len(chosen), height, width, self.network.device))
            views += [(pixels[window], window, blends[-1]) for window in windows(height, width, tile_px, overlap)]
        together = max(len(pictures), GPU_VIEWS) if self.network.device.type == "cuda" else 1
        for start in range(0, len(views), together):
            self._look(views[start : start + together], chosen)
        names, thresholds = tuple(each.name for each in chosen), tuple(each.threshold for each in chosen)
        found = [torch.stack([probability(lead) for lead in blend.mean()]) for blend in blends]
        return [Segmented(names, probabilities.cpu().numpy(), thresholds) for probabilities in found]

    def _look(self, views: Sequence[View], chosen: Sequence[Learned]) -> None:
        """One pass through the backbone, and one through the rest for each class."""
        query = self.network.features(torch.stack([self.network.square(pixels) for pixels, _, _ in views]))
        for i, each in enumerate(chosen):
            found = self.network.logits(query, each.supports)
            for logits, (pixels, window, blend) in zip(found, views, strict=True):
                blend.add(i, window, foreground_lead(logits, (pixels.shape[0], pixels.shape[1])))
