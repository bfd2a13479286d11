"""What every command does with its configuration before anything runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mshnet.data.shapes import write_voc
from mshnet.errors import InputError
from pipelines import capacity, job
from pipelines.capacity import Capacity
from pipelines.config import CrossValidationConfig
from pipelines.job import resolved
from tests.pipelines.drawn_fold import small_config


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


@pytest.mark.parametrize(
    ("use_gpu", "resources"), [(False, {"CPU": 3.0}), (True, {"CPU": 64.0}), (True, {"CPU": 64.0, "GPU": 1.0})]
)
def test_a_cluster_without_room_is_found_out_before_any_run_is_started(
    use_gpu: bool, resources: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the runs would be RUNNING for ever."""

    @contextmanager
    def small_cluster(address: str, environment: Mapping[str, str]) -> Iterator[dict[str, float]]:
        yield resources

    monkeypatch.setattr(job, "connected", small_cluster)
    monkeypatch.setattr(capacity, "found", lambda: Capacity(now=(resources,)))
    monkeypatch.setattr(job, "start_runs", lambda *_: pytest.fail("runs were started"))
    config = small_config(tmp_path)
    config = replace(
        config,
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        compute=replace(config.compute, workers=2, cpus_per_worker=2, use_gpu=use_gpu),
    )
    write_voc(Path(config.source), images=120, size_px=48, seed=0)
    with pytest.raises(InputError, match=r"expected room for 2 worker\(s\) of 2 CPU.* found .* on 1 node.*; lower"):
        job.run(config, False, lambda graph: graph.evaluated)
    assert not (tmp_path / "mlflow.db").exists()
