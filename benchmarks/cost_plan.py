"""How long runs of the paper's tables take on some GPUs: the model behind cost_model.py, without its tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from mshnet.config import ModelConfig, TrainingConfig
from mshnet.cost import EpisodeFlops, batch_norm_calls, episode_flops, learnable_bytes
from mshnet.model import MSHNet
from pipelines import recipes

HERE = Path(__file__).resolve().parent
FOLDS = 4
PEAK_TFLOPS = {"a100": 312.0, "h100": 989.0, "h200": 989.0}
"""Dense bf16, of the SXM modules' data sheets."""
PRICES = {"a100": (1.80, 1.00), "h100": (3.00, 1.80), "h200": (3.60, 2.20)}
"""USD per GPU-hour on demand and spot: assumed, in the range of 2025 and 2026 lists; give your own."""
LINKS = {"NVLink 4, 450 GB/s": 450e9, "PCIe 4 x16, 25 GB/s": 25e9, "100 Gbit/s Ethernet": 12.5e9}
"""Bytes per second in one direction, of which `link_efficiency` is reached."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Every one can be replaced by what you know."""

    card: Literal["a100", "h100", "h200"] = "h200"
    """Whose peak and prices are taken."""
    fraction: float = 0.2
    """Of the dense bf16 peak that training and evaluation reach, where single_device.json has no row of the card."""
    fixed_ms: float = 1.0
    """Of an update whatever its batch: optimizer, launches."""
    object_share: float = 0.16
    """Of a support's positions (measured: 439 pairs of the VOC training lists at 473 px)."""
    image_bytes: int = 120_000
    """Stored size of an image with its masks (measured: docs/benchmarks/episode_store.md)."""
    decode_images_per_s: float = 380.0
    """Of one CPU core, JPEG at 473 px (measured: docs/benchmarks/episode_store.md, bare decoding, two cores)."""
    link_efficiency: float = 0.7
    """Of a link's bandwidth in an all-reduce."""
    message_us: float = 30.0
    """Latency of one collective, microseconds."""
    start_s: float = 90.0
    """Of a run: processes, weights, first compilation."""
    spot_losses_per_h: float = 0.05
    """Of one GPU; each costs `restart_s` of all GPUs of the run."""
    restart_s: float = 150.0
    """Until training goes on, the work since the last checkpoint included."""
    on_demand: float | None = None
    """USD per GPU-hour; the card's assumed price where not given."""
    spot: float | None = None
    """Likewise."""


@dataclass(frozen=True)
class Run:
    """One fold's training and evaluation."""

    table: int
    dataset: str
    model: ModelConfig
    shot: int

    @property
    def training(self) -> TrainingConfig:
        return recipes.paper(self.dataset).training

    @property
    def validation_episodes(self) -> int:
        """After every epoch, of held-out base classes."""
        return recipes.default(self.dataset).validation.validation_episodes


def runs(table: int) -> list[Run]:
    """Of table 2 (Pascal-5i) or 3 (COCO-20i): two backbones, two shots, four folds."""
    dataset = {2: "pascal", 3: "coco"}[table]
    models = [ModelConfig(backbone="resnet50"), ModelConfig(backbone="resnet101")]
    return [Run(table, dataset, model, shot) for model in models for shot in (1, 5) for _ in range(FOLDS)]


@dataclass(frozen=True)
class Device:
    """What one device does, by measurement or assumption."""

    name: str
    training_flops_per_s: float
    evaluation_flops_per_s: float
    fixed_s: float
    """Of an update whatever its batch; in a measured rate it is included."""
    basis: str


@cache
def flops(model: ModelConfig, shot: int, object_share: float) -> EpisodeFlops:
    return episode_flops(model, shot, object_share=object_share)


def ring_all_reduce_s(size_bytes: float, workers: int, bytes_per_s: float, latency_s: float) -> float:
    """Every worker sends and receives 2 (n - 1) / n of the data."""
    return 2 * (workers - 1) / workers * size_bytes / bytes_per_s + (latency_s if workers > 1 else 0.0)


def update_s(
    run: Run, device: Device, workers: int, link_bytes_per_s: float, given: Assumptions
) -> tuple[float, float]:
    """Seconds of one update's computation, and of its communication, none of it hidden behind the other."""
    work = flops(run.model, run.shot, given.object_share).training * run.training.global_batch / workers
    compute = work / device.training_flops_per_s + device.fixed_s
    if workers == 1:
        return compute, 0.0
    latency = given.message_us / 1e6
    gradients = ring_all_reduce_s(gradient_bytes(run.model), workers, link_bytes_per_s * given.link_efficiency, latency)
    # Batch statistics forward, and their gradients backward: some kilobytes, so the latency is all.
    statistics = 2 * batch_norms(run.model, run.shot) * latency
    return compute, gradients + statistics


@cache
def gradient_bytes(model: ModelConfig) -> int:
    with torch.device("meta"):
        return learnable_bytes(MSHNet(model))


@cache
def batch_norms(model: ModelConfig, shot: int) -> int:
    return batch_norm_calls(model, shot)


def run_s(run: Run, device: Device, workers: int, link_bytes_per_s: float, given: Assumptions) -> float:
    """A fold from its start to its score."""
    training, evaluation = run.training, recipes.paper(run.dataset).evaluation.episodes.episodes
    judged = training.epochs * run.validation_episodes + evaluation
    forward_s = flops(run.model, run.shot, given.object_share).evaluation / device.evaluation_flops_per_s / workers
    updates = training.epochs * training.steps_per_epoch
    return given.start_s + updates * sum(update_s(run, device, workers, link_bytes_per_s, given)) + judged * forward_s


def makespan_s(durations: Sequence[float], places: int) -> float:
    """Until all is done, the longest first, each on the place that is free first."""
    busy = [0.0] * places
    for duration in sorted(durations, reverse=True):
        busy[busy.index(min(busy))] += duration
    return max(busy)


@dataclass(frozen=True)
class Plan:
    """How some runs share some GPUs."""

    folds_at_once: int
    workers: int
    """GPUs of one fold: 1, 2, 4 or 8, as the recipe's batch of 8 can be shared."""
    hours: float
    busy_gpu_hours: float

    @property
    def held_gpu_hours(self) -> float:
        """Of all GPUs that have any work, until the last is done."""
        return self.folds_at_once * self.workers * self.hours


def plan(wanted: Sequence[Run], gpus: int, workers: int, device: Device, given: Assumptions) -> Plan:
    """Whole folds side by side on groups of `workers` GPUs, joined by the quickest link."""
    durations = [run_s(run, device, workers, max(LINKS.values()), given) for run in wanted]
    at_once = min(gpus // workers, len(wanted))
    return Plan(at_once, workers, makespan_s(durations, at_once) / 3600, sum(durations) * workers / 3600)


def plans(wanted: Sequence[Run], gpus: int, device: Device, given: Assumptions) -> list[Plan]:
    """One GPU a fold, which is the cheapest, and what is quickest if that is another."""
    every = [plan(wanted, gpus, workers, device, given) for workers in (1, 2, 4, 8) if workers <= gpus]
    quickest = min(every, key=lambda one: one.hours)
    return [every[0]] if quickest is every[0] else [every[0], quickest]


def spot_factor(workers: int, given: Assumptions) -> float:
    """Time with losses over time without."""
    return 1 + given.spot_losses_per_h * workers * given.restart_s / 3600


def devices(given: Assumptions) -> list[Device]:
    """The measured ones, then the card, unless that is one of them."""
    found = []
    for row in json.loads((HERE / "single_device.json").read_text()):
        work = flops(ModelConfig(backbone=row["backbone"]), row["shot"], given.object_share)
        training = work.training * row["training_episodes_per_s"]
        evaluation = work.evaluation * row["evaluation_episodes_per_s"]
        found.append(Device(row["device"], training, evaluation, 0.0, f"measured: {row['source']}"))
    if not any(given.card in device.name.lower() for device in found):
        rate = given.fraction * PEAK_TFLOPS[given.card] * 1e12
        basis = f"assumed: {given.fraction:.0%} of its bf16 peak"
        found.append(Device(given.card.upper(), rate, rate, given.fixed_ms / 1e3, basis))
    return found


def card(given: Assumptions) -> Device:
    """The device that the plans are for."""
    return next(device for device in devices(given) if given.card in device.name.lower())
