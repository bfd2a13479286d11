"""The per-worker training loop: resume, step, reduce, report, checkpoint. Alone in using Ray Train's worker API."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mshnet.config import TrainingConfig
from pipelines import storage
from pipelines.checkpoints import Progress
from pipelines.config import CrossValidationConfig
from pipelines.draw import EPISODES, PAIRS, DrawnTraining
from pipelines.network import Relation, build_network
from pipelines.results import EpochRecord
from pipelines.tracking import Tracker

if TYPE_CHECKING:
    import torch

    from mshnet.data.batches import EpisodeBatch
    from mshnet.data.episodes import Episode

STATE_FILE, PROGRESS_FILE = "state.pt", "progress.json"


@dataclass(frozen=True)
class _EpochEpisodes:
    sampler: Any
    epoch: int

    def __getitem__(self, position: int) -> Episode[int]:
        episode: Episode[int] = self.sampler.episode(self.epoch, position)
        return episode


def train_loop(job: Mapping[str, Any]) -> None:
    """One worker's life. `job` holds the configuration, the drawn fold and the MLflow run, as JSON values."""
    config = CrossValidationConfig.from_json(job["config"])
    drawn = DrawnTraining.from_json(job["drawn"])
    _Worker(config, drawn, job["run_id"]).run()


class _Worker:
    def __init__(self, config: CrossValidationConfig, drawn: DrawnTraining, run_id: str) -> None:
        import ray.train.torch
        import torch

        from mshnet.data.episodes import TrainingSampler
        from mshnet.data.store.images import ImageStore
        from mshnet.data.tables import read_episodes, read_pairs
        from mshnet.features import FeatureCache

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.config, self.training, self.drawn, self.run_id = config, config.training, drawn, run_id
        self.tracker = Tracker(config.tracking_uri, config.experiment)
        torch.set_num_threads(config.compute.cpus_per_worker)
        self.device = ray.train.torch.get_device()
        self.store = ImageStore(storage.join(config.store, drawn.store))
        tables = storage.join(config.store, drawn.folder)
        self.sampler = TrainingSampler(
            read_pairs(storage.join(tables, PAIRS), drawn.pairs_sha256),
            drawn.base_classes,
            config.shot,
            self.training.seed,
            self.training.episodes_per_epoch,
        )
        validation = read_episodes(storage.join(tables, EPISODES), drawn.validation_sha256, "validation")
        # Every rank judges its share; the counts are integers, so the sum does not know how it was shared.
        self.validation = validation[self.rank :: self.world_size]
        self.validation_classes = sorted({episode.class_id for episode in validation})
        model = build_network(config, self.store).to(self.device)
        self.backbone, self.bare = model.backbone, model.relation
        self.features = FeatureCache(model.backbone, config.compute.feature_cache_bytes)
        if self._syncs_batch_norm():
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.bare)
        self.module = ray.train.torch.prepare_model(self.bare)
        self.relation = Relation(self.module, config.precision)
        self.optimizer = torch.optim.SGD(
            self.module.parameters(),
            lr=self.training.learning_rate,
            momentum=self.training.momentum,
            weight_decay=self.training.weight_decay,
        )
        self.progress = self._restored()

    def _syncs_batch_norm(self) -> bool:
        # PyTorch synchronises batch norm on GPUs only.
        return bool(self.world_size > 1 and self.device.type == "cuda")

    def run(self) -> None:
        while self.progress.step < self.training.epochs * self.training.steps_per_epoch:
            self._epoch(self.progress.step // self.training.steps_per_epoch)

    def _epoch(self, epoch: int) -> None:
        import torch
        from ray.experimental import tqdm_ray

        from mshnet.data.batches import EpisodeDataset, load_batches
        from mshnet.engine import train_step

        training, every = self.training, self.config.compute.checkpoint_every_steps
        steps = range(self.progress.step, (epoch + 1) * training.steps_per_epoch)
        batches = load_batches(
            EpisodeDataset(self.store, _EpochEpisodes(self.sampler, epoch)),
            [positions(training, step, self.rank, self.world_size) for step in steps],
            self.config.compute.loader_processes,
        )
        self.module.train()
        started, sums = time.monotonic(), list(self.progress.sums)
        train_s, first = self.progress.train_s, self.progress.step
        bar = (
            tqdm_ray.tqdm(
                total=training.steps_per_epoch,
                desc=f"fold {self.drawn.fold}: epoch {epoch + 1}/{training.epochs}",
                flush_interval_s=5,
            )
            if self.rank == 0
            else None
        )
        for step, batch in zip(steps, batches, strict=True):
            if bar:
                bar.update(1)
            for group in self.optimizer.param_groups:
                group["lr"] = training.learning_rate_at(step)
            torch.manual_seed(dropout_seed(training.seed, step, self.rank))
            losses = train_step(
                self.relation, self.features, batch.to(self.device), self.optimizer, training.inner_weight
            )
            sums = [total + float(loss) for total, loss in zip(sums, losses, strict=True)]
            done = step + 1
            if every and done % every == 0 and done % training.steps_per_epoch:
                self.progress = Progress(
                    step=done,
                    history=self.progress.history,
                    sums=self._mean_over_ranks(sums),
                    train_s=train_s + time.monotonic() - started,
                )
                self._report(score=-1.0)
        if bar:
            bar.close()
        elapsed = time.monotonic() - started
        self._finish_epoch(epoch, len(steps), self._mean_over_ranks(sums), elapsed, train_s, first)

    def _finish_epoch(
        self, epoch: int, steps: int, sums: list[float], elapsed: float, train_s: float, first: int
    ) -> None:
        training = self.training
        validated = self._validate()
        total, outer, inner = (value / training.steps_per_epoch for value in sums)
        record = EpochRecord(
            epoch=epoch + 1,
            step=first + steps,
            loss=total,
            outer_loss=outer,
            inner_loss=inner,
            learning_rate=training.learning_rate_at(first + steps - 1),
            episodes_per_s=steps * training.global_batch / elapsed,
            validation_miou=validated,
        )
        self.progress = Progress(
            step=first + steps, history=[*self.progress.history, record], train_s=train_s + elapsed
        )
        self._report(score=float(epoch) if validated is None else validated)
        if self.rank == 0:
            self._log(record)
            tail = "" if validated is None else f", validation mIoU {100 * validated:.1f}"
            print(
                f"fold {self.drawn.fold}: epoch {epoch + 1}/{training.epochs}, loss {total:.4f}, "
                f"{record.episodes_per_s:.1f} episodes/s{tail}",
                file=sys.stderr,
                flush=True,
            )

    def _log(self, record: EpochRecord) -> None:
        try:
            self.tracker.log_epoch(self.run_id, record)
        except Exception as error:  # noqa: BLE001 - whatever ails the tracker, training goes on
            # The checkpoint holds the record, and registering the fold logs what is missing.
            message = f"fold {self.drawn.fold}: the tracker did not answer ({error}); going on"
            print(message, file=sys.stderr, flush=True)

    def _mean_over_ranks(self, sums: list[float]) -> list[float]:
        import torch

        if self.world_size == 1:
            return sums
        tensor = torch.tensor(sums, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return [float(value) / self.world_size for value in tensor]

    def _validate(self) -> float | None:
        import numpy as np
        import torch

        from mshnet.data.batches import EpisodeDataset, load_batches
        from mshnet.engine import evaluate, network_predictor
        from mshnet.metrics import Counts, miou, sum_by_class

        if not self.validation_classes:
            return None
        if self.world_size > 1:
            # Each rank has batch statistics of its own; the checkpoint has rank 0's, so those are judged.
            for buffer in self.bare.buffers():
                torch.distributed.broadcast(buffer, src=0)
        self.bare.eval()
        size = self.training.global_batch
        batches = load_batches(
            EpisodeDataset(self.store, self.validation),
            [range(i, min(i + size, len(self.validation))) for i in range(0, len(self.validation), size)],
            self.config.compute.loader_processes,
        )
        local = np.zeros((2, len(self.validation_classes), 2), dtype=np.int64)
        if self.validation:
            # The bare module: a rank with fewer episodes must not wait for the others' gradients.
            predictor = network_predictor(Relation(self.bare, self.config.precision))
            outcome = evaluate({"network": predictor}, self.features, _on(batches, self.device))["network"]
            summed = sum_by_class(outcome.counts, outcome.class_ids, self.validation_classes)
            local = np.stack([summed.intersection, summed.union])
        tensor = torch.from_numpy(local).to(self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        intersection, union = tensor.cpu().numpy()
        return miou(Counts(intersection, union))

    def _report(self, score: float) -> None:
        """A checkpoint counts once every rank has reported; rank 0 writes it."""
        import ray.train
        import torch

        metrics = {"score": score, "step": self.progress.step}
        if self.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save(
                {
                    "relation": self.bare.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    # Frozen, but where it was calibrated the last bits are this machine's.
                    "backbone_buffers": dict(self.backbone.named_buffers()),
                },
                Path(folder, STATE_FILE),
            )
            Path(folder, PROGRESS_FILE).write_text(self.progress.to_text())
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _restored(self) -> Progress:
        import ray.train
        import torch

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return Progress()
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, STATE_FILE), map_location=self.device, weights_only=True)
            progress = Progress.from_json(json.loads(Path(folder, PROGRESS_FILE).read_text()))
        self.bare.load_state_dict(state["relation"])
        self.backbone.load_state_dict(state["backbone_buffers"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.rank == 0:
            print(f"fold {self.drawn.fold}: going on from update {progress.step}", file=sys.stderr, flush=True)
        return progress


def positions(training: TrainingConfig, step: int, rank: int, world_size: int) -> range:
    """A rank's episodes of an update, as positions in the epoch: its part of the global batch."""
    batch = training.global_batch
    start = step % training.steps_per_epoch * batch + rank * batch // world_size
    return range(start, start + batch // world_size)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Of an update's dropout: another one for each step and each rank (below 1,009)."""
    # torch takes 64 bits; the factors are odd, so a step's value is another one for every seed.
    return ((seed * 1_000_003 + step) * 1_009 + rank) % 2**63


def _on(batches: Any, device: torch.device) -> Any:
    batch: EpisodeBatch
    for batch in batches:
        yield batch.to(device)
