"""On real pictures, from their files on disk: the evaluation's masks, pixel for pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mshnet import architectures
from mshnet.backbone import InferenceBackbone
from mshnet.checkpoint import load_backbone_weights
from mshnet.config import Architecture, ImageFormat, ModelConfig
from mshnet.data.batches import EpisodeLoader
from mshnet.data.episodes import Episode
from mshnet.data.pascal import VocSource
from mshnet.data.transforms import normalise
from mshnet.engine import evaluate, network_predictor
from mshnet.features import FeatureCache
from mshnet.judging import Judging
from mshnet.metrics import episode_counts
from mshnet.predict import Segmenter
from tests.conftest import needs_shared
from tests.mshnet.data.stored import write_store
from tests.mshnet.segmenters import halve

SIDE_PX = 161
FORMAT = ImageFormat(image_size_px=SIDE_PX, encoding="png")
CAT = 7
QUERIES = 3


@needs_shared
@pytest.mark.parametrize("architecture", ["mshnet", "panet"])
def test_masks_of_real_pictures_are_those_of_the_evaluation(
    architecture: Architecture, shared: Path, tmp_path: Path
) -> None:
    """ResNet-50 on cats of VOC 2012, 2 supports, each query judged at its own size, as `--resize original` does."""
    source = VocSource(str(shared / "data/VOC2012"))
    labelled = {}
    for record in source.records():
        found = source.load(record)
        if CAT in found.masks and found.masks[CAT].mean() > 0.1:
            labelled[record] = found
            if len(labelled) == 2 + QUERIES:
                break
    store = write_store(str(tmp_path / "store"), {r.image_id: x for r, x in labelled.items()}, FORMAT)
    torch.manual_seed(0)
    model = architectures.build(ModelConfig(architecture=architecture)).eval()
    load_backbone_weights(model.backbone, str(next((shared / "data/weights").glob("*.safetensors"))))
    halve(model, normalise(torch.stack([store.image(2), store.image(0)])))

    user = Segmenter(model, SIDE_PX, device="cpu")
    files = [(str(Path(source.root, r.image_path)), Path(source.root, r.mask_path)) for r in labelled]
    user.learn("cat", [image for image, _ in files[:2]], [f"{mask}#{CAT + 1}" for _, mask in files[:2]])

    features = FeatureCache(InferenceBackbone(model.backbone), 0, image_by_image=True)
    episodes = [Episode(2 + i, (0, 1), CAT) for i in range(QUERIES)]
    loader, predict = EpisodeLoader(store), network_predictor(model.relation)
    for i, batch in enumerate(loader.batches(episodes, [[i] for i in range(QUERIES)])):
        with torch.no_grad():
            judged = predict(*features.of(batch), batch).masks(store.size_px(2 + i))[0]
        mask = user(files[2 + i][0]).mask
        assert 0.01 < judged.float().mean() < 0.99
        np.testing.assert_array_equal(mask, judged.numpy())
        counted = evaluate({"it": predict}, features, [batch], Judging("original", "excluded", store))["it"].counts
        truth = store.original_mask(2 + i, CAT, with_ignore=True)
        own = episode_counts(torch.from_numpy(mask)[None], truth[None])
        np.testing.assert_array_equal(own.intersection, counted.intersection)
        np.testing.assert_array_equal(own.union, counted.union)
