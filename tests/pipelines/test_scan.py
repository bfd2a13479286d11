"""A source read once into slices, and what the shard tasks read of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mshnet.data.coco import CocoSource
from mshnet.data.shapes import write_coco, write_voc
from mshnet.data.source import open_source
from mshnet.errors import DatasetNotFoundError, InputError
from pipelines import scan, storage
from pipelines.config import CrossValidationConfig


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scan") / "coco"
    write_coco(root, images=50, size_px=48, seed=2)
    return root


@pytest.fixture
def config(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CrossValidationConfig:
    monkeypatch.setattr(scan, "SLICE_RECORDS", 7)
    return CrossValidationConfig(dataset="coco", source=str(source), store=str(tmp_path / "store"))


def test_records_come_back_whole_across_slices(config: CrossValidationConfig) -> None:
    found = scan.scan_source(config)
    wanted = list(CocoSource(config.source).records())
    assert found.images == len(wanted) == 50
    assert found.fingerprint == CocoSource(config.source).fingerprint()
    assert found.class_names == CocoSource(config.source).class_names
    for start, stop in ((0, 50), (0, 7), (6, 8), (13, 30), (49, 50)):
        assert list(scan.read_records(config, found, start, stop)) == wanted[start:stop]


def test_a_record_is_all_that_a_shard_task_needs(config: CrossValidationConfig, tmp_path: Path) -> None:
    found = scan.scan_source(config)
    copy = tmp_path / "copy"
    shutil.copytree(config.source, copy)
    shutil.rmtree(copy / "annotations")
    without, whole = open_source("coco", str(copy)), open_source("coco", config.source)
    for record in scan.read_records(config, found, 20, 23):
        one, other = without.load(record), whole.load(record)
        assert one.masks.keys() == other.masks.keys()
        assert all((one.masks[c] == other.masks[c]).all() for c in one.masks)


def test_a_source_is_parsed_once(config: CrossValidationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scan.scan_source(config)

    def parse(self: CocoSource) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(CocoSource, "records", parse)
    assert scan.scan_source(config) == first


def test_a_dry_run_leaves_nothing(config: CrossValidationConfig) -> None:
    dry = scan.scan_source(config, record=False)
    assert not Path(config.store).exists()
    assert dry == scan.scan_source(config)


def test_a_slice_that_was_altered_is_named(config: CrossValidationConfig) -> None:
    found = scan.scan_source(config)
    (slice_file,) = Path(config.store).glob("scans/*/00001.arrow")
    data = bytearray(slice_file.read_bytes())
    data[len(data) // 2] ^= 1
    slice_file.write_bytes(data)
    assert len(list(scan.read_records(config, found, 0, 7))) == 7
    with pytest.raises(InputError, match=r"expected .*00001.arrow' as the scan wrote it, found another; delete"):
        list(scan.read_records(config, found, 0, 8))
    slice_file.unlink()
    with pytest.raises(InputError, match=r"00001.arrow"):
        list(scan.read_records(config, found, 0, 8))


def test_an_interrupted_scan_is_done_again(config: CrossValidationConfig) -> None:
    found = scan.scan_source(config)
    (folder,) = storage.folders_with(storage.join(config.store, "scans"), scan.SCAN)
    before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    storage.remove(storage.join(folder, scan.SCAN))
    storage.remove(storage.join(folder, "00003.arrow"))
    assert scan.scan_source(config) == found
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == before


def test_a_source_without_labels_or_layout_is_refused(tmp_path: Path) -> None:
    write_voc(tmp_path / "voc", images=6, size_px=48)
    config = CrossValidationConfig(dataset="coco", source=str(tmp_path / "voc"), store=str(tmp_path / "store"))
    with pytest.raises(DatasetNotFoundError, match="no COCO 2014"):
        scan.check(config)
    write_coco(tmp_path / "coco", images=6, size_px=48)
    for file in (tmp_path / "coco/annotations").iterdir():
        text = file.read_text()
        file.write_text(text.replace('"iscrowd": 0', '"iscrowd": 1'))
    empty = CrossValidationConfig(dataset="coco", source=str(tmp_path / "coco"), store=str(tmp_path / "store"))
    with pytest.raises(InputError, match=r"expected labelled images .* found none"):
        scan.scan_source(empty)
    assert not (tmp_path / "store").exists()
