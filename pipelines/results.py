"""What the stages hand to each other and the report reads: plain records that survive as strict JSON.

`to_json()` gives a dict that `json.dumps` writes as standard JSON; `from_json()` takes that dict, or the
text, and refuses unknown keys, missing keys and wrong types, naming the place. A loss that diverged is kept:
numbers that JSON cannot hold are written as the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from mshnet.errors import InputError
from mshnet.protocols import Protocol

BASELINES: tuple[str, ...] = ("untrained", "foreground", "prototype")
"""Keys of `FoldResult.baselines`, in the order in which tables show them."""

CHOSEN_ON_TEST = "best epoch on the test episodes, as published"
"""Start of `FoldResult.selection` of a number that flatters: it was chosen on the episodes that it was measured on."""

GIVEN = "given weights"
"""Start of `FoldResult.selection` of a number that says nothing of training: the weights came from elsewhere."""

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Record:
    """A frozen dataclass that goes to JSON and back: JSON values, records, lists and dicts."""

    def to_json(self) -> dict[str, Any]:
        """This record as a dict of plain JSON values."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def to_text(self) -> str:
        """This record as one line of standard JSON."""
        return json.dumps(self.to_json(), allow_nan=False)

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str | bytes) -> Self:
        """The record that `to_json()` or `to_text()` wrote; InputError naming the place that is wrong."""
        if isinstance(data, str | bytes):
            try:
                data = json.loads(data)
            except ValueError as error:
                raise InputError(f"expected a {cls.__name__} as JSON, got text that is not JSON: {error}") from error
        record: Self = _record(cls, data, cls.__name__)
        return record


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _record(kind: type[Any], data: Any, place: str) -> Any:
    if not isinstance(data, Mapping):
        raise InputError(f"{place}: expected an object with the fields of {kind.__name__}, got {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    unknown = sorted(set(data) - {f.name for f in fields})
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in data]
    if unknown or missing:
        raise InputError(
            f"{place}: expected the fields of {kind.__name__}; missing {missing or 'none'}, "
            f"unknown {unknown or 'none'}. Was it written by another version? Run the stage that wrote it again."
        )
    present = [f.name for f in fields if f.name in data]
    return kind(**{name: _value(hints[name], data[name], f"{place}.{name}") for name in present})


def _value(hint: Any, data: Any, place: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return data
    if origin in (types.UnionType, typing.Union):  # only `X | None` occurs
        (inner,) = [arg for arg in args if arg is not type(None)]
        return None if data is None else _value(inner, data, place)
    if origin is typing.Literal and data in args:
        return data
    if origin is tuple and isinstance(data, list | tuple):
        return tuple(_value(args[0], item, f"{place}[{position}]") for position, item in enumerate(data))
    if origin is list and isinstance(data, list):
        return [_value(args[0], item, f"{place}[{position}]") for position, item in enumerate(data)]
    if origin is dict and isinstance(data, Mapping):
        return {key: _value(args[1], item, f"{place}[{key!r}]") for key, item in data.items()}
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast("type[Any]", hint), data, place)
    if hint is float and isinstance(data, str) and data in NON_FINITE:
        return NON_FINITE[data]
    if hint is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    if hint in (int, str, bool) and type(data) is hint:
        return data
    name = getattr(origin or hint, "__name__", str(hint))
    wanted = " or ".join(map(repr, args)) if origin is typing.Literal else name
    raise InputError(f"{place}: expected {wanted}, got {type(data).__name__} ({str(data)[:60]!r})")


@dataclass(frozen=True, kw_only=True)
class EpochRecord(Record):
    """One training epoch."""

    epoch: int
    """From 1."""
    step: int
    """Optimizer steps done since the start of training."""
    loss: float
    outer_loss: float
    inner_loss: float
    learning_rate: float
    episodes_per_s: float
    validation_miou: float | None
    """0 to 1 on the episodes that choose the checkpoint; None where this epoch was not validated."""


@dataclass(frozen=True, kw_only=True)
class Interval(Record):
    """A confidence interval, its ends in the unit of the number that it belongs to."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class SizeScore(Record):
    """A score on the episodes whose query shows the object at one size."""

    miou: float
    episodes: int


@dataclass(frozen=True, kw_only=True)
class Score(Record):
    """What one way of segmenting reached on a fold's evaluation episodes; all IoU from 0 to 1."""

    miou: float
    fb_iou: float
    class_iou: dict[str, float]
    """By class name, only classes that the episodes show."""
    episodes: int
    """Of all seeds."""
    miou_interval: Interval | None = None
    """95 %, by bootstrap over the episodes within each class."""
    fb_iou_interval: Interval | None = None
    class_interval: dict[str, Interval] = field(default_factory=dict)
    by_size: dict[str, SizeScore] = field(default_factory=dict)
    """small, medium, large; only sizes that occur."""
    by_seed: tuple[float, ...] = ()
    """mIoU of each seed's episodes alone, in the protocol's order."""


@dataclass(frozen=True, kw_only=True)
class FeatureUse(Record):
    """How often an evaluation needed an image's features, and where they came from."""

    images: int
    """Distinct ones."""
    asked: int
    computed: int
    from_memory: int
    from_disk: int


@dataclass(frozen=True, kw_only=True)
class EpisodeOutcome(Record):
    """One evaluated episode that the report shows."""

    query: str
    supports: list[str]
    class_name: str
    iou: float
    picture: str
    """File name of its panel, relative to the fold's folder."""
    rank: str
    """Why it is shown: one of RANKS."""
    energy: str = ""
    """File name of its energy maps, where they were drawn."""
    note: str = ""
    """What more its caption says: the object's size, false foreground."""


RANKS = ("best", "median", "worst", "false foreground", "missed small object")
"""worst: lowest IoU; false foreground: most predicted pixels outside the object, of those that count; missed small
object: lowest IoU of those whose object is small."""


@dataclass(frozen=True, kw_only=True)
class FoldResult(Record):
    """A trained and evaluated fold."""

    fold: int
    novel_classes: list[str]
    score: Score
    """The trained network."""
    baselines: dict[str, Score]
    """The same episodes by the untrained network, by "everything is foreground", by prototype matching."""
    history: list[EpochRecord]
    panels: list[EpisodeOutcome]
    curve_picture: str
    bars_picture: str
    protocol: Protocol
    """Of `score` and `baselines`."""
    best_epoch: int
    train_episodes: int
    train_s: float
    evaluate_s: float
    run_id: str
    model_version: str | None
    checkpoint: str
    """Folder of the model, below the store's root."""
    git_commit: str = "unknown"
    """Of the code that trained."""
    other_shots: dict[str, Score] = field(default_factory=dict)
    """The trained network by number of supports, where it was judged with others than the protocol's."""
    outcomes: str = ""
    """The table of all episodes' counts, below the store's root (`mshnet.outcomes`)."""
    outcomes_sha256: str = ""
    episodes_hash: str = ""
    """Of the test episodes by image id (`DrawnTest.episodes_hash`)."""
    features: FeatureUse | None = None
    class_names: tuple[str, ...] = ()
    """By class id, of one's own data; empty where the data set's name says them."""

    @property
    def selection(self) -> str:
        """On what the best epoch was chosen."""
        return self.protocol.selection

    @property
    def chosen_on_test(self) -> bool:
        """Whether the test episodes chose the epoch; every number of this fold is to be labelled then."""
        return self.selection.startswith(CHOSEN_ON_TEST)

    @property
    def given(self) -> bool:
        """Whether the weights were given instead of trained; how, is not known then."""
        return self.selection.startswith(GIVEN)


@dataclass(frozen=True, kw_only=True)
class CrossValidation(Record):
    """The whole job's result: what the report and the last line on stdout are made of."""

    name: str
    dataset: str
    backbone: str
    similarity: str
    shot: int
    image_size_px: int
    folds: list[FoldResult]
    mean_miou: float
    mean_fb_iou: float
    parent_run_id: str
    config: dict[str, Any]
    """The resolved config, as `--config FILE.json` replays it."""
    fingerprints: dict[str, str]
    git_commit: str
    versions: dict[str, str]
    learnable_parameters: int
    mask_mode: str = "not recorded"
    """How the source's annotations become masks."""
    architecture: str = "mshnet"
    miou_interval: Interval | None = None
    """95 %, of the mean over the folds."""
    fb_iou_interval: Interval | None = None
    artifacts: dict[str, str] = field(default_factory=dict)
    """Where things lie, by name (store, checkpoints, tracking); shown under provenance."""

    @property
    def chosen_on_test(self) -> bool:
        """Whether any fold's epoch was chosen on its test episodes."""
        return any(fold.chosen_on_test for fold in self.folds)

    @property
    def given(self) -> bool:
        """Whether any fold's weights were given instead of trained."""
        return any(fold.given for fold in self.folds)

    def baseline_miou(self, baseline: str) -> float | None:
        """Mean over the folds of that baseline's mIoU; None where a fold lacks it or there is no fold."""
        scores = [fold.baselines.get(baseline) for fold in self.folds]
        known = [score.miou for score in scores if score is not None]
        return sum(known) / len(known) if known and len(known) == len(scores) else None


def mean(values: list[float]) -> float:
    """Plain mean over folds, the paper's "mIoU" column; InputError without values."""
    if not values:
        raise InputError("expected at least one fold to average over, got none")
    return sum(values) / len(values)
