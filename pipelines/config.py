"""The cross-validation's configuration: one definition for flags, JSON files, fingerprints and the tracker."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import tyro

from mshnet.config import ImageFormat, ModelConfig, TrainingConfig
from mshnet.data.folds import DATASETS, FOLDS, OWN_DATASETS, check_fold
from mshnet.data.own import OwnData
from mshnet.errors import InputError
from mshnet.protocols import EPISODES, Episodes, Ignore, Resize
from pipelines.results import Record

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


@dataclass(frozen=True, kw_only=True)
class CrossValidationConfig(Record):
    """Everything about one cross-validation."""

    dataset: Literal["pascal", "coco", "shapes", "coco-json", "voc", "fss"] = "shapes"
    """pascal (VOC layout), coco (2014 layout), shapes (generated pictures in the VOC layout), or your own data:
    coco-json (--images, --annotations), voc (label PNGs: --images, --masks, --class-list), fss (a folder a class)."""
    source: str = "outputs/shapes"
    """Folder or URI of the data set; with shapes, where the pictures are generated if they are not there. Of your own
    data --images says it."""
    store: str = "outputs/store"
    """Folder or URI for everything durable: images, episodes, checkpoints, results."""
    tracking_uri: str = ""
    """MLflow: an SQLite file or a server's address; empty: what MLFLOW_TRACKING_URI names, else
    sqlite:///outputs/mlflow.db."""
    experiment: str = "mshnet"
    """MLflow experiment."""
    registered_model: str = ""
    """Name in the model registry; empty: ARCHITECTURE-DATASET-BACKBONE-Kshot, of your own data with --data-name."""
    split_lists: str = ""
    """Folder with the field's lists (pascal/ and coco/, or trn/ and val/); empty: derived by rule from the masks."""
    folds: tuple[int, ...] = (0, 1, 2, 3)
    """Folds to run, of 0 1 2 3; of your own data of as many as --fold-count says, all unless some are named."""
    trained: tuple[str, ...] = ()
    """Model folders (paths or URIs) to judge instead of training: one for each of --folds in their order, or one for
    all. Network and image size are the folders' own; every number is labelled, as their training is not known."""
    shot: int = 1
    """Supports per episode (k)."""
    remove_novel: Literal["auto", "yes", "no"] = "auto"
    """Leave training images out that show a novel class; auto: yes, except for coco (as published)."""
    min_object_px: int = 2048
    """Smallest object for lists derived by rule, pixels at original size."""
    skip_small_classes: bool = False
    """Leave classes out that have fewer than shot + 1 images, and say so beside every number; else they are an
    error."""
    images_per_shard: int = 2000
    """Images in one file of the store (473 px: about 120 kB each, masks included)."""
    backbone_weights: str = "imagenet"
    """imagenet (torchvision's, downloaded once), random (from the seed, batch norm fitted to training images), or a
    path or URI of safetensors or a torch state dict."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the backbone's features and of the learnable part, in training, validation and evaluation (bfloat16: the
    latter under autocast). The learnable weights stay float32, and so is all of the registered model when served."""
    own: OwnData = field(default_factory=OwnData)
    images: ImageFormat = field(default_factory=ImageFormat)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        known = (*DATASETS, *OWN_DATASETS)
        if self.dataset not in known:
            raise InputError(f"dataset must be one of {', '.join(known)}, got {self.dataset!r}")
        self._check_own()
        for fold in self.folds:
            check_fold(fold, self.fold_total)
        if not self.folds or len(set(self.folds)) != len(self.folds):
            raise InputError(f"folds must be distinct and at least one of 0..{self.fold_total - 1}, got {self.folds}")
        if len(self.trained) not in (0, 1, len(self.folds)):
            raise InputError(
                f"trained must be one model folder, or one for each of {len(self.folds)} folds, got {len(self.trained)}"
            )
        if self.shot < 1:
            raise InputError(f"shot must be 1 or more, got {self.shot}")
        for what, name in (("registered_model", self.registered_model), ("data_name", self.own.data_name)):
            if set(name) & set("/:'`") or (name and not name.strip(". ")):
                raise InputError(f"{what} must be a name without / : ' ` and not of dots only, got {name!r}")
        if self.images_per_shard < 1 or self.min_object_px < 1:
            raise InputError(
                "images_per_shard and min_object_px must be 1 or more, got "
                f"{self.images_per_shard} and {self.min_object_px}"
            )
        if self.compute.workers > self.training.episodes_per_part:
            raise InputError(
                "every worker needs an episode of each part of the global batch: workers must be at most "
                f"{self.training.episodes_per_part}, got {self.compute.workers}"
            )

    def _check_own(self) -> None:
        if not self.is_own:
            if self.own != OwnData():
                raise InputError(
                    f"--images, --annotations, --classes, --fold-count and the like are for one's own data (--dataset "
                    f"{', '.join(OWN_DATASETS)}), got them with dataset {self.dataset}; leave them out"
                )
            return
        if self.own.fold_count < 1:
            raise InputError(f"fold_count must be 1 or more, got {self.own.fold_count}")
        if self.split_lists:
            raise InputError(f"split_lists are the field's, of pascal and coco; leave them out with {self.dataset}")
        if self.evaluation.episodes.draw != "balanced":
            raise InputError(
                f"protocol must be balanced with {self.dataset}, got {self.evaluation.protocol!r}: what is published "
                "are draws from pascal and coco"
            )

    @property
    def is_own(self) -> bool:
        """Whether the classes and folds are the user's, not the field's."""
        return self.dataset in OWN_DATASETS

    @property
    def fold_total(self) -> int:
        """How many folds the classes are divided into, whichever of them are run."""
        return self.own.fold_count if self.is_own else FOLDS

    @property
    def data_title(self) -> str:
        """The data set's name for people, runs and models."""
        return self.own.data_name or self.dataset

    @property
    def removes_novel(self) -> bool:
        """Whether training leaves out images that show a novel class."""
        return self.remove_novel == "yes" or (self.remove_novel == "auto" and self.dataset != "coco")

    @property
    def selection(self) -> str:
        """base, novel, last, or given: of weights that were not trained here nothing is chosen."""
        return "given" if self.trained else self.validation.selection

    def given_model(self, fold: int) -> str:
        """The folder of --trained that is judged on a fold."""
        return self.trained[self.folds.index(fold) if len(self.trained) > 1 else 0]

    @property
    def test_shots(self) -> tuple[int, ...]:
        """Numbers of supports of the test episodes: `shot`, then the others that are asked for."""
        return (self.shot, *(shot for shot in self.evaluation.evaluation_shots if shot != self.shot))

    @property
    def model_name(self) -> str:
        """Name in the model registry."""
        if self.registered_model:
            return self.registered_model
        # One similarity alone is another network: its versions and aliases stand apart.
        alone = "" if self.model.similarity == "both" else f"-{self.model.similarity}"
        alone += "-given" if self.trained else ""
        return f"{self.model.architecture}-{self.data_title}-{self.model.backbone}{alone}-{self.shot}shot"


def fingerprint(*parts: Any) -> str:
    """Twelve hexadecimal digits that change when any part does. Parts are JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def judging_key(config: CrossValidationConfig) -> list[Any]:
    """What an evaluation's result depends on beside weights and drawn episodes: part of its stage's fingerprint."""
    judged = config.evaluation
    settings = (judged.evaluation_batch, judged.bootstrap_samples, judged.panels_each)
    return [judged.resize, judged.ignored, *settings]


@dataclass(frozen=True, kw_only=True)
class JobArguments:
    """What the command line of the job and of its stages takes beside the configuration."""

    recipe: Literal["default", "paper", "published", "quick", "demo"] = "default"
    """Where the defaults come from: paper or published (the authors' code), days on a GPU a fold; quick (without a
    cluster: an hour or less on one GPU, an evening on a laptop); demo (generated pictures, five minutes)."""
    config: str = ""
    """A JSON file of a configuration (or part of one), replayed; flags win over it."""
    dry_run: bool = False
    """Print the graph, what is done and what would run, and stop."""
    cross_validation: CrossValidationConfig = field(default_factory=CrossValidationConfig)


T = TypeVar("T", bound=JobArguments)


def parse(kind: type[T], argv: Sequence[str] | None, prog: str, description: str) -> T:
    """Flags to arguments. Exits with 2 and one line on stderr on bad usage, with 0 after --help."""
    from pipelines import recipes

    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        file = _peek(argv, "--config")
        recorded = _read_json(file) if file else {}
        dataset = _peek(argv, "--dataset") or str(recorded.get("dataset", ""))
        recipe = recipes.named(_peek(argv, "--recipe") or "default", dataset)
        defaults = replay(recipe, _with_folds(recipe, recorded, argv))
        return tyro.cli(
            kind,
            args=argv,
            prog=prog,
            description=description,
            default=kind(cross_validation=defaults),
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except InputError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _peek(argv: Sequence[str], flag: str) -> str | None:
    # Recipe and file decide the defaults that the real parser shows, so they are looked at before it.
    for i, arg in enumerate(argv):
        if arg == flag and i + 1 < len(argv):
            return argv[i + 1]
        if arg.startswith(flag + "="):
            return arg.split("=", 1)[1]
    return None


def _with_folds(recipe: CrossValidationConfig, recorded: Mapping[str, Any], argv: Sequence[str]) -> Mapping[str, Any]:
    """What was recorded, with as many folds of one's own data as the flags or the file of --classes say.

    The file of --classes wins over a number that was recorded, and loses against --fold-count, as any flag wins;
    where the two differ, the scan refuses.
    """
    own = recorded.get("own", {})
    if not recipe.is_own or not isinstance(own, Mapping):
        return recorded
    count = _peek(argv, "--fold-count") or ""
    if not count.isdigit():
        from mshnet.data.class_choice import read_class_choice

        classes = _peek(argv, "--classes")
        file = str(own.get("classes", "")) if classes is None else classes
        count = str(len(read_class_choice(file).folds) or own.get("fold_count", recipe.own.fold_count))
    before = own.get("fold_count", recipe.own.fold_count)
    changes = {**recorded, "own": {**own, "fold_count": int(count)}}
    if isinstance(before, int) and recorded.get("folds", list(range(before))) == list(range(before)):
        changes["folds"] = list(range(int(count)))  # all of them were asked for
    return changes


def _read_json(path: str) -> Mapping[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"no configuration file {path!r}; give a JSON file that a run recorded") from error
    except ValueError as error:
        raise InputError(f"expected JSON in {path!r}: {error}") from error
    if not isinstance(data, Mapping):
        raise InputError(f"expected an object in {path!r}, found {type(data).__name__}")
    return data


def replay(defaults: CrossValidationConfig, changes: Mapping[str, Any]) -> CrossValidationConfig:
    """The defaults with a (partial, nested) JSON configuration over them. Unknown keys fail."""
    return CrossValidationConfig.from_json(_merged(defaults.to_json(), changes))


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        nested = isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
        merged[key] = _merged(old[key], value) if nested else value
    return merged
