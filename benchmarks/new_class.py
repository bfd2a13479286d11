"""A new class from files on disk, by the command: IoU with 1 and 5 examples; does evaluation give the same masks?

    python benchmarks/new_class.py --data DIR/VOC2012 --model STORE/folds/NAME/model --class-name bus \\
        --store STORE/images/NAME

DATA is VOC in its usual layout; MODEL should not have been trained on the class. Pictures that show it on 2,048 pixels
or more, in the order of their names: the first are the examples, the next --queries are segmented by `mshnet segment`,
with and without --calibrate. IoU is over all their pixels but VOC's 255. With --store, an episode store of these
pictures with lossless encoding, each mask is compared with that of the evaluation's path on the same episode, judged at
the query's own size; ends with code 1 where a pixel differs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from jaxtyping import Bool
from PIL import Image

from mshnet.backbone import InferenceBackbone
from mshnet.checkpoint import load_model
from mshnet.config import IGNORE_INDEX
from mshnet.data.batches import EpisodeLoader
from mshnet.data.episodes import Episode
from mshnet.data.folds import class_names
from mshnet.data.store.images import ImageStore
from mshnet.engine import network_predictor
from mshnet.features import FeatureCache

MOST_SUPPORTS = 5
MIN_OBJECT_PX = 2048


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """On what."""

    data: Path
    """Folder of VOC 2012."""
    model: Path
    """Model folder."""
    class_name: str = "bus"
    """One of VOC's."""
    queries: int = 20
    """Pictures to segment."""
    store: str = ""
    """Episode store of the pictures; empty: masks are not compared."""


def main(arguments: Arguments) -> int:
    label = class_names("pascal").index(arguments.class_name) + 1
    names = _showing(arguments.data, label)[: MOST_SUPPORTS + arguments.queries]
    queries = names[MOST_SUPPORTS:]
    truths = [_label(arguments.data, name) for name in queries]
    everywhere = [np.ones(truth.shape, dtype=bool) for truth in truths]
    print(f"{len(queries)} pictures of {arguments.class_name}\n\n| examples | IoU, % | differing pixels |")
    print(f"| --- | ---: | ---: |\n| none: everything is foreground | {_iou(everywhere, truths, label):.1f} | |")
    differing = 0
    for supports, calibrate in ((1, False), (MOST_SUPPORTS, False), (MOST_SUPPORTS, True)):
        masks = _segmented(arguments, label, names[:supports], queries, calibrate)
        compared = ""
        if arguments.store and not calibrate:
            judged = _judged(arguments, label, names[:supports], queries)
            found = sum(int((a != b).sum()) for a, b in zip(masks, judged, strict=True))
            compared = f"{found:,} of {sum(mask.size for mask in masks):,}"
            differing += found
        row = f"{supports}{', calibrated' if calibrate else ''}"
        print(f"| {row} | {_iou(masks, truths, label):.1f} | {compared} |", flush=True)
    return 1 if differing else 0


def _showing(data: Path, label: int) -> list[str]:
    files = sorted((data / "SegmentationClassAug").glob("*.png"))
    return [file.stem for file in files if (_label(data, file.stem) == label).sum() >= MIN_OBJECT_PX]


def _label(data: Path, name: str) -> np.ndarray:
    return np.array(Image.open(data / f"SegmentationClassAug/{name}.png"))


def _segmented(
    arguments: Arguments, label: int, supports: Sequence[str], queries: Sequence[str], calibrate: bool
) -> list[Bool[np.ndarray, "_ _"]]:
    data = arguments.data
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "mshnet", "segment", "--model", str(arguments.model), "--out", out]
        for name in supports:
            command += ["--support", str(data / f"JPEGImages/{name}.jpg")]
            command += [f"{data / 'SegmentationClassAug'}/{name}.png#{label}"]
        command += ["--query", *(str(data / f"JPEGImages/{name}.jpg") for name in queries)]
        command += ["--calibrate"] if calibrate else []
        subprocess.run(command, check=True, capture_output=True)
        return [np.array(Image.open(Path(out, f"{name}.png"))) > 0 for name in queries]


def _judged(
    arguments: Arguments, label: int, supports: Sequence[str], queries: Sequence[str]
) -> list[Bool[np.ndarray, "_ _"]]:
    store, model = ImageStore(arguments.store), load_model(str(arguments.model))
    features = FeatureCache(InferenceBackbone(model.backbone), 0, image_by_image=True)
    rows = tuple(store.row(name) for name in supports)
    episodes = [Episode(store.row(name), rows, label - 1) for name in queries]
    loader, predict = EpisodeLoader(store), network_predictor(model.relation)
    masks = []
    with torch.inference_mode():
        for episode, batch in zip(episodes, loader.batches(episodes, [[i] for i in range(len(episodes))]), strict=True):
            masks.append(predict(*features.of(batch), batch).masks(store.size_px(episode.query))[0].numpy())
    return masks


def _iou(masks: Sequence[np.ndarray], truths: Sequence[np.ndarray], label: int) -> float:
    intersection = sum(int((mask & (truth == label)).sum()) for mask, truth in zip(masks, truths, strict=True))
    union = sum(
        int(((mask | (truth == label)) & (truth != IGNORE_INDEX)).sum())
        for mask, truth in zip(masks, truths, strict=True)
    )
    return 100 * intersection / union


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Arguments, description=__doc__)))
