"""What benchmarks/reading.py compares the store with: plain files, MDS shards and tar files of the same images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from mshnet.data.batches import EpisodeBatch
from mshnet.data.episodes import Episode
from mshnet.data.filesystem import filesystem, is_local
from mshnet.data.store import decode
from mshnet.data.store.shards import EncodedRow

SIDE_PX = 473
SHARD_BYTES = 64 * 2**20
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def assembled(episode: Episode[int], pictures: Sequence[Tensor], masks: Sequence[Tensor]) -> EpisodeBatch:
    """A batch of one, the query first."""
    return EpisodeBatch(
        query_images=pictures[0][None],
        query_masks=masks[0][None],
        support_images=torch.stack(list(pictures[1:]))[None],
        support_masks=torch.stack(list(masks[1:]))[None],
        query_rows=(episode.query,),
        support_rows=(episode.supports,),
        class_ids=(episode.class_id,),
    )


def decoded(episode: Episode[int], rows: Sequence[EncodedRow]) -> EpisodeBatch:
    """The same from encoded rows, the query first, by the functions that our store uses."""
    return assembled(
        episode,
        [decode.picture(row) for row in rows],
        [decode.mask(row, episode.class_id, SIDE_PX, with_ignore=i == 0) for i, row in enumerate(rows)],
    )


class PlainFiles:
    """Opens the source's own files for every visit."""

    def __init__(self, root: Path, image_ids: Sequence[str], episodes: Sequence[Episode[int]]) -> None:
        from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

        self.root, self.ids = root, image_ids
        resize = Resize((SIDE_PX, SIDE_PX), InterpolationMode.BILINEAR)
        self.transform = Compose([resize, ToTensor(), Normalize(MEAN, STD)])
        self.instances = self._parsed({e for episode in episodes for e in (episode.query, *episode.supports)})

    def _parsed(self, rows: set[int]) -> dict[str, dict[int, list[Any]]]:
        if not (self.root / "annotations").is_dir():
            return {}
        wanted = {self.ids[row] for row in rows}
        found: dict[str, dict[int, list[Any]]] = {}
        for subset in ("train", "val"):
            content = json.loads((self.root / "annotations" / f"instances_{subset}2014.json").read_bytes())
            classes = {category["id"]: i for i, category in enumerate(content["categories"])}
            names = {image["id"]: f"{subset}2014/{image['file_name']}" for image in content["images"]}
            for annotation in content["annotations"]:
                name = names[annotation["image_id"]]
                if name in wanted and not annotation["iscrowd"]:
                    of_class = found.setdefault(name, {}).setdefault(classes[annotation["category_id"]], [])
                    of_class.append(annotation["segmentation"])
        return found

    def __call__(self, episode: Episode[int]) -> EpisodeBatch:
        loaded = [self._load(row, episode.class_id) for row in (episode.query, *episode.supports)]
        return assembled(episode, [picture for picture, _ in loaded], [mask for _, mask in loaded])

    def _load(self, row: int, class_id: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        image_id = self.ids[row]
        path = self.root / (image_id if self.instances else f"JPEGImages/{image_id}.jpg")
        picture = Image.open(path).convert("RGB")
        if self.instances:
            mask = self._drawn(image_id, class_id, picture.height, picture.width)
        else:
            label = np.array(Image.open(self.root / "SegmentationClassAug" / f"{image_id}.png"))
            mask = torch.from_numpy((label == class_id + 1).astype(np.float32))
        resized = F.interpolate(mask[None, None], size=(SIDE_PX, SIDE_PX), mode="nearest")[0, 0]
        return self.transform(picture), resized

    def _drawn(self, image_id: str, class_id: int, height: int, width: int) -> Tensor:
        from pycocotools import mask as rle_code

        whole = np.zeros((height, width), dtype=np.uint8)
        for segmentation in self.instances[image_id].get(class_id, ()):
            if isinstance(segmentation, list):
                rle = rle_code.merge(rle_code.frPyObjects(segmentation, height, width))
            elif isinstance(segmentation["counts"], list):
                rle = rle_code.frPyObjects(segmentation, height, width)
            else:
                rle = segmentation
            whole |= rle_code.decode(rle)
        return torch.from_numpy(whole.astype(np.float32))


class MdsRows:
    """Rows of a StreamingDataset at random."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, episode: Episode[int]) -> EpisodeBatch:
        samples = [self.dataset[row] for row in (episode.query, *episode.supports)]
        return decoded(episode, [_row_of(sample) for sample in samples])


class MdsEpisodes:
    """Episodes of a StreamingDataset in order."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[EpisodeBatch]:
        for sample in self.dataset:
            yield _episode_of(sample["episode"], [sample[name] for name in sorted(sample) if name != "episode"])


def open_mds(samples: str, name: str, cache: Path, batch: int) -> Any:
    """A StreamingDataset, of a local folder or through a local cache."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    place = {"local": f"{samples}/{name}"}
    if not is_local(samples):
        place = {"remote": f"{samples}/{name}", "local": str(cache / name)}
    return StreamingDataset(**place, batch_size=batch, shuffle=False)


class Tars:
    """Episodes of tar files in order, the files dealt out to the loader processes."""

    def __init__(self, samples: str, shot: int, cache: Path) -> None:
        """Remote files are kept in `cache` where that folder exists, else streamed."""
        fs, folder = filesystem(f"{samples}/tar_{shot}shot")
        found = sorted(fs.ls(folder, detail=False))
        self.urls = found if is_local(samples) else [f"s3://{path}" for path in found]
        self.cache = cache / "tars" if not is_local(samples) and cache.is_dir() else None

    def __iter__(self) -> Iterator[EpisodeBatch]:
        import webdataset

        webdataset.gopen_schemes["s3"] = _open_remote
        if self.cache:
            self.cache.mkdir(exist_ok=True)
        tars = webdataset.WebDataset(
            self.urls, shardshuffle=False, cache_dir=str(self.cache) if self.cache else None, empty_check=False
        )
        for sample in tars:
            parts = {name: data for name, data in sample.items() if not name.startswith("__") and name != "json"}
            yield _episode_of(json.loads(sample["json"]), [parts[name] for name in sorted(parts)])


def _open_remote(url: str, mode: str = "rb", *_: Any, **__: Any) -> Any:
    fs, path = filesystem(url)
    return fs.open(path, mode, block_size=8 * 2**20)


def encoded_rows(store: Path) -> list[EncodedRow]:
    """The pixels of every row of a local store as they lie in its files."""
    manifest = json.loads((store / "manifest.json").read_bytes())
    rows = []
    for shard in manifest["shards"]:
        table = pa.ipc.open_file(pa.memory_map(str(store / shard["name"]))).read_all()
        for row in table.select(["image", "class_ids", "masks", "ignore"]).to_pylist():
            masks = dict(zip(row["class_ids"], row["masks"], strict=True))
            rows.append(EncodedRow(bytearray(row["image"]), masks, row["ignore"] or b""))
    return rows


def _row_of(sample: Mapping[str, Any]) -> EncodedRow:
    """A row from an image's sample."""
    ends = np.cumsum([0, *sample["labels"]["sizes"]]).tolist()
    masks = {c: sample["masks"][a:b] for c, a, b in zip(sample["labels"]["class_ids"], ends, ends[1:], strict=False)}
    return EncodedRow(bytearray(sample["image"]), masks, sample["ignore"])


def _sample_of(row: EncodedRow) -> dict[str, Any]:
    labels = {"class_ids": list(row.masks), "sizes": [len(mask) for mask in row.masks.values()]}
    return {"image": bytes(row.image), "masks": b"".join(row.masks.values()), "ignore": row.ignore, "labels": labels}


def _episode_of(about: Mapping[str, Any], parts: Sequence[bytes]) -> EpisodeBatch:
    """An episode from its sample: pictures, masks and ignored pixels of each image, in the order of their names."""
    episode = Episode(about["rows"][0], tuple(about["rows"][1:]), about["class_id"])
    images = len(about["rows"])
    pictures, masks, ignored = (parts[i * images : (i + 1) * images] for i in range(3))
    rows = [
        EncodedRow(bytearray(picture), {episode.class_id: mask}, ignore)
        for picture, mask, ignore in zip(pictures, masks, ignored, strict=True)
    ]
    return decoded(episode, rows)


def _parts_of(episode: Episode[int], rows: Sequence[EncodedRow]) -> tuple[dict[str, Any], dict[str, bytes]]:
    images = (episode.query, *episode.supports)
    parts = {f"a{i}.jpg": bytes(rows[row].image) for i, row in enumerate(images)}
    parts |= {f"b{i}.png": rows[row].masks[episode.class_id] for i, row in enumerate(images)}
    parts |= {f"c{i}.png": rows[row].ignore for i, row in enumerate(images)}
    return {"class_id": episode.class_id, "rows": images}, parts


def write_samples(folder: Path, store: Path, drawn: Mapping[int, Sequence[Episode[int]]]) -> None:
    """The other formats' files; nothing is done where they are there already."""
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = encoded_rows(store)
    from streaming import MDSWriter

    columns = {"image": "bytes", "masks": "bytes", "ignore": "bytes", "labels": "json"}
    with MDSWriter(out=str(folder / "mds_images"), columns=columns, size_limit=SHARD_BYTES) as writer:
        for row in rows:
            writer.write(_sample_of(row))
    for shot, episodes in drawn.items():
        _write_episodes(folder, shot, [_parts_of(episode, rows) for episode in episodes])
    (folder / "done").touch()


def _write_episodes(folder: Path, shot: int, samples: Sequence[tuple[dict[str, Any], dict[str, bytes]]]) -> None:
    import webdataset
    from streaming import MDSWriter

    columns = {"episode": "json", **dict.fromkeys(samples[0][1], "bytes")}
    with MDSWriter(out=str(folder / f"mds_{shot}shot"), columns=columns, size_limit=SHARD_BYTES) as writer:
        for about, parts in samples:
            writer.write({"episode": about, **parts})
    tars = folder / f"tar_{shot}shot"
    tars.mkdir()
    with webdataset.ShardWriter(str(tars / "%05d.tar"), maxsize=SHARD_BYTES, verbose=0) as tar:
        for number, (about, parts) in enumerate(samples):
            tar.write({"__key__": f"{number:06d}", "json": json.dumps(about).encode(), **parts})
