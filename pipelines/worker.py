"""The per-worker training loop: resume, step, validate, report, checkpoint. Alone in using Ray Train's worker API."""

from __future__ import annotations

import itertools
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mshnet.config import TrainingConfig
from mshnet.errors import InputError, TrainingDivergedError
from pipelines import environment, storage
from pipelines.checkpoint_writer import BackgroundWriter, load_state, state_tensors
from pipelines.checkpoints import CHECKPOINTS, Checkpoints, Progress, fold_key
from pipelines.config import CrossValidationConfig
from pipelines.divergence import DivergenceGuard
from pipelines.drawn import EPISODES, PAIRS, DrawnTraining
from pipelines.metrics import FoldMetrics
from pipelines.network import Relation, build_network, inference_backbone
from pipelines.profile import StepProfiler
from pipelines.results import EpochRecord
from pipelines.tracking import Tracker
from pipelines.validation import Validation
from pipelines.watch import Watch

if TYPE_CHECKING:
    from torch import nn

    from mshnet.data.batches import EpisodeBatch
    from mshnet.data.episodes import Episode
    from mshnet.engine import Part
    from mshnet.parallel import Share

SEEDS_APART = 1_009
"""Between the dropout seeds of two updates."""


@dataclass(frozen=True)
class _EpochEpisodes:
    sampler: Any
    epoch: int

    def __getitem__(self, position: int) -> Episode[int]:
        episode: Episode[int] = self.sampler.episode(self.epoch, position)
        return episode


def train_loop(job: Mapping[str, Any]) -> None:
    """One worker's life. `job` holds the configuration, the drawn fold, its folder and MLflow run, as JSON values.

    Raises InputError and TrainingDivergedError, which another try would meet again.
    """
    config = CrossValidationConfig.from_json(job["config"])
    drawn = DrawnTraining.from_json(job["drawn"])
    _silence_reports()
    storage.silence()
    try:
        environment.check()
        with ExitStack() as ending:
            _Worker(config, drawn, job["folder"], job["run_id"], ending).run()
    except (InputError, TrainingDivergedError):
        # Ray Train would log the traceback; the message says it all.
        logging.getLogger("ray.train.v2._internal.util").setLevel(logging.CRITICAL)
        raise


def _silence_reports() -> None:
    """Ray Train logs each of them; in a worker by a logger named after its file, which no setting of its reaches."""
    from ray.train.v2._internal.execution import context

    for logger in ("ray.train", context.__file__):
        logging.getLogger(logger).setLevel(logging.WARNING)


class _Worker:
    def __init__(
        self, config: CrossValidationConfig, drawn: DrawnTraining, folder: str, run_id: str, ending: ExitStack
    ) -> None:
        import ray.train.torch
        import torch

        from mshnet.data.batches import EpisodeLoader
        from mshnet.data.episodes import TrainingSampler
        from mshnet.data.store.images import ImageStore
        from mshnet.data.tables import read_episodes, read_pairs
        from mshnet.engine import make_optimizer
        from mshnet.features import FeatureCache
        from mshnet.parallel import share_of, synchronise_batch_norm

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.config, self.training, self.drawn, self.run_id = config, config.training, drawn, run_id
        self.share = share_of(self.training.episodes_per_part, self.rank, self.world_size)
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
        self.validation = Validation(validation, self.rank, self.world_size, self.training.global_batch)

        model = build_network(config, self.store).to(self.device)
        self.backbone, self.bare = model.backbone, model.relation
        _share_buffers(self.backbone, self.world_size)
        synchronise_batch_norm(self.bare)
        self.optimizer = make_optimizer(self.bare.parameters(), self.training)
        self.checkpoints = Checkpoints(storage.join(folder, CHECKPOINTS), fold_key(config, drawn))
        self.progress = self._restored()
        # After the backbone's own buffers are in place, of which it is made.
        backbone = inference_backbone(model.backbone, config.precision)
        self.features = FeatureCache(backbone, config.compute.feature_cache_bytes)
        module = _data_parallel(self.bare, self.world_size)
        undivided = self.world_size == 1 and self.training.parts_per_update == 1
        self.relation = Relation(module, config.precision, config.compute.compile, cuda_graphs=undivided)

        self.sums = torch.tensor(self.progress.sums, dtype=torch.float64, device=self.device)
        self.guard = DivergenceGuard(drawn.fold, self._episodes_of, config.compute.log_every_steps, self.device)
        processes = config.compute.loader_processes
        self.loader = ending.enter_context(EpisodeLoader(self.store, processes, self.device))
        self.writer = ending.enter_context(BackgroundWriter(self.checkpoints)) if self.rank == 0 else None
        self.tracker = Tracker(config.tracking_uri, config.experiment) if run_id else None
        self.watch = ending.enter_context(closing(self._watch())) if self.rank == 0 else None
        self.profiler = ending.enter_context(closing(self._profiler(folder))) if config.compute.profile else None

    def _watch(self) -> Watch:
        every, fold = self.config.compute.log_every_steps, self.drawn.fold
        metrics = FoldMetrics(self.config.dataset, fold, self.run_id)
        return Watch(self.tracker, self.run_id, fold, self.training, every, self.progress.step, metrics=metrics)

    def _profiler(self, folder: str) -> StepProfiler:
        return StepProfiler(storage.join(folder, "profile"), rank=self.rank, tracker=self.tracker, run_id=self.run_id)

    def _restored(self) -> Progress:
        """Rank 0 looks for the newest checkpoint; all load that one."""
        from ray.train.collective import broadcast_from_rank_zero

        newest = None
        if self.rank == 0:
            # First, so that nothing is written any more by workers of a job that was killed a moment ago.
            self.checkpoints.claim()
            storage.remove_orphans(self.checkpoints.folder)
            newest = self.checkpoints.newest()
        name, crc32 = broadcast_from_rank_zero((newest[0], newest[1].crc32) if newest else ("", ""))
        if not name:
            return Progress()
        checkpoint = newest[1] if newest else self.checkpoints.read(name)
        if checkpoint.crc32 != crc32:
            raise RuntimeError(f"expected {name} as rank 0 read it ({crc32}), found another ({checkpoint.crc32})")
        load_state(checkpoint.tensors, self.bare, self.optimizer, self.backbone)
        self._say(f"going on from update {checkpoint.progress.step} with {self.world_size} worker(s)")
        return checkpoint.progress

    def run(self) -> None:
        while self.progress.step < self.training.epochs * self.training.steps_per_epoch:
            self._epoch(self.progress.step // self.training.steps_per_epoch)
        if self.writer:
            self.writer.wait()

    def _epoch(self, epoch: int) -> None:
        training, every = self.training, self.config.compute.checkpoint_every_steps
        steps = range(self.progress.step, (epoch + 1) * training.steps_per_epoch)
        episodes = _EpochEpisodes(self.sampler, epoch)
        wanted = [own for step in steps for own in own_positions(training, step, self.share)]
        batches = self.loader.batches(episodes, wanted)
        self.bare.train()
        started, trained_s = time.monotonic(), self.progress.train_s
        for step in steps:
            self._update(step, batches)
            done = step + 1
            if every and done % every == 0 and done % training.steps_per_epoch:
                self._checkpoint_inside(done, trained_s + time.monotonic() - started)
        if self.watch:
            self.watch.pause()
        self.guard.look(steps.stop - 1)
        elapsed = time.monotonic() - started
        self._finish_epoch(epoch, steps, elapsed, trained_s + elapsed)

    def _update(self, step: int, batches: Iterator[EpisodeBatch]) -> None:
        from mshnet.engine import train_step

        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate_at(step)
        update = train_step(
            self.relation,
            self.features,
            self._parts(batches),
            self.optimizer,
            self.training.inner_weight,
            dropout_seed(self.training.seed, step),
            self.guard.stopped,
        )
        self.sums += update.losses
        self.guard.after(step, update)
        if self.watch:
            self.watch.update(step + 1, update.losses, self.loader.waited_s)
        if self.profiler:
            self.profiler.step()

    def _parts(self, batches: Iterator[EpisodeBatch]) -> Iterator[Part]:
        from mshnet.engine import Part

        for batch in itertools.islice(batches, self.training.parts_per_update):
            yield Part(batch, self.share)

    def _checkpoint_inside(self, done: int, train_s: float) -> None:
        self.guard.look(done - 1)
        self.progress = Progress(step=done, history=self.progress.history, sums=self.sums.tolist(), train_s=train_s)
        if self.writer:
            self.writer.offer(self.progress, self._state())

    def _finish_epoch(self, epoch: int, steps: range, elapsed: float, train_s: float) -> None:
        import ray.train

        training = self.training
        self.bare.eval()
        # Not through DDP: a rank with fewer episodes must not wait for the others.
        relation = self.relation if self.world_size == 1 else Relation(self.bare, self.config.precision)
        validated = self.validation.miou(relation, self.features, self.loader, self.device)
        total, outer, inner = (value / training.steps_per_epoch for value in self.sums.tolist())
        self.sums.zero_()
        record = EpochRecord(
            epoch=epoch + 1,
            step=steps.stop,
            loss=total,
            outer_loss=outer,
            inner_loss=inner,
            learning_rate=training.learning_rate_at(steps.stop - 1),
            episodes_per_s=len(steps) * training.global_batch / elapsed,
            validation_miou=validated,
        )
        self.progress = Progress(step=steps.stop, history=[*self.progress.history, record], train_s=train_s)
        if self.writer:
            self.writer.put(self.progress, self._state())
        score = float("nan") if validated is None else validated
        ray.train.report({"epoch": record.epoch, "step": record.step, "loss": total, "validation_miou": score})
        if self.rank == 0:
            self._log(record)

    def _log(self, record: EpochRecord) -> None:
        tail = "" if record.validation_miou is None else f", validation mIoU {100 * record.validation_miou:.1f}"
        self._say(
            f"epoch {record.epoch}/{self.training.epochs}, loss {record.loss:.4f}, "
            f"{record.episodes_per_s:.1f} episodes/s{tail}"
        )
        if self.watch:
            # Should the tracker not take it: the checkpoint holds it, and registering the fold logs what is missing.
            self.watch.epoch(record)

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(f"fold {self.drawn.fold}: {text}", file=sys.stderr, flush=True)

    def _state(self) -> dict[str, Any]:
        return state_tensors(self.bare, self.optimizer, self.backbone)

    def _episodes_of(self, step: int) -> list[str]:
        """The episodes of an update, of all ranks, by image ids."""
        epoch, contents = step // self.training.steps_per_epoch, self.store.contents()
        episodes = [self.sampler.episode(epoch, position) for position in positions(self.training, step)]
        named = []
        for episode in episodes:
            query, *supports = (contents[row][0] for row in episode.images)
            named.append(f"query {query}, supports {', '.join(supports)}, class {episode.class_id}, epoch {epoch + 1}")
        return named


def _share_buffers(backbone: nn.Module, world_size: int) -> None:
    """Rank 0's for all: calibrated on each, they may differ in their last bits, which a restart would take away."""
    from torch import distributed

    if world_size > 1:
        for buffer in backbone.buffers():
            distributed.broadcast(buffer, 0)


def _data_parallel(module: nn.Module, world_size: int) -> nn.Module:
    """On this worker's device, its gradients summed with the others' when there are any."""
    import ray.train.torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.15 on
        prepared: nn.Module = ray.train.torch.prepare_model(
            module, parallel_strategy_kwargs=data_parallel_options(world_size)
        )
    return prepared


def data_parallel_options(world_size: int) -> dict[str, Any]:
    """Of DistributedDataParallel."""
    return {
        # They follow from all ranks' episodes alike, so there is nothing to broadcast.
        "broadcast_buffers": False,
        # Else DDP lays its buckets anew after the first update; with them the order in which three and more workers
        # sum a gradient, so that the first update after a restart would differ in its last bits.
        "find_unused_parameters": world_size > 2,
    }


def positions(training: TrainingConfig, step: int) -> range:
    """The episodes of an update, as positions in its epoch."""
    start = step % training.steps_per_epoch * training.global_batch
    return range(start, start + training.global_batch)


def own_positions(training: TrainingConfig, step: int, share: Share) -> Sequence[range]:
    """A rank's episodes of an update: its share of each part, one part after the other."""
    update, part = positions(training, step), training.episodes_per_part
    return [update[start + share.start : start + share.stop] for start in range(0, len(update), part)]


def dropout_seed(seed: int, step: int) -> int:
    """Of an update's dropout: another one for each step."""
    # torch takes 64 bits; the factors are odd, so a step's value is another one for every seed.
    return ((seed * 1_000_003 + step) * SEEDS_APART) % 2**63
