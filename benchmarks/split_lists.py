"""Compare the pairs that the rule derives from real masks with the field's lists, and print the tables.

    python benchmarks/split_lists.py --data DIR

DATA holds VOC2012 and COCO2014 in their usual layouts, each with its list files in splits_hsnet/ (those of the images
that are there). Results: docs/benchmarks/split_lists.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from mshnet.data.folds import FOLDS, base_classes, novel_classes
from mshnet.data.source import open_source
from mshnet.data.splits import MIN_OBJECT_PX, Pair, SplitLists, read_split_lists

FOLDERS = {"pascal": "VOC2012", "coco": "COCO2014"}
THRESHOLDS_PX = (1000, MIN_OBJECT_PX, 2500)
Sizes = Mapping[Pair, int]
"""Pixels at original size of every (image, class) that the masks show."""


@dataclass(frozen=True)
class Arguments:
    """What to compare."""

    data: Path
    """Folder with VOC2012 and COCO2014."""


@dataclass(frozen=True)
class Comparison:
    """A list beside the sizes of all pairs that it could name."""

    sizes: Sizes
    listed: frozenset[Pair]

    def by_rule(self, threshold_px: int) -> frozenset[Pair]:
        """The pairs that the rule takes."""
        return frozenset(pair for pair, size in self.sizes.items() if size >= threshold_px)

    def agreement(self, threshold_px: int) -> float:
        """Share of all pairs that list and rule both take or both leave."""
        return 1 - len(self.by_rule(threshold_px) ^ self.listed) / len(self.sizes)

    def best(self) -> tuple[int, int]:
        """The thresholds, from the lowest to the highest of one range, that agree best."""
        sizes = sorted(set(self.sizes.values()))
        best = max(sizes, key=self.agreement)
        return max([size + 1 for size in sizes if size < best], default=1), best


def sizes_of(dataset: str, root: Path) -> tuple[dict[str, str], Sizes]:
    """The subset of each image, and the size of each pair, by this project's own masks."""
    source = open_source(dataset, str(root))
    subsets: dict[str, str] = {}
    sizes: dict[Pair, int] = {}
    for record in source.records():
        subsets[record.image_id] = record.subset
        for class_id, mask in source.load(record).masks.items():
            sizes[record.image_id, class_id] = int(mask.sum())
    return subsets, sizes


def comparisons(
    dataset: str, lists: Iterable[SplitLists], subsets: Mapping[str, str], sizes: Sizes
) -> Iterator[tuple[str, Comparison]]:
    """One for each fold and subset, then one of all folds' pairs together."""
    listed: set[Pair] = set()
    for fold in lists:
        for subset, pairs, classes in (
            ("train", fold.train, base_classes(dataset, fold.fold)),
            ("val", fold.val, novel_classes(dataset, fold.fold)),
        ):
            absent = [pair for pair in pairs if pair not in sizes or subsets[pair[0]] != subset]
            assert not absent, f"the list of {dataset} fold {fold.fold} names what no mask shows: {absent[:3]}"
            possible = {p: n for p, n in sizes.items() if subsets[p[0]] == subset and p[1] in classes}
            listed |= set(pairs)
            yield f"{dataset} | {fold.fold} | {subset}", Comparison(possible, frozenset(pairs))
    yield f"{dataset} | all | both", Comparison(sizes, frozenset(listed))


def agreement_table(rows: Iterable[tuple[str, Comparison]]) -> str:
    """At the rule's own threshold."""
    lines = [
        "| data | fold | subset | pairs shown | listed | by rule | missing | extra | precision | recall | agreement |",
        "| --- | --- | --- |" + " ---: |" * 8,
    ]
    for name, comparison in rows:
        listed, ours = comparison.listed, comparison.by_rule(MIN_OBJECT_PX)
        both = len(listed & ours)
        counts = (len(comparison.sizes), len(listed), len(ours), len(listed - ours), len(ours - listed))
        shares = (both / len(ours), both / len(listed), comparison.agreement(MIN_OBJECT_PX))
        lines.append(f"| {name} | " + " | ".join([*map(str, counts), *(f"{share:.3f}" for share in shares)]) + " |")
    return "\n".join(lines)


def threshold_table(rows: Iterable[tuple[str, Comparison]]) -> str:
    """Agreement by threshold, and the best one."""
    head = [f"{threshold:,} px" for threshold in THRESHOLDS_PX]
    lines = [f"| data | fold | subset | {' | '.join(head)} | best | at |", "| --- | --- | --- |" + " ---: |" * 5]
    for name, comparison in rows:
        low, high = comparison.best()
        cells = [f"{comparison.agreement(threshold):.3f}" for threshold in (*THRESHOLDS_PX, high)]
        lines.append(f"| {name} | {' | '.join(cells)} | {low:,} to {high:,} px |")
    return "\n".join(lines)


def label_maps(root: Path, paint: Callable[[Image.Image, dict[str, Any], int], None]) -> Sizes:
    """COCO's sizes if each image had one label map, where a later annotation overwrites an earlier one."""
    sizes: dict[Pair, int] = {}
    for subset in ("train", "val"):
        data = json.loads((root / f"annotations/instances_{subset}2014.json").read_text())
        class_ids = {category: i for i, category in enumerate(sorted(c["id"] for c in data["categories"]))}
        maps = {i["id"]: Image.new("L", (i["width"], i["height"]), color=255) for i in data["images"]}
        for annotation in data["annotations"]:
            if not annotation["iscrowd"]:
                paint(maps[annotation["image_id"]], annotation, class_ids[annotation["category_id"]])
        for image in data["images"]:
            shown, counts = np.unique(np.asarray(maps[image["id"]]), return_counts=True)
            name = f"{subset}2014/{image['file_name']}"
            sizes |= {(name, int(c)): int(n) for c, n in zip(shown, counts, strict=True) if c != 255}
    return sizes


def paint_mask(label_map: Image.Image, annotation: dict[str, Any], class_id: int) -> None:
    """The instance's mask as pycocotools decodes it."""
    width, height = label_map.size
    pixels = rle.decode(rle.merge(rle.frPyObjects(annotation["segmentation"], height, width)))
    label_map.paste(class_id, mask=Image.fromarray(pixels * 255))


def paint_polygons(label_map: Image.Image, annotation: dict[str, Any], class_id: int) -> None:
    """The instance's polygons at whole pixels, their outlines included."""
    for polygon in annotation["segmentation"]:
        ImageDraw.Draw(label_map).polygon([int(x) for x in polygon], fill=class_id, outline=class_id)


def rendering_table(listed: frozenset[Pair], renderings: Mapping[str, Sizes]) -> str:
    """What the rule gives from other renderings of the same annotations."""
    lines = ["| masks | by rule | missing | extra |", "| --- | ---: | ---: | ---: |"]
    for name, sizes in renderings.items():
        ours = Comparison(sizes, listed).by_rule(MIN_OBJECT_PX)
        lines.append(f"| {name} | {len(ours)} | {len(listed - ours)} | {len(ours - listed)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the three tables."""
    data = tyro.cli(Arguments).data
    rows: list[tuple[str, Comparison]] = []
    for dataset, folder in FOLDERS.items():
        subsets, sizes = sizes_of(dataset, data / folder)
        lists = [read_split_lists(dataset, str(data / folder / "splits_hsnet"), fold) for fold in range(FOLDS)]
        rows += comparisons(dataset, lists, subsets, sizes)
    print(agreement_table(rows), threshold_table(rows), sep="\n\n")
    coco = rows[-1][1]
    renderings = {
        "this project's: union of an image's instances per class": coco.sizes,
        "one label map, later annotations overwrite": label_maps(data / FOLDERS["coco"], paint_mask),
        "the same, polygons filled with their outline": label_maps(data / FOLDERS["coco"], paint_polygons),
    }
    print("\n" + rendering_table(coco.listed, renderings))


if __name__ == "__main__":
    main()
