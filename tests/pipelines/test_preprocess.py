"""Shards, seal, verify and repair on a small COCO layout, run by a real local Ray."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mshnet.config import ImageFormat
from mshnet.data.shapes import write_coco
from mshnet.data.source import open_source
from mshnet.data.store.images import ImageStore
from mshnet.errors import InputError
from pipelines import dag, preprocess, scan, storage, verify
from pipelines.config import CrossValidationConfig
from pipelines.dag import StageInputError
from pipelines.scan import Scan

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A local Ray; the environment that it sets is put back."""
    from pipelines.cluster import connected

    with patch.dict(os.environ):
        os.environ.pop("RAY_ADDRESS", None)
        with connected():
            yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preprocess") / "coco"
    write_coco(root, images=70, size_px=48, seed=3)
    return root


@pytest.fixture
def config(source: Path, tmp_path: Path) -> CrossValidationConfig:
    return CrossValidationConfig(
        dataset="coco",
        source=str(source),
        store=str(tmp_path / "store"),
        images=ImageFormat(image_size_px=33),
        images_per_shard=20,
    )


def build(config: CrossValidationConfig) -> tuple[Scan, Mapping[str, Any]]:
    """Preprocess as the command does."""
    scanned = scan.scan(config)
    (manifest,) = dag.execute([preprocess.stages(config, scanned)]).values()
    return scanned, manifest


def contents(config: CrossValidationConfig) -> dict[str, str]:
    """Every file of the store with its hash, hidden ones too."""
    root = Path(config.store)
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip(path: Path, at: int) -> None:
    """Turn one bit."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_the_store_holds_the_source(config: CrossValidationConfig) -> None:
    scanned, manifest = build(config)
    store = ImageStore(preprocess.store_uri(config, scanned))
    source = open_source("coco", config.source)
    records = list(source.records())
    assert [shard["rows"] for shard in manifest["shards"]] == [20, 20, 20, 10]
    assert list(store.image_ids) == [record.image_id for record in records]
    wanted = [(r.image_id, r.subset, {c: int(m.sum()) for c, m in source.load(r).masks.items()}) for r in records]
    assert store.contents() == wanted
    shown = [name for _, _, pixels in wanted for name in (source.class_names[c] for c in pixels)]
    assert manifest["images_per_class"] == {name: shown.count(name) for name in shown}


def test_two_runs_give_the_same_bytes_whatever_the_order_of_tasks(
    config: CrossValidationConfig, tmp_path: Path
) -> None:
    build(config)
    other = replace(config, store=str(tmp_path / "other"))
    scanned = scan.scan(other)
    for shard in reversed(preprocess.stages(other, scanned).needs):
        dag.execute([shard])
    build(other)
    assert contents(other) == contents(config)


def test_shards_of_a_killed_job_are_kept_if_their_hash_is_right(config: CrossValidationConfig) -> None:
    scanned, _ = build(config)
    before = contents(config)
    folder = Path(preprocess.store_uri(config, scanned))
    names = [shard.name for shard in ImageStore(str(folder)).manifest.shards]
    (folder / "manifest.json").unlink()
    (folder / ".writing-0123").write_bytes(b"of a killed writer")
    flip(folder / names[1], 5000)
    (folder / names[2]).unlink()
    times = {name: (folder / name).stat().st_mtime_ns for name in names if name != names[2]}

    planned = dag.plan([preprocess.stages(config, scanned)])
    verbs = [line.split("  <-")[0] for line in planned.lines()]
    # What a look at the sizes can tell; the flipped bit is found by the task.
    assert verbs == ["check preprocess 1/4", "check preprocess 2/4", "run   preprocess 3/4", "check preprocess 4/4",
                     "run   seal the store"]  # fmt: skip
    build(config)
    assert contents(config) == before
    kept = {name for name, then in times.items() if (folder / name).stat().st_mtime_ns == then}
    assert kept == {names[0], names[3]}


def test_another_jobs_manifest_is_never_written_over(config: CrossValidationConfig) -> None:
    scanned, manifest = build(config)
    sealed = replace(preprocess.stages(config, scanned), complete=lambda result: False)
    assert dag.execute([sealed]) == {"seal the store": manifest}
    path = Path(sealed.result)
    theirs = path.read_text().replace(manifest["shards"][0]["sha256"], "0" * 64)
    path.write_text(theirs)
    with pytest.raises(StageInputError, match="is there already and holds something else"):
        dag.execute([sealed])
    assert path.read_text() == theirs


def test_verify_says_what_is_there(config: CrossValidationConfig) -> None:
    scanned, manifest = build(config)
    (found,) = verify.verify(replace(config, source="/nowhere"))
    assert found == {
        "store": preprocess.store_uri(config, scanned),
        "shards": 4,
        "images": 70,
        "size_bytes": sum(shard["size_bytes"] for shard in manifest["shards"]),
    }
    with pytest.raises(InputError, match=r"expected a sealed store pascal-\* .* found none"):
        verify.verify(replace(config, dataset="pascal"))


def test_a_store_that_cannot_be_read_does_not_hide_the_others(config: CrossValidationConfig) -> None:
    scanned, manifest = build(config)
    folder = Path(preprocess.store_uri(config, scanned))
    flip(folder / manifest["shards"][2]["name"], 7000)
    old = folder.parent / "coco-33px-aold"
    old.mkdir()
    (old / "manifest.json").write_text((folder / "manifest.json").read_text().replace('"schema": 2', '"schema": 1'))
    with pytest.raises(InputError) as raised:
        verify.verify(config)
    assert "coco-33px-aold: expected an episode store of schema version 2, found 1" in str(raised.value)
    assert manifest["shards"][2]["name"] in str(raised.value)
    (found,) = verify.repair(config)
    assert found["repaired"] == [manifest["shards"][2]["name"]]


def test_verify_names_every_shard_that_fails_and_repair_makes_just_these(config: CrossValidationConfig) -> None:
    scanned, manifest = build(config)
    before = contents(config)
    folder = Path(preprocess.store_uri(config, scanned))
    names = [shard["name"] for shard in manifest["shards"]]
    flip(folder / names[0], 9000)
    (folder / names[1]).write_bytes((folder / names[1]).read_bytes()[:-100])
    (folder / names[3]).unlink()
    untouched = (folder / names[2]).stat().st_mtime_ns
    with pytest.raises(InputError) as raised:
        verify.verify(config)
    message = str(raised.value)
    assert all((name in message) == (name != names[2]) for name in names)
    assert "--repair" in message
    # Which store it is follows from the source: neither size nor shards need be given again.
    (found,) = verify.repair(replace(config, images=ImageFormat(), images_per_shard=2000))
    assert found["repaired"] == [names[0], names[1], names[3]]
    assert contents(config) == before
    assert (folder / names[2]).stat().st_mtime_ns == untouched
    (found,) = verify.repair(config)
    assert found["repaired"] == []


def test_counts_that_do_not_fit_the_shards_are_found(config: CrossValidationConfig) -> None:
    scanned, manifest = build(config)
    path = Path(preprocess.store_uri(config, scanned), "manifest.json")
    wrong = json.loads(path.read_text())
    name = next(iter(wrong["images_per_class"]))
    wrong["images_per_class"][name] += 1
    path.write_text(json.dumps(wrong))
    with pytest.raises(InputError, match="counts other images per class than they hold"):
        verify.verify(config)
    path.unlink()
    assert build(config)[1] == manifest


def test_a_store_without_a_manifest_is_not_repaired(config: CrossValidationConfig) -> None:
    with pytest.raises(InputError, match=r"expected a sealed store of .* to repair, found none of the 0"):
        verify.repair(config)
    assert not storage.folders_with(storage.join(config.store, "images"), "manifest.json")


@pytest.mark.parametrize("flags", [["--verify", "--repair"], ["--repair", "--dry-run"], ["--verify", "--dry-run"]])
def test_one_thing_is_done_at_a_time(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        preprocess.main([*flags, "--store", "/nowhere"])
    assert raised.value.code == 2
    assert "three things to do" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("flags", [[], ["--verify"], ["--repair"]])
def test_a_place_that_is_none_is_said_in_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert preprocess.main([*flags, "--store", ""]) == 1
    assert "expected a folder or URI, found an empty one" in capsys.readouterr().err
