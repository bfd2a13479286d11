"""One update measured: ours against the published code's loops, on the same episodes, in one run.

    python benchmarks/training_step.py --store outputs/store/images/... --backbone-weights WEIGHTS
    python benchmarks/training_step.py --device cuda

Variants take turns, --repetitions times, on the same episodes and weights, 473 px, ResNet-50: the literal loops
(benchmarks/literal_mshnet.py) in float32, ours in float32, ours in bfloat16 (on a CPU with channels_last). The table
has the fastest of each, which other work on the machine disturbs least. Training step: backbone, forward, loss,
backward and the optimizer; evaluation: backbone, forward, mask; similarity: from features to both kinds of maps. Peak
memory: the highest resident size (on a GPU: what torch held) of a process that does --memory-updates training updates
of one variant and nothing else; also without what it held before the first update.

Episodes: images and masks of a preprocessed store (--store, the folder of its manifest), else random pixels with blobs
of 8 to 40% of the image. Backbone weights: --backbone-weights, else random and calibrated.

Accuracy of a variant, on the first batch, against the literal loops in float32 with the same weights, in eval mode,
untrained, batch norm's statistics fitted to the batch: the largest difference of a cosine and of a prototype map; of
the foreground's logit less the background's the mean difference as a part of its standard deviation, and the share of
pixels on the same side of the median (an untrained network's own threshold means nothing).

On a machine that others use too, --cpu-time --threads 1 measures the processor's time instead of the clock's.

--device cuda adds the matrix-product ceiling of the card, the share of it that the update reaches (by the operations
of the plain network, so that saved work counts as speed), and the breakdown by region. It needs torch, torchvision and
jaxtyping only; with --store or weights also what reading those needs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from literal_mshnet import LiteralMSHNet, literal_loss
from torch import Tensor

from mshnet.backbone import LEVELS, Features, InferenceBackbone
from mshnet.config import ModelConfig
from mshnet.data.transforms import normalise
from mshnet.loss import segmentation_loss
from mshnet.model import MSHNet, Prediction
from mshnet.profiling import breakdown, recording, region

VARIANTS = ("literal float32", "ours float32", "ours bfloat16")
INNER_WEIGHT = 1 / 3
Episodes = tuple[Tensor, Tensor, Tensor, Tensor]
"""uint8: queries (b,3,H,W), their masks (b,H,W), supports (b,k,3,H,W), their masks (b,k,H,W)."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--store", default="", help="folder or URI of a preprocessed store; empty: random pixels")
    parser.add_argument("--backbone-weights", default="random", help="as for the pipelines")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--image-size-px", type=int, default=473, help="of random pixels")
    parser.add_argument("--batch", type=int, default=0, help="episodes per update; 0: 4 on a CPU, 16 on a GPU")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-updates", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile the learnable part (GPU)")
    parser.add_argument("--cpu-time", action="store_true", help="the processor's time, not the clock's")
    parser.add_argument("--quick", action="store_true", help="two repetitions, batch 1, no memory")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    found = parser.parse_args()
    found.batch = found.batch or (1 if found.quick else 4 if found.device == "cpu" else 16)
    if found.quick:
        found.repetitions, found.memory_updates = 2, 0
    return found


# Episodes


def random_episodes(batch: int, shots: int, side: int, seed: int = 0) -> Episodes:
    """Noise, smooth enough to pass for a picture, with elliptic objects of 8 to 40% of the image."""
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(batch * (shots + 1), 3, side // 8, side // 8, generator=random)
    images = torch.nn.functional.interpolate(images, size=(side, side), mode="bilinear")
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    masks = []
    for _ in range(batch * (shots + 1)):
        area, ratio, top, left = torch.rand(4, generator=random).tolist()
        radius = side * ((0.08 + 0.32 * area) / torch.pi) ** 0.5
        high, wide = radius * (0.7 + 0.6 * ratio), radius / (0.7 + 0.6 * ratio)
        centre = (side * (0.35 + 0.3 * top), side * (0.35 + 0.3 * left))
        masks.append(((rows - centre[0]) / high) ** 2 + ((columns - centre[1]) / wide) ** 2 < 1)
    mask = torch.stack(masks)
    images = ((images * 0.5 + 0.4 * mask[:, None]) * 255).clamp(0, 255).byte()
    return _split(images, mask.byte(), batch, shots)


def stored_episodes(store: str, batch: int, shots: int, seed: int = 0) -> Episodes:
    """Of objects of 2,048 px or more, drawn at random."""
    from mshnet.data.store.images import ImageStore

    images = ImageStore(store)
    random = torch.Generator().manual_seed(seed)
    pools: dict[int, list[int]] = {}
    for row, (_, _, pixels) in enumerate(images.contents()):
        for class_id, count in pixels.items():
            if count >= 2048:
                pools.setdefault(class_id, []).append(row)
    classes = [c for c in sorted(pools) if len(pools[c]) > shots]
    queries, supports = [], []
    for _ in range(batch):
        class_id = classes[int(torch.randint(len(classes), (), generator=random))]
        order = torch.randperm(len(pools[class_id]), generator=random)[: shots + 1]
        query, *others = [images.pixels(pools[class_id][i], class_id) for i in order.tolist()]
        queries.append(query)
        supports += others
    image, mask = (torch.stack([pair[i] for pair in queries + supports]) for i in range(2))
    return _split(image, mask, batch, shots)


def _split(images: Tensor, masks: Tensor, batch: int, shots: int) -> Episodes:
    supports = (x[batch:].unflatten(0, (batch, shots)) for x in (images, masks))
    of_supports, of_masks = supports
    return images[:batch], masks[:batch], of_supports, of_masks


# Variants


@dataclass
class Variant:
    """One way to compute the same network."""

    features: Callable[[Episodes], tuple[Any, Any]]
    similarities: Callable[[Any, Any, Tensor], Any]
    loss: Callable[[Any, Any, Episodes], Tensor]
    logits: Callable[[Any, Any, Tensor], Tensor]
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def update(self, episodes: Episodes) -> None:
        """Backbone, forward, loss, backward, optimizer."""
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        with region("backbone"):
            features = self.features(episodes)
        loss = self.loss(*features, episodes)
        del features
        with region("backward"):
            loss.backward()
        with region("optimizer"):
            self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, episodes: Episodes) -> Tensor:
        """Logits at the image's size."""
        self.module.eval()
        return self.logits(*self.features(episodes), episodes[3].float())


def build(name: str, options: argparse.Namespace) -> Variant:
    """Weights are the same for all variants."""
    torch.manual_seed(0)
    model = MSHNet(ModelConfig(backbone=options.backbone))
    if options.backbone_weights != "random":
        from mshnet.checkpoint import load_backbone_weights

        load_backbone_weights(model.backbone, options.backbone_weights)
    else:
        model.backbone.calibrate(normalise(_episodes(options, 4, 1)[0]))
    model = model.to(options.device)
    return _literal(model) if name == VARIANTS[0] else _ours(model, name.split()[1], options)


def _literal(model: MSHNet) -> Variant:
    literal = LiteralMSHNet(model.backbone).to(next(model.parameters()).device)
    literal.relation.load_state_dict(model.relation.state_dict())

    def loss(query: Any, shots: Any, episodes: Episodes) -> Tensor:
        _, low, inner = literal.relation(query, shots, episodes[3].float())
        return literal_loss(low, inner, episodes[1], INNER_WEIGHT)

    return Variant(
        features=lambda e: literal.features(normalise(e[0]), normalise(e[2])),
        similarities=literal.relation.similarities,
        loss=loss,
        logits=lambda query, shots, masks: literal.relation(query, shots, masks)[0],
        module=literal.relation,
        optimizer=_sgd(literal.relation, fused=False),
    )


def _ours(model: MSHNet, precision: str, options: argparse.Namespace) -> Variant:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    backbone, relation = InferenceBackbone(model.backbone, dtype).to(options.device), model.relation
    del model
    if options.compile:
        relation.compile(mode="reduce-overhead", dynamic=False)

    def features(episodes: Episodes) -> tuple[Features, Features]:
        b = len(episodes[0])
        found = backbone(torch.cat([episodes[0], episodes[2].flatten(0, 1)]))
        # As mshnet.features.FeatureCache: the backward pass keeps the queries' features alone.
        query = [maps[:b].clone() if torch.is_grad_enabled() else maps[:b] for maps in found]
        return Features(*query), Features(*(maps[b:] for maps in found))

    def predict(query: Features, support: Features, masks: Tensor) -> Prediction:
        with torch.autocast(options.device, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            found = relation(query, support, masks)
        inner = tuple(logits.float() for logits in found.inner_logits)
        return Prediction(logits_low=found.logits_low.float(), inner_logits=inner, size=found.size)

    def similarities(query: Features, support: Features, masks: Tensor) -> Any:
        with torch.autocast(options.device, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            return relation.similarities(query, support, masks)

    def loss(query: Features, support: Features, episodes: Episodes) -> Tensor:
        prediction = predict(query, support, episodes[3].float())
        with region("loss"):
            return segmentation_loss(prediction, episodes[1], INNER_WEIGHT).total

    return Variant(
        features=features,
        similarities=similarities,
        loss=loss,
        logits=lambda query, support, masks: predict(query, support, masks).logits,
        module=relation,
        optimizer=_sgd(relation, fused=True),
    )


def _sgd(module: torch.nn.Module, fused: bool) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=fused or None)


def _episodes(options: argparse.Namespace, batch: int, shots: int) -> Episodes:
    if options.store:
        return stored_episodes(options.store, batch, shots)
    return random_episodes(batch, shots, options.image_size_px)


def _on_device(options: argparse.Namespace, batch: int, shots: int) -> Episodes:
    queries, masks, supports, support_masks = (x.to(options.device) for x in _episodes(options, batch, shots))
    return queries, masks, supports, support_masks


# Measuring


def seconds(work: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one call, the device's work included."""
    _wait(device)
    started = clock()
    work()
    _wait(device)
    return clock() - started


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(work: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, float]:
    """The fastest of every variant's repetitions, after one that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(options.repetitions + 1):
        for name, call in work.items():
            value = seconds(call, options.device, time.process_time if options.cpu_time else time.perf_counter)
            if repetition:
                taken[name].append(value)
    return {name: min(values) for name, values in taken.items()}


def measure(variants: dict[str, Variant], options: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Rows of the table: what, shots, seconds for the batch by variant."""
    single = _on_device(options, options.batch, 1)
    yield "similarity", 1, _similarity_times(variants, single, options)
    yield "similarity", 5, _similarity_times(variants, _on_device(options, 1, 5), options)
    yield "evaluation", 1, in_turns({n: partial(v.evaluate, single) for n, v in variants.items()}, options)
    yield "training step", 1, in_turns({n: partial(v.update, single) for n, v in variants.items()}, options)


@torch.no_grad()
def _similarity_times(variants: dict[str, Variant], batch: Episodes, options: argparse.Namespace) -> dict[str, float]:
    features = {name: variant.features(batch) for name, variant in variants.items()}
    masks = batch[3].float()
    calls = {name: partial(v.similarities, *features[name], masks) for name, v in variants.items()}
    return in_turns(calls, options)


@torch.no_grad()
def accuracy(variants: dict[str, Variant], options: argparse.Namespace) -> dict[str, tuple[float, float, float, float]]:
    """By variant: largest error of the cosine and of the prototype maps, error of logits, agreement of masks."""
    batch = _on_device(options, options.batch, 1)
    masks, (literal, *ours) = batch[3].float(), list(variants)
    _fit_batch_norm(variants[literal], batch)
    for variant in variants.values():
        variant.module.load_state_dict(variants[literal].module.state_dict())
    cosine, prototype = variants[literal].similarities(*variants[literal].features(batch), masks)
    expected = _foreground(variants[literal].evaluate(batch))
    median = expected.median()
    found = {}
    for name in ours:
        maps = variants[name].similarities(*variants[name].features(batch), masks)
        logits = _foreground(variants[name].evaluate(batch))
        errors = [
            max(float((of[v].float() - torch.stack(truth[i], 1)).abs().max()) for i, v in enumerate(LEVELS))
            for of, truth in ((maps.cosine, cosine), (maps.prototype, prototype))
        ]
        off = float((logits - expected).abs().mean() / expected.std())
        found[name] = (*errors, off, float(((logits > median) == (expected > median)).float().mean()))
    return found


def _fit_batch_norm(variant: Variant, batch: Episodes) -> None:
    """Running statistics of this batch: with the initial ones, an untrained network's logits hardly vary."""
    norms = [module for module in variant.module.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    variant.module.eval()
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    variant.logits(*variant.features(batch), batch[3].float())
    for norm in norms:
        norm.momentum = 0.1


def _foreground(logits: Tensor) -> Tensor:
    return logits[:, 1] - logits[:, 0]


def peak_memory(name: str, options: argparse.Namespace) -> tuple[float, float]:
    """MiB at the highest, and above what was held before the first update; in a process that does nothing else."""
    line = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    highest, before = json.loads(done.stdout.splitlines()[-1])
    return highest, highest - before


def use_memory(options: argparse.Namespace) -> None:
    """The other end of `peak_memory`: prints the peak and what was held before, MiB."""
    variant = build(options.memory_of, options)
    batch = _on_device(options, options.batch, 1)
    cuda = options.device == "cuda"
    before = torch.cuda.memory_allocated() / 2**20 if cuda else _resident_mib()
    for _ in range(options.memory_updates):
        variant.update(batch)
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([torch.cuda.max_memory_allocated() / 2**20 if cuda else highest, before]))


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


# A GPU's ceiling


def ceiling_flops(device: str) -> float:
    """Of a large bfloat16 matrix product, operations per second."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    return 2 * 8192**3 / min(seconds(lambda: a @ a, device) for _ in range(10))


def plain_flops(options: argparse.Namespace) -> float:
    """Of one episode's update by the literal loops: counted by torch, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    literal = build(VARIANTS[0], options)
    batch = _on_device(options, 1, 1)
    with FlopCounterMode(display=False) as counter:
        literal.loss(*literal.features(batch), batch).backward()
    return float(counter.get_total_flops())


def regions(variant: Variant, batch: Episodes) -> str:
    """The table of an update's parts."""
    recorder = recording(skip=2, updates=5)
    with recorder:
        for _ in range(8):
            variant.update(batch)
            recorder.step()
    return breakdown(recorder).table()


def main() -> None:
    """Measure and print."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        use_memory(options)
        return
    variants = {name: build(name, options) for name in VARIANTS}
    literal, *ours = VARIANTS
    accuracies = accuracy(variants, options)  # before the updates part the variants' weights
    print(f"| ms an episode | shots | {' | '.join(VARIANTS)} | {' | '.join(f'literal / {n}' for n in ours)} |")
    print("| --- | ---: |" + " ---: |" * (2 * len(VARIANTS) - 1), flush=True)
    updates = {}
    for what, shots, taken in measure(variants, options):
        size = 1 if shots > 1 else options.batch
        times = [f"{1000 * value / size:.0f}" for value in taken.values()]
        ratios = [f"{taken[literal] / taken[name]:.2f}" for name in ours]
        print(f"| {what} | {shots} | {' | '.join(times + ratios)} |", flush=True)
        updates = taken
    if options.memory_updates:
        found = [peak_memory(name, options) for name in VARIANTS]
        for i, what in enumerate(("peak memory, MiB", "of it by the updates, MiB")):
            cells = [f"{of[i]:.0f}" for of in found] + [f"{of[i] / found[0][i]:.2f} of it" for of in found[1:]]
            print(f"| {what} | 1 | {' | '.join(cells)} |")
    print("\n| against literal float32 | cosine, largest | prototype, largest | logits, mean | same side of median |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (cosine, prototype, logits, same) in accuracies.items():
        print(f"| {name} | {cosine:.1e} | {prototype:.1e} | {logits:.1e} | {same:.2%} |")
    if options.device == "cuda":
        _print_gpu(variants, updates, options)


def _print_gpu(variants: dict[str, Variant], updates: dict[str, float], options: argparse.Namespace) -> None:
    batch = _on_device(options, options.batch, 1)
    update = min(seconds(lambda: variants[VARIANTS[2]].update(batch), "cuda") for _ in range(options.repetitions))
    rate, ceiling = options.batch / update, ceiling_flops("cuda")
    print(f"\n{torch.cuda.get_device_name()}: {rate:.0f} training episodes/s in bfloat16, batch {options.batch}")
    print(f"ceiling {ceiling / 1e12:.0f} TFLOP/s, reached {rate * plain_flops(options) / ceiling:.0%} of it\n")
    print(regions(variants[VARIANTS[2]], batch))


if __name__ == "__main__":
    main()
