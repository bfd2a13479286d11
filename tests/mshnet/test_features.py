"""The feature cache: the same features with and without it, each image computed once while it fits."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mshnet.backbone import Backbone, Features
from mshnet.checkpoint import load_backbone_weights
from mshnet.data.transforms import normalise
from mshnet.feature_files import FeatureFiles
from mshnet.features import CacheUse, FeatureCache
from tests.mshnet.noise_episodes import episode_batch, picture

GIB = 2**30
ONE_IMAGE_BYTES = 4 * 2 * (128 * 9 * 9 + 256 * 5 * 5 + 512 * 3 * 3)
"""ResNet-18 at 65 px: two maps a level, float32."""


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    backbone = Backbone("resnet18")
    load_backbone_weights(backbone, "random", seed=1)
    return backbone


def one_by_one(cache: FeatureCache, *rows: int) -> None:
    """Ask for single images: as episodes whose support is the query itself, two requests each."""
    for row in rows:
        cache.of(episode_batch([(row, (row,))]))


def assert_same_bits(found: Features, expected: Features) -> None:
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("budget_bytes", [0, 1, 3 * ONE_IMAGE_BYTES, GIB])
def test_features_are_the_backbones(backbone: Backbone, budget_bytes: int) -> None:
    """Also when a batch holds more images than the budget."""
    batch = episode_batch([(0, (1, 2)), (3, (0, 4))])
    cache = FeatureCache(backbone, budget_bytes)
    for _ in range(2):
        query, support = cache.of(batch)
        expected = [backbone(normalise(picture(row)[0][None])) for row in (0, 3, 1, 2, 0, 4)]
        for found, first, last in ((query, 0, 2), (support, 2, 6)):
            for level, maps in enumerate(found):
                truth = torch.cat([features[level] for features in expected[first:last]])
                assert maps.shape == truth.shape
                # Float32 sums in another order, where the batch goes through at once.
                assert (maps - truth).abs().max() <= 1e-5 * truth.abs().max()
    assert sum(maps.numel() * 4 for maps in expected[0]) == ONE_IMAGE_BYTES
    assert cache.use.asked == 12


def test_an_images_bits_do_not_depend_on_its_batch(backbone: Backbone) -> None:
    """Whichever batch asks first, so that a resumed run goes on with the same bits."""
    alone, among = FeatureCache(backbone, GIB), FeatureCache(backbone, GIB)
    expected, _ = alone.of(episode_batch([(5, (6,))]))
    query, support = among.of(episode_batch([(1, (2, 5)), (7, (8, 9)), (5, (3, 4))]))
    assert_same_bits(Features(*(maps[2:] for maps in query)), expected)
    assert_same_bits(Features(*(maps[1:2] for maps in support)), expected)
    one_by_one(among, 10, 11)
    again, _ = among.of(episode_batch([(5, (6,))]))
    assert_same_bits(again, expected)


def test_uses_and_calls_of_the_backbone(backbone: Backbone) -> None:
    sizes: list[int] = []
    handle = backbone.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    try:
        cache = FeatureCache(backbone, GIB)
        cache.of(episode_batch([(0, (1, 2)), (3, (0, 1))]))
        assert (cache.computed, cache.from_memory) == (4, 2)
        cache.of(episode_batch([(2, (4,))]))
        assert (cache.computed, cache.from_memory) == (5, 3)
        assert sizes == [1] * 5
        sizes.clear()
        off = FeatureCache(backbone, 0)
        off.of(episode_batch([(0, (1, 2)), (3, (0, 1))]))
        off.of(episode_batch([(0, (1,))]))
        assert sizes == [6, 2]
        assert (off.computed, off.from_memory) == (8, 0)
    finally:
        handle.remove()


@pytest.mark.parametrize(("budget_bytes", "kept"), [(2 * ONE_IMAGE_BYTES, 2), (2 * ONE_IMAGE_BYTES - 1, 1)])
def test_the_budget_is_kept_to_the_byte(backbone: Backbone, budget_bytes: int, kept: int) -> None:
    cache = FeatureCache(backbone, budget_bytes)
    one_by_one(cache, 0, 1, 2)
    assert (cache.computed, cache.from_memory) == (3, 3)
    one_by_one(cache, 2)  # the latest is kept
    assert cache.computed == 3
    one_by_one(cache, 1)
    assert cache.computed == 3 + (kept < 2)


def test_the_least_recently_used_goes_first(backbone: Backbone) -> None:
    cache = FeatureCache(backbone, 2 * ONE_IMAGE_BYTES)
    one_by_one(cache, 0, 1, 0, 2)  # 1 is older than 0 now, though it came later
    assert cache.computed == 3
    one_by_one(cache, 0, 2)
    assert cache.computed == 3
    one_by_one(cache, 1)
    assert cache.computed == 4
    one_by_one(cache, 0)
    assert cache.computed == 5


# The second tier


SMALL_BYTES = 4 * (2 * 3 * 16 + 2 * 3 * 4 + 2 * 3)
"""Of what `small` gives of an image."""
FILE_BYTES = 4096 + SMALL_BYTES


def small(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> Features:
    """Two layers of three channels a level, quickly; as a folded backbone's they lie channels last."""
    pooled = (torch.nn.functional.adaptive_avg_pool2d(images.float(), side) for side in (4, 2, 1))
    both = (torch.stack([maps, maps.sqrt()], dim=1).to(dtype) for maps in pooled)
    return Features(*(maps.movedim(2, -1).contiguous().movedim(-1, 2) for maps in both))


def small_bfloat16(images: torch.Tensor) -> Features:
    return small(images, torch.bfloat16)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FeatureFiles]:
    files = FeatureFiles(tmp_path, "key", GIB)
    yield files
    files.close()


@pytest.mark.parametrize("backbone", [small, small_bfloat16])
def test_what_memory_has_no_room_for_comes_back_from_disk_with_the_same_bits(
    backbone: Any, files: FeatureFiles
) -> None:
    batch = episode_batch([(0, (1, 2)), (3, (0, 4))])
    plain = FeatureCache(backbone, 0, image_by_image=True)
    cache = FeatureCache(backbone, 1, files)  # memory for one image
    for use in (CacheUse(computed=5, from_disk=1), CacheUse(from_disk=6)):
        before = cache.use
        for found, expected in zip(cache.of(batch), plain.of(batch), strict=True):
            assert_same_bits(found, expected)
            assert [maps.stride() for maps in found] == [maps.stride() for maps in expected]
            assert [maps.dtype for maps in found] == [maps.dtype for maps in expected]
        assert cache.use - before == use
    assert plain.use == CacheUse(computed=12)
    assert (plain.held_bytes, len(plain._kept)) == (0, 0)


def test_only_what_is_asked_for_again_is_kept(files: FeatureFiles) -> None:
    cache = FeatureCache(small, 1, files, again={1, 2})
    one_by_one(cache, 1, 0, 2, 1)  # twice each
    assert cache.use == CacheUse(computed=4, from_memory=3, from_disk=1)
    assert sorted(path.name for path in files.folder.iterdir() if path.suffix == "") == ["1", "2", "room", "users"]


@pytest.mark.parametrize("limit_bytes", [3 * FILE_BYTES, 3 * FILE_BYTES - 1, FILE_BYTES - 1])
def test_the_disk_is_bounded_to_the_byte(limit_bytes: int, tmp_path: Path) -> None:
    files = FeatureFiles(tmp_path, "key", limit_bytes)
    cache = FeatureCache(small, 0, files)
    kept = limit_bytes // FILE_BYTES
    for row in range(6):
        one_by_one(cache, row)
        assert files.held_bytes() == min(row + 1, kept) * FILE_BYTES
        os.utime(files.folder / str(row), (row, row)) if kept else None  # when it was used, without waiting
    before = cache.use
    one_by_one(cache, *range(6 - kept, 6))  # the last ones are those that are left
    assert (cache.use - before).computed == 0
    one_by_one(cache, 0)
    assert (cache.use - before).computed == (1 if kept else 2)
    files.close()


def test_a_full_disk_costs_time_only(files: FeatureFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    cache = FeatureCache(small, 0, files, share=True)
    plain = FeatureCache(small, 0, image_by_image=True)
    batch = episode_batch([(0, (1, 0))])
    for found, expected in zip(cache.of(batch), plain.of(batch), strict=True):
        assert_same_bits(found, expected)
    assert cache.use == CacheUse(computed=3)
    assert files.held_bytes() == 0


def test_a_file_that_was_cut_is_computed_again(files: FeatureFiles) -> None:
    cache = FeatureCache(small, 0, files)
    one_by_one(cache, 0)
    os.truncate(files.folder / "0", FILE_BYTES - 5)
    one_by_one(cache, 0)
    assert cache.computed == 3


def test_other_keys_are_apart_and_the_last_to_leave_removes_the_files(tmp_path: Path) -> None:
    first, second, other = (FeatureFiles(tmp_path, key, GIB) for key in ("key", "key", "another"))
    one_by_one(FeatureCache(small, 0, first), 0)
    assert first.folder == second.folder != other.folder
    assert second.read(0, torch.device("cpu")) is not None
    assert other.read(0, torch.device("cpu")) is None
    first.close()
    assert second.read(0, torch.device("cpu")) is not None
    second.close()
    assert list(tmp_path.iterdir()) == [other.folder]
    other.close()
    assert list(tmp_path.iterdir()) == []


class Counting:
    """A backbone that writes down, for all processes, what it computes."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def __call__(self, images: torch.Tensor) -> Features:
        with self.note.open("a") as file:
            file.write(f"{int(images.long().sum())}\n")
        return small(images)


def ask_for_all(folder: Path, note: Path, reverse: bool) -> None:
    files = FeatureFiles(folder, "key", GIB)
    cache = FeatureCache(Counting(note), 1, files, share=True)
    for row in sorted(range(12), reverse=reverse):
        cache.of(episode_batch([(row, (11 - row,))]))


def hold_and_wait(folder: Path, ready: Path) -> None:
    files = FeatureFiles(folder, "key", GIB)
    with files.claimed(7):
        (files.folder / "7.part").write_bytes(b"half")
        ready.touch()
        time.sleep(600)


def test_processes_of_a_node_compute_an_image_once(tmp_path: Path) -> None:
    """Among them one that was killed while it wrote; what it left is no obstacle, and is gone at the end."""
    folder, note, ready = tmp_path / "features", tmp_path / "note", tmp_path / "ready"
    mine = FeatureFiles(folder, "key", GIB)  # so that nobody is the last to leave
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    killed = context.Process(target=hold_and_wait, args=(folder, ready))
    killed.start()
    processes = [context.Process(target=ask_for_all, args=(folder, note, reverse)) for reverse in (False, True)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 120
    while not ready.exists() or not note.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    for process in (killed, *processes):
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    computed = note.read_text().split()
    assert len(computed) == len(set(computed)) == 12
    mine.close()
    assert list(folder.iterdir()) == []


def test_what_killed_processes_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "users").touch()
    (tmp_path / "ab" / "5").touch()
    (tmp_path / "cd.gone-1").mkdir()
    FeatureFiles(tmp_path, "key", GIB).close()
    assert list(tmp_path.iterdir()) == []
