"""Fingerprints of the field's data sets stay what they were: another one would train anew what a store has."""

from __future__ import annotations

import pytest

from pipelines import recipes
from pipelines.graph import build
from pipelines.scan import Scan

SCAN = Scan(fingerprint="f" * 64, images=4321, class_names=("a", "b"), mask_mode="m")
KEYS = {
    ("default", "coco"): [
        "coco-473px-1e05874e06cb/manifest.json",
        "coco-fold3-1shot-training-663e91267e42/result.json",
        "coco-fold3-1shot-test-972951a381b3/result.json",
        "coco-fold3-97001abcffc5/result.json",
    ],
    ("default", "shapes"): [
        "shapes-65px-858edc93bd3c/manifest.json",
        "shapes-fold3-1shot-training-81ee1047318d/result.json",
        "shapes-fold3-1shot-test-9c0245879fae/result.json",
        "shapes-fold3-0750dbdfc5c1/result.json",
    ],
    ("paper", "pascal"): [
        "pascal-473px-1e05874e06cb/manifest.json",
        "pascal-fold3-1shot-training-85582983cef3/result.json",
        "pascal-fold3-1shot-test-7df319e5ba99/result.json",
        "pascal-fold3-0c116772fa54/result.json",
    ],
    ("published", "coco"): [
        "coco-473px-1e05874e06cb/manifest.json",
        "coco-fold3-1shot-training-5d332dbb3d3c/result.json",
        "coco-fold3-1shot-test-1438b3a96246/result.json",
        "coco-fold3-e39c69f43e2b/result.json",
    ],
}


@pytest.mark.parametrize(("recipe", "dataset"), sorted(KEYS))
def test_keys_of_the_fields_data_sets_stay(recipe: str, dataset: str) -> None:
    graph = build(recipes.named(recipe, dataset), SCAN, "imagenet")
    found = [graph.sealed.key, graph.drawn_training[3].key, graph.drawn_test[3].key, graph.trained[3].key]
    assert found == KEYS[recipe, dataset]
