"""What a fold trains and tests on: lists, removal of images that show a novel class, stored episodes.

Two stages, so that another evaluation of the same training does not train again.

    python -m pipelines.draw --dataset pascal --source data/VOC2012 --folds 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from mshnet.errors import InputError
from pipelines import storage
from pipelines.config import CrossValidationConfig, fingerprint
from pipelines.dag import Stage
from pipelines.preprocess import store_uri
from pipelines.results import CHOSEN_ON_TEST, Record
from pipelines.scan import Scan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mshnet.data.episodes import Episode
    from mshnet.data.splits import Pair
    from mshnet.data.store.images import ImageStore

CODE_VERSION = 2
"""Raise it when the same images would give other episodes, or the results have other fields."""
EPISODES, PAIRS = "episodes.arrow", "pairs.arrow"


@dataclass(frozen=True, kw_only=True)
class DrawnTraining(Record):
    """What a fold trains on, and on what its best epoch is chosen."""

    fold: int
    folder: str
    """Of the tables, below the store's root."""
    store: str
    """Of the images, below the store's root."""
    split_lists: str
    """lists:HASH or the rule."""
    selection: str
    """Of the best epoch, in words."""
    base_classes: tuple[int, ...]
    """That training draws from."""
    left_out: tuple[str, ...]
    """Base classes with too few images, where leaving them out was asked for."""
    training_pairs: int
    removed_pairs: int
    """Training pairs removed because their image shows a novel class."""
    pairs_sha256: str
    """Of the table of training pairs."""
    validation_sha256: str
    """Of the table of validation episodes."""


@dataclass(frozen=True, kw_only=True)
class DrawnTest(Record):
    """What a fold is tested on."""

    fold: int
    folder: str
    """Of the tables, below the store's root."""
    store: str
    """Of the images, below the store's root."""
    protocol: str
    """Of the test episodes, in words."""
    novel_classes: tuple[int, ...]
    """That the test episodes show."""
    left_out: tuple[str, ...]
    """Novel classes with too few images, where leaving them out was asked for."""
    test_pairs: int
    episodes_hash: str
    """Of the test episodes by image id, whatever store holds the images: see `episodes_hash`."""
    episodes_sha256: str
    """Of the table of test and threshold episodes."""


@dataclass(frozen=True)
class _Fold:
    """A fold's lists, checked against the store."""

    train: tuple[Pair, ...]
    """After removal."""
    val: tuple[Pair, ...]
    origin: str
    removed: int
    held_out: tuple[int, ...]
    """Base classes kept out of training for choosing the best epoch."""
    base: tuple[int, ...]
    """The other base classes."""
    novel: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def training(self) -> list[Pair]:
        return [pair for pair in self.train if pair[1] in self.base]


def training_stage(config: CrossValidationConfig, scanned: Scan, sealed: Stage, fold: int) -> Stage:
    """Draw what a fold trains on."""
    validation = config.validation
    chosen_on: Any = {
        "base": [validation.held_out_classes, validation.validation_episodes],
        "novel": _test_key(config),
        "last": [],
    }[validation.selection]
    key = fingerprint("draw training", *_common_key(config, sealed, fold), validation.selection, chosen_on)
    return _stage("training", draw_training, (EPISODES, PAIRS), config, scanned, sealed, fold, key)


def test_stage(config: CrossValidationConfig, scanned: Scan, sealed: Stage, fold: int) -> Stage:
    """Draw what a fold is tested on."""
    # The threshold's episodes are of the classes that training draws from.
    held_out = config.validation.held_out_classes if config.validation.selection == "base" else 0
    threshold = [config.evaluation.threshold_episodes, held_out]
    key = fingerprint("draw test", *_common_key(config, sealed, fold), _test_key(config), threshold)
    return _stage("test", draw_test, (EPISODES,), config, scanned, sealed, fold, key)


def _stage(
    what: str,
    run: Any,
    parts: tuple[str, ...],
    config: CrossValidationConfig,
    scanned: Scan,
    sealed: Stage,
    fold: int,
    key: str,
) -> Stage:
    folder = storage.join(config.store, "episodes", f"{config.dataset}-fold{fold}-{config.shot}shot-{what}-{key}")
    return Stage(
        name=f"draw {what} episodes of fold {fold}",
        result=storage.join(folder, "result.json"),
        run=run,
        arguments=(config, fold, folder, store_uri(config, scanned)),
        needs=(sealed,),
        parts=parts,
    )


def _common_key(config: CrossValidationConfig, sealed: Stage, fold: int) -> list[Any]:
    lists = f"rule {config.min_object_px}"
    if config.split_lists:
        lists = _origin(config.dataset, config.split_lists, fold)
    flags = [config.removes_novel, config.skip_small_classes]
    return [CODE_VERSION, sealed.key, lists, fold, config.shot, *flags, config.training.seed]


@cache
def _origin(dataset: str, split_lists: str, fold: int) -> str:
    from mshnet.data.splits import read_split_lists

    return read_split_lists(dataset, split_lists, fold).origin


def _test_key(config: CrossValidationConfig) -> list[Any]:
    evaluation = config.evaluation
    seed = evaluation.evaluation_seed if evaluation.protocol == "balanced" else None
    return [evaluation.protocol, evaluation.evaluation_episodes, seed]


def draw_training(
    config: CrossValidationConfig, fold: int, folder: str, store: str, sealed: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Training pairs and validation episodes, as tables under `folder`."""
    from mshnet.data.episodes import sampled_episodes
    from mshnet.data.store.images import ImageStore
    from mshnet.data.tables import write_episodes, write_pairs

    images = ImageStore(store)
    images.verify()  # once, before anything is trained on them
    lists = _read_fold(config, fold, images)
    base, small = _usable(config, lists.training, lists.base, lists.names)
    validation: list[Episode[str]] = []
    chosen_on: tuple[int, ...] = ()
    if config.validation.selection == "novel":
        validation = _test_episodes(config, fold, lists)
    elif config.validation.selection == "base":
        held_out = [pair for pair in lists.train if pair[1] in lists.held_out]
        chosen_on, too_small = _usable(config, held_out, lists.held_out, lists.names)
        small += too_small
        count = config.validation.validation_episodes
        validation = sampled_episodes(held_out, config.shot, count, config.training.seed, lists.names)
    drawn = {"validation": validation}
    pairs_sha256 = write_pairs(storage.join(folder, PAIRS), images, lists.training)
    validation_sha256 = write_episodes(storage.join(folder, EPISODES), images, fold, config.shot, drawn)
    return DrawnTraining(
        fold=fold,
        folder=storage.below(config.store, folder),
        store=storage.below(config.store, store),
        split_lists=lists.origin,
        selection=_selection_label(config, [lists.names[c] for c in chosen_on]),
        base_classes=base,
        left_out=small,
        training_pairs=len(lists.training),
        removed_pairs=lists.removed,
        pairs_sha256=pairs_sha256,
        validation_sha256=validation_sha256,
    ).to_json()


def draw_test(
    config: CrossValidationConfig, fold: int, folder: str, store: str, sealed: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Test episodes, and base-class episodes for the training-free baseline's threshold, under `folder`."""
    from mshnet.data.episodes import sampled_episodes, small_classes
    from mshnet.data.store.images import ImageStore
    from mshnet.data.tables import write_episodes

    images = ImageStore(store)
    lists = _read_fold(config, fold, images)
    test = _test_episodes(config, fold, lists)
    threshold = sampled_episodes(
        lists.training, config.shot, config.evaluation.threshold_episodes, config.training.seed + 1, lists.names
    )
    drawn = {"test": test, "threshold": threshold}
    sha256 = write_episodes(storage.join(folder, EPISODES), images, fold, config.shot, drawn)
    small = small_classes(lists.val, lists.novel, config.shot)
    # With fewer episodes than pairs, a walk through the list may not reach every class.
    tested = tuple(sorted({episode.class_id for episode in test}))
    return DrawnTest(
        fold=fold,
        folder=storage.below(config.store, folder),
        store=storage.below(config.store, store),
        protocol=_protocol_label(config, len(tested), len(lists.novel)),
        novel_classes=tested,
        left_out=tuple(lists.names[c] for c in small),
        test_pairs=len(lists.val),
        episodes_hash=episodes_hash(test),
        episodes_sha256=sha256,
    ).to_json()


def episodes_hash(episodes: Iterable[Episode[str]]) -> str:
    """Names the test: who is query and support of what, in order."""
    return fingerprint([[e.query, list(e.supports), e.class_id] for e in episodes])


def read_test(config: CrossValidationConfig, drawn: DrawnTest, images: ImageStore) -> list[Episode[int]]:
    """The test episodes by row. Raises InputError where they are not those that were drawn."""
    from mshnet.data.tables import read_episodes

    uri = storage.join(config.store, drawn.folder, EPISODES)
    test = read_episodes(uri, drawn.episodes_sha256, "test")
    found = episodes_hash(episode.named(images.image_id) for episode in test)
    if found != drawn.episodes_hash:
        raise InputError(
            f"expected test episodes {drawn.episodes_hash} in {uri!r}, found {found} with the images of "
            f"{images.uri!r}: table and images do not belong together; delete the folder "
            f"{storage.join(config.store, drawn.folder)!r} and submit the job again"
        )
    return test


def _read_fold(config: CrossValidationConfig, fold: int, images: ImageStore) -> _Fold:
    from mshnet.data import folds, splits

    contents = images.contents()
    novel = folds.novel_classes(config.dataset, fold)
    lists = (
        splits.read_split_lists(config.dataset, config.split_lists, fold)
        if config.split_lists
        else splits.derive_split_lists(config.dataset, fold, contents, config.min_object_px)
    )
    absent = sorted({image_id for image_id, _ in (*lists.train, *lists.val)} - set(images.image_ids))
    if absent:
        raise InputError(
            f"expected every image of the split lists in the source, found {len(absent)} missing "
            f"(first: {absent[0]}); give the lists made for this source, or leave --split-lists empty to derive them"
        )
    kept = lists.train
    if config.removes_novel:
        kept = splits.without_novel(kept, {image_id: set(px) for image_id, _, px in contents}, novel)
    held_out: tuple[int, ...] = ()
    if config.validation.selection == "base":
        count = config.validation.held_out_classes
        held_out = folds.held_out_base_classes(config.dataset, fold, count, config.training.seed)
    return _Fold(
        train=kept,
        val=lists.val,
        origin=lists.origin,
        removed=len(lists.train) - len(kept),
        held_out=held_out,
        base=tuple(c for c in folds.base_classes(config.dataset, fold) if c not in held_out),
        novel=novel,
        names=images.manifest.class_names,
    )


def _usable(
    config: CrossValidationConfig, pairs: Sequence[Pair], classes: Sequence[int], names: tuple[str, ...]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Classes that can form an episode; the others raise, or are left out (named) where that was asked for."""
    from mshnet.data.episodes import usable_classes

    skip = config.skip_small_classes
    usable = usable_classes(pairs, classes, config.shot, skip_small_classes=skip, class_names=names)
    return usable, tuple(names[c] for c in classes if c not in usable)


def _test_episodes(config: CrossValidationConfig, fold: int, lists: _Fold) -> list[Episode[str]]:
    from mshnet.data.episodes import published_episodes, sampled_episodes

    count, skip = config.evaluation.evaluation_episodes, config.skip_small_classes
    if config.evaluation.protocol == "published":
        return published_episodes(config.dataset, lists.val, fold, config.shot, count, skip_small_classes=skip)
    _usable(config, lists.val, lists.novel, lists.names)
    return sampled_episodes(lists.val, config.shot, count, config.evaluation.evaluation_seed, lists.names)


def _protocol_label(config: CrossValidationConfig, tested: int, novel: int) -> str:
    evaluation = config.evaluation
    draw = {"published": "published draw", "balanced": f"balanced draw (seed {evaluation.evaluation_seed})"}
    label = f"{draw[evaluation.protocol]}, {evaluation.evaluation_episodes} episodes"
    if tested < novel:
        # Not the published protocol any more, so the name says so.
        label += f", {tested} of {novel} classes"
    return f"{label}, {config.shot}-shot, square {config.images.image_size_px} px"


def _selection_label(config: CrossValidationConfig, held_out: list[str]) -> str:
    return {
        "base": f"best epoch on held-out base classes ({', '.join(held_out)})",
        "novel": CHOSEN_ON_TEST,
        "last": "last epoch, none chosen",
    }[config.validation.selection]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw only: the job's stages up to the folds' episodes."""
    from pipelines.job import run_stages

    return run_stages(
        argv,
        "python -m pipelines.draw",
        "Draw the folds' episodes.",
        lambda graph: [*graph.drawn_training, *graph.drawn_test],
    )


if __name__ == "__main__":
    raise SystemExit(main())
