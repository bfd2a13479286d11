"""What every command does with its configuration before anything runs."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from mshnet.errors import InputError
from pipelines.config import CrossValidationConfig
from pipelines.job import resolved


def test_local_places_become_absolute_and_words_stay() -> None:
    found = resolved(CrossValidationConfig(store="s3://b/x//", tracking_uri="http://tracker:5000"))
    assert (found.source, found.store) == (os.path.abspath("outputs/shapes"), "s3://b/x")
    assert (found.split_lists, found.backbone_weights) == ("", "imagenet")
    found = resolved(replace(found, split_lists="lists", backbone_weights="w.pth"))
    assert (found.split_lists, found.backbone_weights) == (os.path.abspath("lists"), os.path.abspath("w.pth"))
    for words in ("random", ""):
        assert resolved(replace(found, backbone_weights=words)).backbone_weights == words


@pytest.mark.parametrize("config", [CrossValidationConfig(store=""), CrossValidationConfig(source="")])
def test_an_empty_place_is_refused(config: CrossValidationConfig) -> None:
    with pytest.raises(InputError, match="expected a folder or URI, found an empty one"):
        resolved(config)


def test_a_secret_goes_no_further() -> None:
    for config in (
        CrossValidationConfig(store="s3://key:hunter2@b"),
        CrossValidationConfig(tracking_uri="https://me:hunter2@host"),
    ):
        with pytest.raises(InputError, match="without credentials") as caught:
            resolved(config)
        assert "hunter2" not in str(caught.value)
