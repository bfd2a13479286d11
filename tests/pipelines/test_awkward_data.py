"""An awkward COCO JSON through the job's scan and into a sealed store: the masks come out as they were drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mshnet.config import ImageFormat
from mshnet.data.store.images import ImageStore
from mshnet.data.store.manifest import MANIFEST
from pipelines import preprocess, scan, storage
from pipelines.config import CrossValidationConfig, EvaluationConfig
from tests.mshnet.data.awkward import write_awkward_coco_json


def test_awkward_data_is_stored_as_it_was_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "SLICE_RECORDS", 10)
    awkward = write_awkward_coco_json(tmp_path / "own")
    config = CrossValidationConfig(
        dataset="coco-json",
        source=awkward.own.images,
        own=replace(awkward.own, fold_count=2),
        folds=(0, 1),
        store=str(tmp_path / "store"),
        images=ImageFormat(image_size_px=33),
        evaluation=EvaluationConfig(protocol="balanced"),
    )
    scan.check(config)
    scanned = scan.scan_source(config)
    folder = str(tmp_path / "sealed")
    shards = [preprocess.preprocess_shard(config, folder, scanned, *part) for part in ((0, 12), (12, scanned.images))]
    storage.write_json(storage.join(folder, MANIFEST), preprocess.seal(config, folder, scanned, *shards))
    store = ImageStore(folder)
    assert store.image_ids == sorted(awkward.truth)
    assert {subset for _, subset, _ in store.contents()} == {"train"}
    names = store.manifest.class_names
    for image_id, truth in awkward.truth.items():
        row = store.row(image_id)
        found = {names[c]: store.original_mask(row, c).numpy() for c in store.contents()[row][2]}
        assert found.keys() == truth.keys()
        assert all(np.array_equal(found[name], truth[name]) for name in truth)
