"""One worker of an evaluation: networks, episodes and features, held between the batches that it is given."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mshnet.errors import InputError
from pipelines import environment, storage
from pipelines.config import CrossValidationConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mshnet.baselines import ThresholdCounts
    from mshnet.data.episodes import Episode
    from mshnet.data.store.images import ImageStore
    from mshnet.engine import Predictor
    from mshnet.features import CacheUse
    from mshnet.outcomes import Outcomes
    from pipelines.results import EpisodeOutcome

TRAINED = "trained"
GPU_SHARE = 0.25
"""Of a GPU's memory, which features take at most."""


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """What all workers of a fold's evaluation have in common."""

    config: CrossValidationConfig
    store: str
    """URI of the images."""
    model: str
    """Folder of the trained network, a URI."""
    lists: tuple[tuple[Episode[int], ...], ...]
    """Test lists; the first ones are of the main number of supports."""
    base: tuple[Episode[int], ...]
    """Of base classes, for the baseline's threshold."""
    again: frozenset[int]
    """Rows that are needed more than once."""
    share: bool
    """Whether there are other workers, which may be on the same node."""


@dataclass(frozen=True)
class Unit:
    """Episodes of a list that are judged in one call: whole batches, so that rounding knows nothing of who does it."""

    test: int
    """Which of the job's lists."""
    episodes: range
    with_baselines: bool
    threshold: float
    """Of the prototype baseline."""


class EvaluationWorker:
    """Cheap to make, so that what goes wrong does so in a call; `prepare` first."""

    def __init__(self, job: EvaluationJob) -> None:
        self.job = job
        self._ending = ExitStack()

    def prepare(self) -> None:
        """Load what is needed. Raises InputError where there is no GPU to be had, and as store and model do."""
        import torch

        from mshnet.checkpoint import load_model
        from mshnet.data.batches import EpisodeLoader
        from mshnet.data.store.images import ImageStore
        from mshnet.features import FeatureCache
        from mshnet.judging import Judging
        from pipelines.network import Relation, build_network, inference_backbone

        environment.check()
        storage.silence()
        config = self.job.config
        torch.set_num_threads(config.compute.cpus_per_worker)
        device = _device(config)
        self.store = ImageStore(self.job.store)
        model = load_model(self.job.model, config.model).to(device).eval()
        untrained = build_network(config).to(device).eval()
        self.bare = model.relation
        self.relation = Relation(model.relation, config.precision)
        self.untrained = Relation(untrained.relation, config.precision)
        self.judging = Judging(config.evaluation.resize, config.evaluation.ignored, self.store)
        # As in training and validation, and for everything that is judged here.
        backbone = inference_backbone(model.backbone, config.precision)
        self.features = FeatureCache(
            backbone,
            _memory_bytes(config, device),
            _files(config, self.store, model.backbone, self._ending),
            share=self.job.share,
            again=self.job.again,
            image_by_image=True,
        )
        loader = EpisodeLoader(self.store, config.compute.loader_processes, device)
        self.loader = self._ending.enter_context(loader)

    def threshold_counts(self, episodes: range) -> ThresholdCounts:
        """What each threshold of the prototype baseline gives on some of the base classes' episodes."""
        from mshnet.baselines import threshold_counts

        return threshold_counts(self.features, self.loader.batches(self.job.base, self._batches(episodes)))

    def judge(self, unit: Unit) -> tuple[Mapping[str, Outcomes], CacheUse]:
        """Outcomes by predictor, and where the features came from."""
        from mshnet.engine import evaluate

        before = self.features.use
        batches = self.loader.batches(self.job.lists[unit.test], self._batches(unit.episodes))
        outcomes = evaluate(self._predictors(unit), self.features, batches, self.judging)
        return outcomes, self.features.use - before

    def draw_pictures(self, folder: str, outcomes: Outcomes) -> list[EpisodeOutcome]:
        """Pictures of some episodes of the first list, by what the trained network made of them."""
        from mshnet.engine import network_predictor
        from pipelines import pictures

        predict = network_predictor(self.relation)
        episodes = self.job.lists[0]
        return pictures.draw_pictures(
            self.job.config, folder, self.loader, episodes, outcomes, predict, self.features, self.bare
        )

    def close(self) -> None:
        """End the loader's processes, and leave the features' files to the others, or to nobody."""
        self._ending.close()

    def _batches(self, episodes: range) -> list[range]:
        size = self.job.config.evaluation.evaluation_batch
        return [episodes[i : i + size] for i in range(0, len(episodes), size)]

    def _predictors(self, unit: Unit) -> dict[str, Predictor]:
        from mshnet.baselines import foreground, prototype_threshold
        from mshnet.engine import network_predictor

        predictors: dict[str, Predictor] = {TRAINED: network_predictor(self.relation)}
        if unit.with_baselines:
            predictors |= {
                "untrained": network_predictor(self.untrained),
                "foreground": foreground,
                "prototype": prototype_threshold(unit.threshold),
            }
        return predictors


def _device(config: CrossValidationConfig) -> torch.device:
    import torch

    if config.compute.use_gpu and not torch.cuda.is_available():
        raise InputError("expected a GPU for the evaluation, found none that torch can use; leave out --use-gpu")
    return torch.device("cuda" if config.compute.use_gpu else "cpu")


def _memory_bytes(config: CrossValidationConfig, device: torch.device) -> int:
    import torch

    wanted = int(config.compute.feature_cache_gib * 2**30)
    if device.type == "cuda":
        return min(wanted, int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory))
    return wanted


def _files(config: CrossValidationConfig, store: ImageStore, backbone: nn.Module, ending: ExitStack) -> Any:
    """The second tier; none on a GPU, which by estimate computes features sooner than a disk gives them."""
    from mshnet.feature_files import FeatureFiles

    compute = config.compute
    if compute.use_gpu or not compute.feature_spill_bytes:
        return None
    key = feature_key(backbone, config.precision, compute.cpus_per_worker, store)
    files = FeatureFiles.on_this_node(key, compute.feature_spill_bytes)
    if files is not None:
        ending.callback(files.close)
    return files


def feature_key(backbone: nn.Module, precision: str, threads: int, store: ImageStore) -> str:
    """Names all that the bits of an image's features depend on, beside the image's row."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    shards = [shard.sha256 for shard in store.manifest.shards]
    return " ".join([digest.hexdigest(), precision, str(threads), torch.__version__, *shards])


def rows_needed_again(lists: Sequence[Sequence[Episode[int]]]) -> frozenset[int]:
    """Rows that the lists name more than once."""
    seen: set[int] = set()
    again: set[int] = set()
    for episodes in lists:
        for episode in episodes:
            for row in episode.images:
                (again if row in seen else seen).add(row)
    return frozenset(again)
