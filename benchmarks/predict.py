"""What a query costs on a CPU, and what is kept of k examples: seconds, memory, and the backbone's part.

    python benchmarks/predict.py --data DIR/VOC2012 --backbone-weights WEIGHTS --record docs/benchmarks/predict.md

DATA is VOC in its usual layout; examples and queries are pictures of one class, of files on disk. The network is
untrained, whose time is a trained one's. Seconds are medians over --repeats queries. *CPU seconds* are this process's
on --threads threads: they say what the work is where others run beside it, the clock's seconds what one waits.
*Kept* is what stays of the examples, beside the network; *whole features* what would stay without choosing the
object's positions. *Peak* is the highest resident size of the process so far, so k rises. That the result for k copies
of one example is that of one is looked at as well: ends with code 1 where a pixel differs.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from mshnet import architectures
from mshnet.checkpoint import load_backbone_weights
from mshnet.config import Architecture, ModelConfig
from mshnet.data.pascal import VocSource
from mshnet.inference import foreground_lead
from mshnet.predict import Segmenter, read_image
from mshnet.segmented import probability


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """On what, and how much of it."""

    data: Path
    """Folder of VOC 2012."""
    backbone_weights: str
    """ResNet-50's, a safetensors file or torch state dict."""
    architecture: Architecture = "mshnet"
    """Whose relation."""
    class_id: int = 7
    """0..19; 7: cats."""
    image_size_px: int = 473
    """Side of the square that the network sees."""
    supports: tuple[int, ...] = (1, 5, 10, 20, 50)
    """Numbers of examples, rising; pictures are taken again where there are fewer."""
    repeats: int = 3
    """Queries per row."""
    threads: int = 1
    """Of torch's arithmetic."""
    record: Path | None = None
    """Markdown file, to whose end the tables are added."""


@dataclass
class Clock:
    """Seconds of each part, by the clock and of the CPU, a list entry per query."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def of(self, part: str, work: Callable[[], Any]) -> Any:
        """Do the work, and note how long it took."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.cpu.setdefault(part, []).append(time.process_time() - cpu)
        self.wall.setdefault(part, []).append(time.perf_counter() - wall)
        return result

    def medians(self, part: str) -> tuple[float, float]:
        """(CPU, clock)."""
        return statistics.median(self.cpu[part]), statistics.median(self.wall[part])


def main(arguments: Arguments) -> int:
    """Measure, print, record. Exit code 1 where copies of an example give another mask than one."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = architectures.build(ModelConfig(architecture=arguments.architecture))
    load_backbone_weights(model.backbone, arguments.backbone_weights)
    segmenter = Segmenter(model, arguments.image_size_px, device="cpu")
    pairs = _pictures(arguments)
    lines = _latency(arguments, segmenter, pairs)
    lines += _supports(arguments, segmenter, pairs)
    differing = _copies(segmenter, pairs)
    lines.append(f"\nPixels that differ between 50 copies of one example and one: {differing}.")
    text = "\n".join(lines)
    print(text)
    if arguments.record:
        with arguments.record.open("a") as file:
            file.write(f"\n{text}\n")
    return 1 if differing else 0


Pair = tuple[str, str]
"""A picture's path, and that of its mask with the label: `labels.png#8`."""


def _pictures(arguments: Arguments) -> list[Pair]:
    source = VocSource(str(arguments.data))
    pairs = []
    for record in source.records():
        if (mask := source.load(record).masks.get(arguments.class_id)) is not None and mask.mean() > 0.02:
            label = f"{Path(source.root, record.mask_path)}#{arguments.class_id + 1}"
            pairs.append((str(Path(source.root, record.image_path)), label))
    return pairs


@torch.inference_mode()
def _latency(arguments: Arguments, segmenter: Segmenter, pairs: list[Pair]) -> list[str]:
    """The steps of `Segmenter.__call__`, one by one."""
    clock, network = Clock(), segmenter.network
    segmenter.learn("it", [pairs[0][0]], [pairs[0][1]])
    (learned,) = segmenter._chosen(["it"])
    shares = segmenter.learn("it", [pairs[0][0]], [pairs[0][1]]).object_shares
    for image, _ in pairs[1 : arguments.repeats + 2]:
        pixels = clock.of("decode and resize", lambda path=image: _decoded(segmenter, path))
        query = clock.of("backbone", lambda square=pixels[1]: network.features(square[None]))
        logits = clock.of("relation", lambda maps=query: network.logits(maps, learned.supports))
        size = pixels[0].shape[:2]
        clock.of("to the picture's size", lambda x=logits, to=size: probability(foreground_lead(x[0], to)).numpy())
        clock.of("a query", lambda path=image: segmenter(path).mask)
    parts = ("decode and resize", "backbone", "relation", "to the picture's size")
    whole = sum(clock.medians(part)[0] for part in parts)
    rows = [(part, *clock.medians(part), clock.medians(part)[0] / whole) for part in parts]
    return [
        f"## {arguments.architecture}, {_machine(arguments)}",
        "",
        f"One query, ResNet-50, {arguments.image_size_px} px, one example (object: {shares[0]:.0%} of it), float32.",
        "",
        "| | CPU s | clock s | share |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {part} | {cpu:.3f} | {wall:.3f} | {share:.0%} |" for part, cpu, wall, share in rows),
        "| a query, as called | {:.3f} | {:.3f} | |".format(*clock.medians("a query")),
    ]


def _decoded(segmenter: Segmenter, path: str) -> tuple[np.ndarray, torch.Tensor]:
    pixels = read_image(path)
    return pixels, segmenter.network.square(pixels)


def _supports(arguments: Arguments, segmenter: Segmenter, pairs: list[Pair]) -> list[str]:
    rows = []
    queries = [image for image, _ in pairs[-arguments.repeats :]]
    for k in arguments.supports:
        clock = Clock()
        images, masks = zip(*islice(cycle(pairs), k), strict=True)
        support = clock.of("learn", lambda x=images, y=masks: segmenter.learn("it", x, y))
        for query in queries:
            clock.of("query", lambda path=query: segmenter(path).mask)
        share = statistics.mean(support.object_shares)
        kept = segmenter.memory_bytes("it") / 2**20
        whole = k * _whole_bytes(segmenter, support) / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        cells = [f"{k}", f"{share:.0%}", f"{clock.medians('learn')[0] / k:.2f}", f"{kept:.0f}", f"{whole:,.0f}"]
        cells += [f"{seconds:.2f}" for seconds in clock.medians("query")]
        rows.append(f"| {' | '.join(cells)} | {peak:.2f} |")
        print(rows[-1], file=sys.stderr)
    return [
        "",
        "| k | object | learn, CPU s each | kept, MiB | whole features, MiB | query, CPU s | clock s | peak, GiB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *rows,
    ]


@torch.inference_mode()
def _whole_bytes(segmenter: Segmenter, support: Any) -> int:
    return sum(maps.nbytes for maps in segmenter.network.features(support.images[:1]))


def _copies(segmenter: Segmenter, pairs: list[Pair]) -> int:
    (image, mask), (query, _) = pairs[0], pairs[1]
    segmenter.learn("it", [image], [mask])
    alone = segmenter(query).probabilities
    limit = np.median(alone)  # an untrained network says one side of 0.5 everywhere
    segmenter.learn("it", [image] * 50, [mask] * 50)
    many = segmenter(query).probabilities
    clear = np.abs(alone - limit) > 1e-5  # nearer, the order of the sums decides
    return int(((alone >= limit) != (many >= limit))[clear].sum())


def _machine(arguments: Arguments) -> str:
    busy = os.getloadavg()[0]
    return f"{platform.machine()}, {arguments.threads} thread(s), {time.strftime('%Y-%m-%d')}, load {busy:.0f}"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
