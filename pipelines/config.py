"""The cross-validation's configuration: one definition for flags, JSON files, fingerprints and the tracker."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import tyro

from mshnet.config import ImageFormat, ModelConfig, TrainingConfig
from mshnet.data.folds import DATASETS, FOLDS, OWN_DATASETS, check_fold
from mshnet.data.own import OwnData
from mshnet.errors import InputError
from pipelines.results import Record
from pipelines.settings import ComputeConfig as ComputeConfig
from pipelines.settings import EvaluationConfig as EvaluationConfig
from pipelines.settings import ProtocolName as ProtocolName
from pipelines.settings import ValidationConfig as ValidationConfig


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
    """Where the defaults come from: paper or published (the authors' code), which take days; quick (without a cluster:
    one GPU, or a laptop's evening); demo (generated pictures, five minutes)."""
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
