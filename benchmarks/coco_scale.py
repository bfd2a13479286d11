"""Generate a data set in the COCO 2014 layout at COCO's true scale, for measuring (not for learning).

    python benchmarks/coco_scale.py --out DIR                     # 20,000 images, about 600,000 annotations
    python benchmarks/coco_scale.py --out DIR5 --images 5000      # its first 5,000 images, a data set of their own

640 px on the longer side, JPEGs of about 150 KB, a third of the images in val. Each image is a function of
(seed, number) alone, so a smaller set is the beginning of a larger one and `--processes` changes nothing.
A bank of generated scenes is drawn once; a picture is a crop of one, flipped and relit, with objects cut out of
others laid on it and noise over all, so that no two JPEGs are alike. 20,000 images take about 6 minutes on two cores.

As in COCO: about three classes an image, object areas log-normal around 1,700 px, one object in ten in two parts, one
annotation in a hundred a crowd. Unlike COCO: 30 annotations an image (COCO: 7), so that 20,000 images have a JSON of
its size, and outlines of 20 to 60 points.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image, ImageDraw
from tqdm import tqdm

from mshnet.data.drawing import draw_scene
from mshnet.data.shapes import CATEGORY_IDS, class_names

MARKER = "coco_scale.json"
SUBSETS = ("train", "val")
SIZES = ((640, 480), (480, 640), (640, 427), (427, 640))
SIZE_SHARES = (0.45, 0.2, 0.25, 0.1)
MEDIAN_AREA_PX, AREA_SPREAD = 1700, 2.0
JPEG_QUALITY = 92
NOISE = 10.0
"""Standard deviation of what is laid over a picture: it makes the JPEG's size that of a photograph."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to generate."""

    out: Path
    """Folder to write to: 3 GB for 20,000 images. Left alone when it holds exactly this already."""
    images: int = 20_000
    """How many; every third is a validation image."""
    annotations_per_image: float = 30
    """In the mean (crowds included)."""
    bank: int = 96
    """Scenes that pictures are cut from."""
    seed: int = 0
    """The same seed gives the same files."""
    processes: int = 2
    """That draw side by side."""


@dataclass(frozen=True, kw_only=True)
class Bank:
    """What pictures are made of."""

    scenes: tuple[Image.Image, ...]
    noise: np.ndarray


_bank: Bank
_arguments: Arguments


def make_bank(arguments: Arguments) -> Bank:
    """Scenes of 800 px and a field of noise."""
    rng = np.random.default_rng((arguments.seed, 1 << 40))
    scenes = []
    for number in tqdm(range(arguments.bank), desc="bank", unit="scene", disable=None):
        picture, _ = draw_scene(rng, [number % 80, (7 * number + 3) % 80], 640)
        scenes.append(Image.fromarray(picture).resize((800, 800), Image.Resampling.BILINEAR))
    noise = rng.normal(0, NOISE, (1024, 1024, 3)).round().astype(np.int16)
    return Bank(scenes=tuple(scenes), noise=noise)


def draw(index: int) -> tuple[str, dict[str, Any], list[str]]:
    """Write picture `index`; gives its subset, its entry in the JSON and its annotations as JSON texts."""
    rng = np.random.default_rng((_arguments.seed, index))
    subset = "val" if index % 3 == 2 else "train"
    width, height = SIZES[rng.choice(len(SIZES), p=SIZE_SHARES)]
    picture = _background(rng, width, height)
    # Skewed as in COCO: half the images have fewer than five sixths of the mean.
    count = max(1, int(rng.negative_binomial(4, 4 / (4 + _arguments.annotations_per_image))))
    classes = rng.choice(80, size=1 + min(int(rng.poisson(2)), 9), replace=False)
    annotations = []
    for number in range(count):
        class_id = int(classes[number % len(classes)])
        crowd = number > 0 and rng.random() < 0.01
        outlines = [_outline(rng, width, height) for _ in range(12 if crowd else 1 + (rng.random() < 0.1))]
        _cut_out(rng, picture, outlines, class_id)
        annotations.append(
            json.dumps(
                {
                    "segmentation": _segmentation(rng, outlines, width, height, crowd),
                    "area": round(float(sum(map(_area, outlines))), 4),
                    "iscrowd": int(crowd),
                    "image_id": index,
                    "bbox": _box(outlines),
                    "category_id": CATEGORY_IDS[class_id],
                    "id": 1000 * index + number,
                }
            )
        )
    name = f"COCO_{subset}2014_{index:012d}.jpg"
    (_arguments.out / f"{subset}2014" / name).write_bytes(_jpeg(rng, picture))
    image = {
        "license": 1 + index % 8,
        "file_name": name,
        "coco_url": f"http://images.example.org/{subset}2014/{name}",
        "height": height,
        "width": width,
        "date_captured": "2013-11-14 17:02:52",
        "flickr_url": f"http://photos.example.org/{index % 10_000:04d}/{index:010d}_z.jpg",
        "id": index,
    }
    return subset, image, annotations


def _background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    scene = _bank.scenes[rng.integers(len(_bank.scenes))]
    x, y = int(rng.integers(801 - width)), int(rng.integers(801 - height))
    picture = scene.crop((x, y, x + width, y + height))
    flips = (None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180)
    flip = flips[rng.integers(4)]
    if flip is not None:
        picture = picture.transpose(flip)
    gains = rng.uniform(0.7, 1.15, 3)
    return picture.point([min(255, round(v * gain)) for gain in gains for v in range(256)])


def _outline(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A rounded, dented shape inside the picture: points (N, 2), N from 20 to 60, in hundredths of a pixel."""
    area = min(MEDIAN_AREA_PX * np.exp(rng.normal(0, AREA_SPREAD)), 0.4 * width * height)
    t = np.linspace(0, 2 * np.pi, int(rng.integers(20, 61)), endpoint=False)
    phases = rng.uniform(0, 2 * np.pi, 3)
    radius = np.sqrt(area / np.pi) * (1 + 0.25 * np.sin(2 * t + phases[0]) + 0.12 * np.sin(5 * t + phases[1]))
    stretch = np.exp(rng.normal(0, 0.3))
    points = np.stack([radius * np.cos(t + phases[2]) * stretch, radius * np.sin(t + phases[2]) / stretch], 1)
    points += rng.uniform((4, 4), (width - 4, height - 4))
    # What leaves the picture is cut at its edge.
    return np.round(points.clip(0, (width, height)), 2)


def _area(outline: np.ndarray) -> float:
    x, y = outline.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(np.roll(x, -1), y))) / 2


def _box(outlines: list[np.ndarray]) -> list[float]:
    points = np.concatenate(outlines)
    return [round(float(v), 2) for v in (*points.min(0), *np.ptp(points, axis=0))]


def _cut_out(rng: np.random.Generator, picture: Image.Image, outlines: list[np.ndarray], class_id: int) -> None:
    """Lay the class's scene over the picture, inside the outlines."""
    scene = _bank.scenes[class_id % len(_bank.scenes)]
    for outline in outlines:
        x, y = np.floor(outline.min(0)).astype(int).tolist()
        right, bottom = np.ceil(outline.max(0)).astype(int).tolist()
        size = (max(1, right - x), max(1, bottom - y))
        stencil = Image.new("1", size)
        ImageDraw.Draw(stencil).polygon([(u - x, v - y) for u, v in outline.tolist()], fill=1)
        left, top = int(rng.integers(801 - size[0])), int(rng.integers(801 - size[1]))
        picture.paste(scene.crop((left, top, left + size[0], top + size[1])), (x, y), stencil)


def _segmentation(
    rng: np.random.Generator, outlines: list[np.ndarray], width: int, height: int, crowd: bool
) -> list[list[float]] | dict[str, Any]:
    """Polygons; for a crowd, and one annotation in 500, run lengths, every other time in the compressed form."""
    polygons = [outline.ravel().tolist() for outline in outlines]
    if not crowd and rng.random() >= 0.002:
        return polygons
    from pycocotools import mask as rle_code

    rle = rle_code.merge(rle_code.frPyObjects(polygons, height, width))
    if rng.random() < 0.5:
        return {"counts": rle["counts"].decode(), "size": [height, width]}
    flat = rle_code.decode(rle).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"counts": [0, *runs] if flat[0] else runs, "size": [height, width]}


def _jpeg(rng: np.random.Generator, picture: Image.Image) -> bytes:
    x, y = (int(v) for v in rng.integers(0, 1024 - 640, 2))
    noisy = np.asarray(picture) + _bank.noise[y : y + picture.height, x : x + picture.width]
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _enter(bank: Bank, arguments: Arguments) -> None:
    global _bank, _arguments
    _bank, _arguments = bank, arguments


def write(arguments: Arguments) -> None:
    """Write the data set, the marker last."""
    for subset in SUBSETS:
        (arguments.out / f"{subset}2014").mkdir(parents=True, exist_ok=True)
    (arguments.out / "annotations").mkdir(exist_ok=True)
    entries: dict[str, list[str]] = {s: [] for s in SUBSETS}
    spools = {s: tempfile.TemporaryFile("w+", dir=arguments.out) for s in SUBSETS}  # noqa: SIM115 - closed below
    # Forked, so that the bank is shared and not drawn once per process.
    context = multiprocessing.get_context("fork")
    with context.Pool(arguments.processes, _enter, (make_bank(arguments), arguments)) as pool:
        drawn = pool.imap(draw, range(arguments.images), chunksize=16)
        for subset, image, annotations in tqdm(drawn, total=arguments.images, desc="drawing", unit="image"):
            entries[subset].append(json.dumps(image))
            spools[subset].write("".join(f"{a},\n" for a in annotations))
    names = class_names("coco")
    categories = [{"supercategory": "shapes", "id": c, "name": names[i]} for i, c in enumerate(CATEGORY_IDS)]
    for subset, spool in spools.items():
        # The order of COCO's own files: images before annotations before categories.
        with spool, open(arguments.out / "annotations" / f"instances_{subset}2014.json", "w") as file:
            file.write('{"info": {"description": "generated, COCO 2014 layout"}, "images": [\n')
            file.write(",\n".join(entries[subset]) + '],\n"licenses": [], "annotations": [\n')
            spool.seek(0)
            shutil.copyfileobj(spool, file)
            file.seek(file.tell() - 2)  # the last comma
            file.write(f'],\n"categories": {json.dumps(categories)}}}')


def main() -> None:
    """Generate and print what came out, as one JSON line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    made_of = {k: v for k, v in asdict(arguments).items() if k not in ("out", "processes")}
    marker = arguments.out / MARKER
    if marker.is_file():
        found = json.loads(marker.read_text())
        if found != made_of:
            raise SystemExit(f"{arguments.out} holds a set made with {found}, asked for {made_of}: give another folder")
    elif arguments.out.is_dir() and any(arguments.out.iterdir()):
        raise SystemExit(f"{arguments.out} holds something else, or a set that was not finished: give an empty folder")
    else:
        write(arguments)
        marker.write_text(json.dumps(made_of))
    pictures = [p.stat().st_size for s in SUBSETS for p in (arguments.out / f"{s}2014").iterdir()]
    files = {p.name: p.stat().st_size for p in (arguments.out / "annotations").iterdir()}
    print(json.dumps({"images": len(pictures), "mean_jpeg_bytes": round(np.mean(pictures)), "annotations": files}))


if __name__ == "__main__":
    main()
