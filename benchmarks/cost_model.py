"""What the paper's tables 2 and 3 take, in hours and in money: a model, from counted work and one device's speed.

    python benchmarks/cost_model.py                                   # print the tables
    python benchmarks/cost_model.py --write docs/cost_model.md        # and put them into the page
    python benchmarks/cost_model.py --card a100 --fraction 0.3 --on-demand 1.5 --spot 0.8
    python benchmarks/cost_model.py --measure                         # time this machine, print the row, stop

Counted: operations per episode and memory (mshnet.cost), gradient bytes, updates by the recipe. Measured, where
benchmarks/single_device.json has a row of the device. Assumed, each an option: the fraction of a card's bf16 peak that
training reaches where nothing is measured, the fixed time of an update, links, prices. docs/cost_model.md explains.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from cost_plan import (
    FOLDS,
    LINKS,
    PRICES,
    Assumptions,
    batch_norms,
    card,
    devices,
    flops,
    gradient_bytes,
    plans,
    run_s,
    runs,
    spot_factor,
    update_s,
)

from mshnet.config import ModelConfig
from mshnet.cost import update_memory
from mshnet.data.transforms import normalise
from mshnet.loss import segmentation_loss
from mshnet.model import MSHNet

START, END = "<!-- benchmarks/cost_model.py: from here -->", "<!-- to here -->"
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Arguments(Assumptions):
    """What the model assumes, and what to do."""

    write: str = ""
    """A Markdown file with the two marker lines, between which the tables go."""
    measure: bool = False
    """Time some updates on this machine's CPU and print the row for single_device.json."""


def table(head: Sequence[str], rows: Iterator[Sequence[Any]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def configurations() -> list[tuple[ModelConfig, int]]:
    return [(run.model, run.shot) for run in runs(2)[::FOLDS]]


def named(model: ModelConfig, shot: int) -> str:
    return f"{model.backbone.replace('resnet', 'ResNet-')}, {shot}-shot"


def work_table(given: Arguments) -> str:
    def rows() -> Iterator[Sequence[Any]]:
        for model, shot in configurations():
            work = flops(model, shot, given.object_share)
            everywhere = flops(model, shot, 1.0).cosine
            parts = [*asdict(work).values(), work.training, work.evaluation]
            yield [named(model, shot), *(f"{part / 1e9:.1f}" for part in parts), f"{everywhere / 1e9:.1f}"]

    parts = ["backbone", "cosine", "prototype", "merging", "pyramid", "backward", "training", "evaluation"]
    return table(["10⁹ operations per episode", *parts, "cosine, all positions"], rows())


def traffic_table(given: Arguments) -> str:
    def rows() -> Iterator[Sequence[Any]]:
        for model, shot in configurations():
            read = (1 + shot) * given.image_bytes
            pixels = (1 + shot) * 473 * 473 * 3
            decoding = f"{1e3 * (1 + shot) / given.decode_images_per_s:.1f}"
            traffic = (read, pixels, gradient_bytes(model))
            yield [named(model, shot), *(f"{part / 1e6:.2f}" for part in traffic), batch_norms(model, shot), decoding]

    head = ["", "MB read per episode", "MB to the device", "MB of gradients per update", "batch norms"]
    return table([*head, "ms of a core to decode an episode"], rows())


def rate_table(given: Arguments) -> str:
    def rows() -> Iterator[Sequence[Any]]:
        for device in devices(given):
            for run in runs(2)[::FOLDS]:
                compute, _ = update_s(run, device, 1, 1.0, given)
                training = run.training.global_batch / compute
                work = flops(run.model, run.shot, given.object_share)
                cores = training * (1 + run.shot) / given.decode_images_per_s
                yield [
                    device.name, named(run.model, run.shot), _short(training),
                    _short(device.evaluation_flops_per_s / work.evaluation), _short(cores),
                    _short(training * (1 + run.shot) * given.image_bytes / 1e6), device.basis,
                ]  # fmt: skip

    head = [
        "device", "", "training episodes/s", "evaluation episodes/s", "cores that decode", "MB/s read", "basis"
    ]  # fmt: skip
    return table(head, rows())


def communication_table(given: Arguments) -> str:
    device, run = card(given), runs(2)[0]

    def rows() -> Iterator[Sequence[Any]]:
        for name, bandwidth in LINKS.items():
            for workers in (1, 2, 4, 8):
                compute, communication = update_s(run, device, workers, bandwidth, given)
                alone, _ = update_s(run, device, 1, bandwidth, given)
                speedup = alone / (compute + communication)
                yield [
                    name, workers, f"{1e3 * compute:.1f}", f"{1e3 * communication:.1f}", f"{speedup:.2f}",
                    f"{100 * speedup / workers:.0f}%",
                ]  # fmt: skip

    head = ["link", "GPUs of a fold", "ms of computation", "ms of communication", "times one GPU", "efficiency"]
    return table(head, rows())


def price_table(given: Arguments) -> str:
    default_on_demand, default_spot = PRICES[given.card]
    on_demand = default_on_demand if given.on_demand is None else given.on_demand
    spot = default_spot if given.spot is None else given.spot

    def rows() -> Iterator[Sequence[Any]]:
        for name, wanted in (("2", runs(2)), ("3", runs(3)), ("2 and 3", runs(2) + runs(3))):
            for gpus in (1, 4, 32):
                for found in plans(wanted, gpus, card(given), given):
                    held = found.held_gpu_hours
                    yield [
                        name, gpus, f"{found.folds_at_once} × {found.workers}", f"{found.hours:.1f}", f"{held:.0f}",
                        f"{found.busy_gpu_hours / held:.0%}", f"{held * on_demand:,.0f}",
                        f"{held * spot_factor(found.workers, given) * spot:,.0f}",
                    ]  # fmt: skip

    head = [
        "paper's table", "GPUs", "folds at once × GPUs", "hours", "GPU-hours held", "of them busy",
        f"USD on demand at {on_demand:.2f}/h", f"USD spot at {spot:.2f}/h",
    ]  # fmt: skip
    return table(head, rows())


def fold_table(given: Arguments) -> str:
    link = next(iter(LINKS.values()))

    def rows() -> Iterator[Sequence[Any]]:
        for run in [*runs(2)[::FOLDS], *runs(3)[::FOLDS]]:
            hours = [run_s(run, device, 1, link, given) / 3600 for device in devices(given)]
            episodes = run.training.epochs * run.training.steps_per_epoch * run.training.global_batch
            yield [run.table, named(run.model, run.shot), f"{episodes / 1e6:.2f}", *map(_short, hours)]

    head = ["paper's table", "", "10⁶ training episodes", *(f"hours, {device.name}" for device in devices(given))]
    return table(head, rows())


def memory_table() -> str:
    def rows() -> Iterator[Sequence[Any]]:
        for model, shot in configurations():
            for batch, precision in ((8, "bfloat16"), (16, "bfloat16"), (16, "float32")):
                memory = update_memory(model, shot, batch, precision=precision)  # type: ignore[arg-type]
                fixed = memory.weights + memory.gradients + memory.optimizer
                cells = (fixed, memory.features, memory.peak)
                yield [named(model, shot), batch, precision, *(f"{cell / GIB:.2f}" for cell in cells)]

    head = ["GiB", "batch", "precision", "weights, gradients, momentum", "features", "peak"]
    return table(head, rows())


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def measured_row() -> dict[str, Any]:
    """ResNet-50, 1-shot, 473 px on this machine's CPU, in float32 and batches of 4: the quickest of three."""
    batch, side = 4, 473
    network = MSHNet(ModelConfig()).train()
    optimizer = torch.optim.SGD(network.relation.parameters(), lr=0.01, momentum=0.9)
    images = torch.randint(0, 256, (batch, 2, 3, side, side), dtype=torch.uint8)
    masks = torch.zeros(batch, side, side, dtype=torch.uint8)
    masks[:, 140:330, 140:330] = 1  # 0.16 of the image

    def forward() -> Any:
        query, support = normalise(images[:, 0]), normalise(images[:, 1])[:, None]
        return network(query, support, masks[:, None].float())

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        segmentation_loss(forward(), masks, 1 / 3).total.backward()
        optimizer.step()

    def seconds(work: Any) -> float:
        taken = []
        for _ in range(4):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
        return min(taken[1:])

    train = seconds(update)
    network.eval()
    with torch.no_grad():
        judge = seconds(forward)
    return {
        "device": f"{torch.get_num_threads()} CPU threads ({platform.machine()})",
        "backbone": "resnet50",
        "shot": 1,
        "precision": "float32",
        "training_episodes_per_s": round(batch / train, 4),
        "evaluation_episodes_per_s": round(batch / judge, 4),
        "source": "benchmarks/cost_model.py --measure",
    }


def main(given: Arguments) -> None:
    if given.measure:
        print(json.dumps(measured_row(), indent=2))
        return
    sections = {
        "Work": work_table(given),
        "Traffic": traffic_table(given),
        "One device": rate_table(given),
        "One fold on one device": fold_table(given),
        "Several GPUs for one fold": communication_table(given),
        "The paper's tables": price_table(given),
        "Memory": memory_table(),
    }
    text = "\n".join(f"### {title}\n\n{body}" for title, body in sections.items())
    print(text)
    if given.write:
        page = Path(given.write)
        before, rest = page.read_text().split(START)
        page.write_text(f"{before}{START}\n\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
