"""The parts of a cross-validation's configuration: on what an epoch is chosen, a fold judged, and where it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mshnet.errors import InputError
from mshnet.protocols import EPISODES, Episodes, Ignore, Resize

ProtocolName = Literal["published", "published-5x1000", "published-10000", "balanced"]
"""The keys of `mshnet.protocols.EPISODES`."""
Selection = Literal["base", "novel", "last"]


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """On what the best epoch is chosen."""

    selection: Selection = "base"
    """base: episodes of base classes kept out of training; novel: the test episodes, as published (and every
    number made so is labelled); last: no choice, the last epoch."""
    held_out_classes: int = 3
    """Base classes kept out of training for the choice (with selection base); 0: a fifth of them, at least one."""
    validation_episodes: int = 200
    """Episodes per validation (with selection novel: all the test episodes)."""

    def __post_init__(self) -> None:
        if self.selection not in ("base", "novel", "last"):
            raise InputError(f"selection must be base, novel or last, got {self.selection!r}")
        if self.held_out_classes < 0 or self.validation_episodes < 1:
            raise InputError(
                "held_out_classes must be 0 or more and validation_episodes 1 or more, got "
                f"{self.held_out_classes} and {self.validation_episodes}"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """On what a fold is judged."""

    protocol: ProtocolName = "published"
    """Test episodes by name: published (the very draws of the published evaluation, 1,000), published-5x1000 (the
    same from five seeds), published-10000, or balanced (classes in turn, supports distinct, 1,000)."""
    evaluation_episodes: int = 0
    """Episodes per fold and seed; 0: as many as the protocol has."""
    evaluation_seeds: tuple[int, ...] = ()
    """Of the draws; none: the protocol's own. The official episodes are the published draw's of seed 0."""
    evaluation_shots: tuple[int, ...] = ()
    """Numbers of supports with which the trained network is judged beside --shot."""
    resize: Resize = "square"
    """square: judged at the training size, as published; original: the prediction is resized to the query's own
    size and compared with the mask as it was annotated."""
    ignored: Ignore = "excluded"
    """Pixels labelled 255: excluded from every count, as published, or counted as background."""
    threshold_episodes: int = 200
    """Base-class episodes on which the training-free baseline's threshold is chosen."""
    panels_each: int = 3
    """Pictured episodes: so many of the best, the median, the worst, and of each kind of failure."""
    bootstrap_samples: int = 2000
    """Resamplings of the episodes from which confidence intervals come."""
    evaluation_batch: int = 8
    """Episodes that go through the network at once; rounding depends on it."""

    def __post_init__(self) -> None:
        if self.protocol not in EPISODES:
            raise InputError(f"protocol must be one of {', '.join(EPISODES)}, got {self.protocol!r}")
        if self.resize not in ("square", "original"):
            raise InputError(f"resize must be square or original, got {self.resize!r}")
        if self.ignored not in ("excluded", "background"):
            raise InputError(f"ignored must be excluded or background, got {self.ignored!r}")
        if self.evaluation_episodes < 0:
            raise InputError(
                f"evaluation_episodes must be 1 or more, or 0 for the protocol's own, got {self.evaluation_episodes}"
            )
        seeds, shots = self.evaluation_seeds, self.evaluation_shots
        if len(set(seeds)) != len(seeds) or not all(0 <= seed < 1 << 32 for seed in seeds):
            raise InputError(f"evaluation_seeds must be distinct and 0..2^32 - 1, got {seeds}")
        if len(set(shots)) != len(shots) or not all(shot >= 1 for shot in shots):
            raise InputError(f"evaluation_shots must be distinct and 1 or more, got {shots}")
        for name in ("threshold_episodes", "panels_each", "bootstrap_samples", "evaluation_batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")

    @property
    def episodes(self) -> Episodes:
        """The protocol's test episodes, with another number or other seeds where they are given."""
        known = EPISODES[self.protocol]
        return Episodes(known.draw, self.evaluation_episodes or known.episodes, self.evaluation_seeds or known.seeds)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """On what it runs. Changes no number beyond rounding, so it is part of no fingerprint."""

    workers: int = 1
    """Ray Train workers per fold; they share the global batch and its batch-norm statistics."""
    min_workers: int = 0
    """Elastic: go on with as few as this when a node is lost, with more when one comes; 0: always `workers`."""
    elastic_check_s: float = 60.0
    """How often an elastic fold looks for more room, seconds."""
    cpus_per_worker: int = 1
    """CPU cores of a worker."""
    use_gpu: bool = False
    """One GPU per worker (nccl); otherwise CPU (gloo)."""
    loader_processes: int = 0
    """Processes per worker that read and decode; 0: the worker itself."""
    feature_cache_gib: float = 4.0
    """Memory per CPU worker for features of the frozen backbone, GiB; 0 computes them anew each time. On a GPU a
    training always does, where the backbone is quick and memory dear; an evaluation takes up to a quarter of it."""
    feature_spill_gib: float = 16.0
    """Disk per node for an evaluation's features beyond feature_cache_gib, GiB; 0: none."""
    evaluation_workers: int = 0
    """Ray workers that judge a fold; 0: as many as `workers`."""
    max_failures: int = 3
    """Times that a fold is started again from its last checkpoint after a lost worker, without getting any further."""
    checkpoint_every_steps: int = 200
    """Checkpoint also inside an epoch, every so many updates; 0: at the end of each epoch only."""
    compile: bool = False
    """Compile the learnable part (torch.compile): minutes at the start, quicker updates. With CUDA graphs on a GPU,
    where one worker trains a fold and statistics_batch is the global batch; otherwise without."""
    profile: bool = False
    """Trace some updates of each fold: a trace file and a table of where the time goes."""
    log_every_steps: int = 20
    """Updates between two points of the tracker's live curves; on a GPU also between two looks at the loss."""
    ray_address: str = ""
    """Of a running cluster; empty: the one that the environment names, else a local one."""
    any_versions: bool = False
    """On a cluster: also where nodes have other packages than requirements.lock or other code than this; their
    numbers may be others."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.cpus_per_worker < 1:
            raise InputError(
                f"workers and cpus_per_worker must be 1 or more, got {self.workers} and {self.cpus_per_worker}"
            )
        if not 0 <= self.min_workers <= self.workers:
            raise InputError(f"min_workers must be 0..workers ({self.workers}), got {self.min_workers}")
        for name in (
            "loader_processes",
            "feature_cache_gib",
            "feature_spill_gib",
            "evaluation_workers",
            "max_failures",
            "checkpoint_every_steps",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.log_every_steps < 1 or not 0 < self.elastic_check_s < math.inf:
            raise InputError(
                "log_every_steps must be 1 or more and elastic_check_s above 0, got "
                f"{self.log_every_steps} and {self.elastic_check_s}"
            )

    @property
    def feature_cache_bytes(self) -> int:
        """What `feature_cache_gib` comes to."""
        return 0 if self.use_gpu else int(self.feature_cache_gib * 2**30)

    @property
    def feature_spill_bytes(self) -> int:
        """What `feature_spill_gib` comes to."""
        return int(self.feature_spill_gib * 2**30)
