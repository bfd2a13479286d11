"""The episode store: what goes in comes out, by the pixel; what is damaged or of another kind is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mshnet.config import ImageFormat
from mshnet.data.pascal import VocSource
from mshnet.data.source import LabelledImage
from mshnet.data.store.cache import DIRECTORY
from mshnet.data.store.images import ImageStore
from mshnet.data.store.manifest import MANIFEST
from mshnet.data.store.shards import read_labels
from mshnet.errors import DatasetNotFoundError, InputError
from tests.mshnet.data.stored import PNG_65, noise_image, write_store

NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def images() -> dict[str, LabelledImage]:
    """Five images of different sizes, the last without an ignore mask and without an object."""
    images = {name: noise_image(seed, 50 + seed, 70 + 3 * seed) for seed, name in enumerate(NAMES)}
    images["e"] = replace(images["e"], masks={}, ignore=None)
    return images


@pytest.fixture(scope="module")
def sealed(images: dict[str, LabelledImage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the images in shards of 3 and 2. Read only."""
    root = tmp_path_factory.mktemp("store")
    write_store(str(root), images)
    return root


@pytest.fixture
def broken(sealed: Path, copy_of: Callable[[Path], Path]) -> Path:
    """A copy to break."""
    return copy_of(sealed)


def nearest(mask: np.ndarray, side: int) -> torch.Tensor:
    """The pixel at floor(i * size / side) in each direction, written without torch's resize."""
    rows, columns = (np.arange(side) * size // side for size in mask.shape)
    return torch.from_numpy(mask[np.ix_(rows, columns)].astype(np.uint8))


def test_rows_come_back(sealed: Path, images: dict[str, LabelledImage]) -> None:
    store = ImageStore(str(sealed))
    assert store.image_ids == list(NAMES)
    assert len(store) == 5
    assert [shard.rows for shard in store.manifest.shards] == [3, 2]
    assert [store.row(name) for name in NAMES] == [0, 1, 2, 3, 4]
    expected = [
        (name, "train", {c: int(mask.sum()) for c, mask in sorted(image.masks.items())})
        for name, image in images.items()
    ]
    assert store.contents() == expected
    assert expected[0][2][0] == 25 * 35  # the numbers are of the original size, not of the stored one
    assert (store.manifest.format, store.manifest.class_names) == (PNG_65, ("disc", "bar", "ring"))


def test_png_pixels_are_exactly_pillows(sealed: Path, images: dict[str, LabelledImage]) -> None:
    store = ImageStore(str(sealed))
    for row, labelled in enumerate(images.values()):
        resized = Image.fromarray(labelled.image).resize((65, 65), Image.Resampling.BILINEAR)
        found = store.image(row)
        assert (found.dtype, tuple(found.shape)) == (torch.uint8, (3, 65, 65))
        np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), np.asarray(resized))


def test_jpeg_pixels_are_near(tmp_path: Path) -> None:
    y, x = np.mgrid[:120, :90]
    smooth = np.stack([x + y, 2 * x, 255 - y], axis=-1).astype(np.uint8)
    labelled = LabelledImage(image=smooth, masks={}, ignore=None)
    sizes = {}
    for quality in (30, 95):
        format = ImageFormat(image_size_px=65, encoding="jpeg", jpeg_quality=quality)
        store = write_store(str(tmp_path / str(quality)), {"a": labelled}, format)
        resized = np.asarray(Image.fromarray(smooth).resize((65, 65), Image.Resampling.BILINEAR)).astype(int)
        error = np.abs(store.image(0).permute(1, 2, 0).numpy().astype(int) - resized)
        assert error.mean() < (1.5 if quality == 95 else 6)
        assert error.max() > 0
        sizes[quality] = store.manifest.shards[0].size_bytes
    assert sizes[30] < sizes[95]


def test_masks_are_nearest_and_may_overlap(sealed: Path, images: dict[str, LabelledImage]) -> None:
    store = ImageStore(str(sealed))
    for row, labelled in enumerate(images.values()):
        for class_id, mask in labelled.masks.items():
            found = store.mask(row, class_id)
            assert found.dtype == torch.uint8
            assert torch.equal(found, nearest(mask, 65))
            by_torch = F.interpolate(torch.from_numpy(mask)[None, None].float(), size=(65, 65), mode="nearest")
            assert torch.equal(found, by_torch[0, 0].to(torch.uint8))
    both = (store.mask(0, 0) == 1) & (store.mask(0, 2) == 1)
    assert both.sum() > 100
    assert store.mask(0, 1).sum() == store.mask(4, 0).sum() == 0  # classes that the image does not show


def test_ignored_pixels_on_request_only(sealed: Path, images: dict[str, LabelledImage]) -> None:
    store = ImageStore(str(sealed))
    labelled = images["b"]
    assert labelled.ignore is not None
    assert (labelled.ignore & labelled.masks[0]).any()  # ignored wins over the class
    expected = nearest(np.where(labelled.ignore, 255, labelled.masks[0]).astype(np.uint8), 65)
    assert torch.equal(store.mask(1, 0, with_ignore=True), expected)
    assert sorted(expected.unique().tolist()) == [0, 1, 255]
    assert sorted(store.mask(1, 0).unique().tolist()) == [0, 1]
    assert store.mask(4, 0, with_ignore=True).sum() == 0  # a data set without an ignore label


def test_pixels_stay_in_the_file(tmp_path: Path) -> None:
    labelled = {name: noise_image(seed) for seed, name in enumerate(NAMES)}
    big = write_store(str(tmp_path), labelled, ImageFormat(image_size_px=400, encoding="png"))
    paths = [tmp_path / shard.name for shard in big.manifest.shards]
    size = sum(path.stat().st_size for path in paths)
    del big
    before = pa.total_allocated_bytes()
    store = ImageStore(str(tmp_path))
    assert store.image(4).shape == (3, 400, 400)
    mapped = pa.total_allocated_bytes() - before
    read = [pa.ipc.open_file(pa.OSFile(str(path))).read_all() for path in paths]
    copied = pa.total_allocated_bytes() - before - mapped
    assert len(read) == 2
    assert copied > 0.9 * size > 500_000  # what it costs to read the shards instead
    assert mapped < 0.01 * size


def test_a_pickled_store_opens_the_same_files(sealed: Path) -> None:
    store = ImageStore(str(sealed))
    data = pickle.dumps(store)
    assert len(data) < 2000  # where it is and the manifest; no pixels
    copy: ImageStore = pickle.loads(data)
    assert (copy.image_ids, copy.manifest) == (store.image_ids, store.manifest)
    for row in range(len(store)):
        assert torch.equal(copy.image(row), store.image(row))
        assert torch.equal(copy.mask(row, 2, with_ignore=True), store.mask(row, 2, with_ignore=True))


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_any_uri(scheme: str, sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DIRECTORY, str(tmp_path / "cache"))
    uri = f"file://{tmp_path}/store" if scheme == "file" else "memory://store-test/images"
    local = ImageStore(str(sealed))
    fs, root = fsspec.core.url_to_fs(uri)
    for path in sealed.iterdir():
        fs.makedirs(root, exist_ok=True)
        fs.pipe_file(f"{root}/{path.name}", path.read_bytes())
    store = ImageStore(uri)
    store.verify()
    assert store.image_ids == local.image_ids
    assert torch.equal(store.image(3), local.image(3))
    assert torch.equal(store.mask(3, 0, with_ignore=True), local.mask(3, 0, with_ignore=True))
    fs.rm(root, recursive=True)


def test_what_a_real_reader_gives(voc_root: Path, tmp_path: Path) -> None:
    source = VocSource(str(voc_root), "shapes")
    labelled = {record.image_id: source.load(record) for record in list(source.records())[:4]}
    store = write_store(str(tmp_path), labelled)
    for row, image in enumerate(labelled.values()):
        assert image.ignore is not None
        for class_id, mask in image.masks.items():
            expected = nearest(np.where(image.ignore, 255, mask).astype(np.uint8), 65)
            assert torch.equal(store.mask(row, class_id, with_ignore=True), expected)


def rewrite_manifest(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((root / MANIFEST).read_text())
    change(manifest)
    (root / MANIFEST).write_text(json.dumps(manifest))


def test_unknown_keys_are_left_alone(broken: Path) -> None:
    """A later version may add facts without a new schema version: to the store, to a shard, to the format."""
    expected = ImageStore(str(broken)).manifest

    def add(manifest: dict[str, Any]) -> None:
        for part in (manifest, manifest["format"], *manifest["shards"]):
            part["new_in_a_later_version"] = {"x": 1}

    rewrite_manifest(broken, add)
    store = ImageStore(str(broken))
    assert store.manifest == expected
    assert store.image(0).shape == (3, 65, 65)


def test_a_folder_without_a_manifest_is_no_store(broken: Path) -> None:
    (broken / MANIFEST).unlink()
    with pytest.raises(DatasetNotFoundError, match=r"no episode store under '.*' \(looked for manifest\.json\)"):
        ImageStore(str(broken))
    with pytest.raises(DatasetNotFoundError, match="preprocess first"):
        ImageStore("memory://no-such-store")


@pytest.mark.parametrize("found", [1, 3, "2", None])
def test_another_schema_version_is_refused(broken: Path, found: object) -> None:
    rewrite_manifest(broken, lambda manifest: manifest.update(schema=found))
    with pytest.raises(
        InputError, match=f"expected an episode store of schema version 2, found {found!r} in .* preprocess again"
    ):
        ImageStore(str(broken))


def test_a_missing_shard_is_refused(broken: Path) -> None:
    shard = ImageStore(str(broken)).manifest.shards[1]
    (broken / shard.name).unlink()
    with pytest.raises(
        InputError,
        match=f"expected {shard.size_bytes} bytes, found none in shard {shard.name} of the store .* --repair",
    ):
        ImageStore(str(broken))


def test_a_truncated_shard_is_refused(broken: Path) -> None:
    shard = ImageStore(str(broken)).manifest.shards[0]
    data = (broken / shard.name).read_bytes()
    (broken / shard.name).write_bytes(data[:-100])
    message = f"expected {shard.size_bytes} bytes, found {len(data) - 100} in shard {shard.name} of .* --repair"
    with pytest.raises(InputError, match=message):
        ImageStore(str(broken))


def test_verify_finds_one_changed_byte(broken: Path) -> None:
    store = ImageStore(str(broken))
    store.verify()
    shard = store.manifest.shards[1]
    data = bytearray((broken / shard.name).read_bytes())
    data[len(data) // 2] ^= 1
    (broken / shard.name).write_bytes(data)
    found = hashlib.sha256(data).hexdigest()
    with pytest.raises(
        InputError, match=f"expected sha256 {shard.sha256[:12]}…, found {found[:12]}… in shard {shard.name} of"
    ):
        store.verify()


def flip_a_pixel(path: Path, picture: int) -> bytes:
    """Change a byte of a shard's n-th encoded picture or mask; gives the file as it was."""
    data, at = path.read_bytes(), -1
    for _ in range(picture):
        at = data.index(b"\x89PNG\r\n", at + 1)
    path.write_bytes(data[: at + 60] + bytes([data[at + 60] ^ 1]) + data[at + 61 :])
    return data


def test_a_flipped_bit_is_found_when_it_is_read(broken: Path, images: dict[str, LabelledImage]) -> None:
    """Without a `verify` before it, and only where it is."""
    shard = ImageStore(str(broken)).manifest.shards[0]
    flip_a_pixel(broken / shard.name, 2)
    store = ImageStore(str(broken))
    message = f"expected crc32 .* in row 1, found .* in shard {shard.name} of the store '{broken}'; mend it .*--repair"
    for read in (lambda: store.image(1), lambda: store.mask(1, 0)):
        with pytest.raises(InputError, match=message):
            read()
    assert torch.equal(store.mask(2, 0), nearest(images["c"].masks[0], 65))
    assert store.image(4).shape == (3, 65, 65)


def test_a_store_that_is_mended_is_read_on(broken: Path) -> None:
    shard = ImageStore(str(broken)).manifest.shards[0]
    good = flip_a_pixel(broken / shard.name, 2)
    store = ImageStore(str(broken))
    with pytest.raises(InputError, match="in row 1"):
        store.image(1)
    (broken / "new").write_bytes(good)
    (broken / "new").replace(broken / shard.name)
    assert store.image(1).shape == (3, 65, 65)


@pytest.mark.parametrize("left", [0, 100])
def test_a_shard_cut_off_while_it_is_read_kills_nobody(left: int, broken: Path) -> None:
    """Reading a map beyond its file's end would be a bus error."""
    store = ImageStore(str(broken))
    shard = store.manifest.shards[0]
    store.image(0)
    with open(broken / shard.name, "r+b") as file:
        file.truncate(left)
    message = f"expected {shard.size_bytes} bytes, found {left} in shard {shard.name} of the store"
    for read in (lambda: store.image(0), lambda: store.image(2), store.contents):
        with pytest.raises(InputError, match=message):
            read()


def test_a_shard_that_goes_missing_is_named_when_it_is_needed(broken: Path) -> None:
    store = ImageStore(str(broken))
    shard = store.manifest.shards[1]
    (broken / shard.name).unlink()
    assert store.image(0).shape == (3, 65, 65)
    with pytest.raises(InputError, match=f"expected {shard.size_bytes} bytes, found none in shard {shard.name}"):
        store.image(3)


def test_an_unknown_image_is_named(sealed: Path) -> None:
    with pytest.raises(InputError, match=r"expected image '2007_000033' in the store .* among 5; give split lists"):
        ImageStore(str(sealed)).row("2007_000033")


def test_a_damaged_manifest_is_an_input_error(sealed: Path, tmp_path: Path) -> None:
    good = (sealed / MANIFEST).read_bytes()
    for data in (good[:-20], b"", b"[]", b"\xff\xfe\x00", good.replace(b"hand", b"h\xe4nd"), b"[" * 100_000):
        (tmp_path / MANIFEST).write_bytes(data)
        with pytest.raises(
            InputError, match=r"expected JSON in the manifest of .*; delete manifest.json there and pre"
        ):
            ImageStore(str(tmp_path))


def _without(*place: str | int) -> Callable[[dict[str, Any]], object]:
    def change(manifest: dict[str, Any]) -> None:
        part: Any = manifest
        for key in place[:-1]:
            part = part[key]
        part["misspelt"] = part.pop(place[-1])

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        *((_without(key), f"`{key}`") for key in ("dataset", "class_names", "format", "shards", "images_per_class")),
        *(
            (_without("shards", 0, key), f"`{key}` - at `$.shards[0]`")
            for key in ("name", "sha256", "rows", "size_bytes")
        ),
        (_without("format", "image_size_px"), "expected image_size_px in the manifest's format"),
        (lambda m: m.update(format=[65]), "Expected `object`, got `array` - at `$.format`"),
        (lambda m: m["format"].update(encoding="tiff"), "Invalid enum value 'tiff'"),
        (lambda m: m.update(shards=None), "got `null` - at `$.shards`"),
        (lambda m: m["shards"][1].update(rows="2"), "Expected `int`, got `str` - at `$.shards[1].rows`"),
        (lambda m: m["shards"][1].update(rows=-2), "Expected `int` >= 0 - at `$.shards[1].rows`"),
        (lambda m: m["shards"][1].update(sha256="../../x"), "`$.shards[1].sha256`"),
    ],
)
def test_a_manifest_of_another_form_is_an_input_error(
    change: Callable[[dict[str, Any]], object], problem: str, broken: Path
) -> None:
    rewrite_manifest(broken, change)
    with pytest.raises(InputError, match=re.escape(problem)) as caught:
        ImageStore(str(broken))
    assert str(caught.value).endswith("delete manifest.json there and preprocess again: whole shards are kept")


@pytest.mark.parametrize(
    "name", ["../other/{}", "/etc/{}", "{}\n", "x{}", "images-0123.arrow", "shards/00000.json", ""]
)
def test_a_shard_of_another_name_is_refused(name: str, broken: Path) -> None:
    """A manifest must not make a reader open, or --repair remove, files elsewhere."""
    rewrite_manifest(broken, lambda m: m["shards"][0].update(name=name.format(m["shards"][0]["name"])))
    with pytest.raises(InputError, match=r"matching regex .* at `\$.shards\[0\].name`"):
        ImageStore(str(broken))


def test_labels_are_read_once(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    def spy(file: Any, rows: int) -> list[dict[str, Any]]:
        reads.append(rows)
        return read_labels(file, rows)

    monkeypatch.setattr("mshnet.data.store.images.read_labels", spy)
    store = ImageStore(str(sealed))
    assert [image_id for image_id, _, _ in store.contents()] == store.image_ids
    assert store.row("e") == 4
    assert store.contents() == store.contents()
    assert sorted(reads) == [2, 3]


def test_a_store_of_many_shards_does_not_hold_all_open(
    images: dict[str, LabelledImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mshnet.data.store.images._MAPS", 2)
    store = write_store(str(tmp_path), images, images_per_shard=1)

    def held() -> set[str]:
        names: set[Path] = set()
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the listing's own
                names.add(entry.readlink())
        return {path.name for path in names if path.parent == tmp_path}

    shards = [shard.name for shard in store.manifest.shards]
    expected = [nearest(image.masks.get(0, np.zeros((1, 1), bool)), 65) for image in images.values()]
    for row in (0, 1, 2, 3, 4, 3, 0):
        assert torch.equal(store.mask(row, 0), expected[row])
    assert held() == {shards[3], shards[0]}  # the last used
    assert len(store.contents()) == 5
    assert len(held()) == 2
