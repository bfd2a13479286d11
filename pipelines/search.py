"""What a search tries, how its trials compare, and the recipe that comes out: the parts that need no cluster."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal, TypeVar

from mshnet.config import TrainingConfig
from mshnet.errors import InputError
from pipelines.config import CrossValidationConfig
from pipelines.results import Record

Schedule = Literal["exponential", "step", "cosine", "constant"]
Status = Literal["running", "complete", "stopped", "diverged", "failed"]
CODE_VERSION = 1
"""Raise it when the same search would try other values or stop other trials."""
STATUSES: tuple[Status, ...] = ("complete", "stopped", "diverged", "failed", "running")
ENDED: tuple[Status, ...] = ("complete", "stopped", "diverged")
"""A trial in one of these is not run again; a failed one is."""

WEIGHTS_BY_NAME = ("imagenet", "random")
"""Values of backbone_weights that are no place."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Record):
    """What is tried, and how soon a poor trial is stopped."""

    trials: int = 20
    """Configurations to try; the first is the one given, so the result is never worse than it."""
    concurrency: int = 0
    """Trials at a time; 0: as many as the cluster has room for. At 1 a search's course is reproducible."""
    grace_epochs: int = 1
    """Epochs that every trial gets before it may be stopped."""
    reduction_factor: float = 3.0
    """After grace_epochs x 1, this, this squared, ... epochs only the best 1/this of the trials go on; above 1."""
    learning_rate_range: tuple[float, float] = (0.001, 0.1)
    """Lowest and highest, tried evenly in the logarithm (paper: 0.01, published code: 0.025)."""
    weight_decay_range: tuple[float, float] = (0.00001, 0.001)
    """Lowest and highest, tried evenly in the logarithm (paper: 0.0005, published code: 0.00005)."""
    inner_weight_range: tuple[float, float] = (0.1, 0.6)
    """Lowest and highest (paper: 1/3, published code: 0.3)."""
    batch_choices: tuple[int, ...] = (4, 8, 16)
    """Values of global_batch (paper: 8, published code: 11 and 14)."""
    schedule_choices: tuple[Schedule, ...] = ("exponential", "cosine")
    """Of exponential, step, cosine, constant. Between exponential and step, decay keeps its speed."""
    search_seed: int = 0
    """Of the values tried."""

    def __post_init__(self) -> None:
        for name in ("trials", "grace_epochs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.concurrency < 0 or self.search_seed < 0:
            raise InputError(
                f"concurrency and search_seed must be 0 or more, got {self.concurrency} and {self.search_seed}"
            )
        if not 1 < self.reduction_factor < math.inf:
            raise InputError(f"reduction_factor must be above 1 and finite, got {self.reduction_factor}")
        for name in ("learning_rate_range", "weight_decay_range", "inner_weight_range"):
            low, high = getattr(self, name)
            if not (low <= high < math.inf and (low > 0 or (low == 0 and name == "inner_weight_range"))):
                bound = "0 or more" if name == "inner_weight_range" else "above 0"
                raise InputError(f"{name} must be two finite numbers {bound}, the lower first, got {low} {high}")
        for name in ("batch_choices", "schedule_choices"):
            found = getattr(self, name)
            if not found or len(set(found)) != len(found):
                raise InputError(f"{name} must be distinct and at least one, got {found}")


@dataclass(frozen=True, kw_only=True)
class Values(Record):
    """What a trial tries: fields of TrainingConfig, by the same names."""

    learning_rate: float
    weight_decay: float
    inner_weight: float
    global_batch: int
    schedule: Schedule


def values_of(search: SearchConfig, start: TrainingConfig, trial: int) -> Values:
    """A trial's values, a pure function of (search, start, trial); trial 0 is the start itself.

    The others are points of a Halton sequence with scrambled digits: spread more evenly than independent draws,
    and more of them never move the earlier ones.
    """
    if trial == 0:
        return Values(
            learning_rate=start.learning_rate,
            weight_decay=start.weight_decay,
            inner_weight=start.inner_weight,
            global_batch=start.global_batch,
            schedule=start.schedule,
        )
    rate, decay, inner, batch, schedule = (_halton(trial, base, search.search_seed) for base in (2, 3, 5, 7, 11))
    low, high = search.inner_weight_range
    return Values(
        learning_rate=_between_logarithms(search.learning_rate_range, rate),
        weight_decay=_between_logarithms(search.weight_decay_range, decay),
        inner_weight=_short(low + (high - low) * inner),
        global_batch=_chosen(search.batch_choices, batch),
        schedule=_chosen(search.schedule_choices, schedule),
    )


def _halton(index: int, base: int, seed: int) -> float:
    """The index's digits in a base, mirrored at the point, each place's digits permuted by the seed: 0 to below 1."""
    value, place, weight = 0.0, 0, 1.0 / base
    while weight > 1e-9:
        index, digit = divmod(index, base)
        draw = Random(f"{seed} {base} {place}").random
        value += sorted(range(base), key=lambda _: draw())[digit] * weight
        place, weight = place + 1, weight / base
    return min(value, 1 - 1e-9)


def _between_logarithms(bounds: tuple[float, float], point: float) -> float:
    low, high = bounds
    return min(max(_short(low * (high / low) ** point), low), high)


def _short(value: float) -> float:
    # A recipe is read by people, and the fourth digit of a learning rate means nothing.
    return float(f"{value:.3g}")


def _chosen(choices: Sequence[T], point: float) -> T:
    return choices[int(point * len(choices))]


def applied(config: CrossValidationConfig, values: Values) -> CrossValidationConfig:
    """The configuration with a trial's values. Raises InputError for values that do not fit the rest."""
    training = config.training
    changes: dict[str, Any] = values.to_json()
    if values.schedule != training.schedule:
        # decay is per epoch, except with step, where it is per decay_epochs.
        if training.schedule == "step":
            changes["decay"] = training.decay ** (1 / training.decay_epochs)
        elif values.schedule == "step":
            changes["decay"] = training.decay**training.decay_epochs
    return replace(config, training=replace(training, **changes))


def check(config: CrossValidationConfig, search: SearchConfig) -> None:
    """Whether every trial could be trained. Raises InputError before anything expensive."""
    if config.trained:
        raise InputError("a search trains, so it takes no weights that are trained already; leave --trained out")
    if config.validation.selection != "base":
        raise InputError(
            f"selection must be base for a search, got {config.validation.selection!r}: trials are compared on "
            "held-out base classes, never on the test fold's; give --selection base"
        )
    if search.grace_epochs > config.training.epochs:
        raise InputError(f"grace_epochs must be at most epochs ({config.training.epochs}), got {search.grace_epochs}")
    start = values_of(search, config.training, 0)
    for batch in search.batch_choices:
        try:
            applied(config, replace(start, global_batch=batch))
        except InputError as error:
            raise InputError(f"batch_choices: {batch} does not fit: {error}") from error


@dataclass(frozen=True, kw_only=True)
class TrialEpoch(Record):
    """One epoch that a trial reported."""

    fold: int
    epoch: int
    """Of the fold, from 1."""
    loss: float
    validation_miou: float
    """0 to 1 on episodes of held-out base classes; NaN where it is not defined."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord(Record):
    """A trial as far as it went: what lies on the store and is compared. Folds are trained one after the other."""

    number: int
    values: Values
    status: Status = "running"
    epochs: list[TrialEpoch] = field(default_factory=list)
    error: str = ""
    told: bool = False
    """Whether the tracker has taken the end; a driver that is killed leaves the trial's run open."""

    def knows(self, fold: int, epoch: int) -> bool:
        """Whether that epoch has been reported; one that is trained again after a crash is reported again."""
        return any((known.fold, known.epoch) == (fold, epoch) for known in self.epochs)

    @property
    def score(self) -> float | None:
        """Mean over the folds begun of the best epoch's validation mIoU, 0 to 1: the epoch that the job would keep.

        None before the first epoch.
        """
        best: dict[int, float] = {}
        for known in self.epochs:
            miou = 0.0 if math.isnan(known.validation_miou) else known.validation_miou
            best[known.fold] = max(best.get(known.fold, 0.0), miou)
        return sum(best.values()) / len(best) if best else None

    def with_epoch(self, epoch: TrialEpoch) -> TrialRecord:
        """This record with one epoch more."""
        return replace(self, epochs=[*self.epochs, epoch])

    def prefixes(self) -> Iterable[TrialRecord]:
        """This record as it stood after each of its epochs."""
        return (replace(self, epochs=self.epochs[:count]) for count in range(1, len(self.epochs) + 1))


def best(records: Iterable[TrialRecord]) -> TrialRecord | None:
    """Of the complete trials the one with the highest score, the earlier of equals; None without a complete one."""
    complete = [record for record in records if record.status == "complete"]
    return max(complete, key=lambda record: (record.score or 0.0, -record.number), default=None)


def ending(record: TrialRecord, longest: int) -> str:
    """How a trial ended, in a line; `longest` is the epochs of one that is not stopped."""
    score = "-" if record.score is None else f"{100 * record.score:.1f}"
    line = f"trial {record.number}: {record.status} after {len(record.epochs)} of {longest} epochs, mIoU {score}"
    return f"{line}: {record.error}" if record.error else line


METHOD = (
    "dataset",
    "shot",
    "remove_novel",
    "min_object_px",
    "skip_small_classes",
    "backbone_weights",
    "precision",
    "images",
    "model",
    "training",
    "validation",
)
"""Fields of CrossValidationConfig that a recipe holds: all that the weights depend on and that is no place."""


def recipe(config: CrossValidationConfig, values: Values) -> dict[str, Any]:
    """The method and its training with these values, for `cross_validate.py --config`.

    Places, folds, evaluation and hardware are the taker's; so are a file of backbone weights and split lists, as
    they lie somewhere (`left_to_the_taker`).
    """
    found = applied(config, values).to_json()
    left = () if config.backbone_weights in WEIGHTS_BY_NAME else ("backbone_weights",)
    return {name: found[name] for name in METHOD if name not in left}


def left_to_the_taker(config: CrossValidationConfig) -> list[str]:
    """Flags of files that change the weights and of which a recipe cannot say where they lie."""
    flags = [] if config.backbone_weights in WEIGHTS_BY_NAME else [f"--backbone-weights {config.backbone_weights}"]
    return flags + ([f"--split-lists {config.split_lists}"] if config.split_lists else [])


def table(records: Iterable[TrialRecord], longest: int) -> str:
    """The trials as text, the best first; `longest` is the epochs of a trial that is not stopped."""
    order = {"complete": 0, "stopped": 1, "running": 1, "diverged": 2, "failed": 3}
    ranked = sorted(records, key=lambda r: (order[r.status], -(r.score or 0.0), r.number))
    lines = ["trial  learning rate  weight decay  inner  batch  schedule     epochs   mIoU"]
    for record in ranked:
        v, score = record.values, "    -" if record.score is None else f"{100 * record.score:5.1f}"
        lines.append(
            f"{record.number:5d}  {v.learning_rate:13.4g}  {v.weight_decay:12.3g}  {v.inner_weight:5.3f}  "
            f"{v.global_batch:5d}  {v.schedule:11s}  {f'{len(record.epochs)}/{longest}':>6s}  {score}  {record.status}"
            + (" (start)" if record.number == 0 else "")
        )
    return "\n".join(lines)
