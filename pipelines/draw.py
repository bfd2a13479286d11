"""What a fold trains and tests on: lists, removal of images that show a novel class, stored episodes.

    python -m pipelines.draw --dataset pascal --source data/VOC2012 --folds 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines import storage
from pipelines.config import CrossValidationConfig, fingerprint
from pipelines.dag import Stage
from pipelines.preprocess import Scan, store_uri
from pipelines.results import Record

if TYPE_CHECKING:
    from mshnet.data.episodes import Episode
    from mshnet.data.splits import Pair, SplitLists

CODE_VERSION = 1
"""Raise it when the same images would give other episodes."""
EPISODES, PAIRS = "episodes.arrow", "pairs.arrow"


@dataclass(frozen=True, kw_only=True)
class DrawnFold(Record):
    """Where a fold's tables are, and how they came about."""

    fold: int
    folder: str
    store: str
    split_lists: str
    """lists:HASH or the rule."""
    protocol: str
    """Of the test episodes, in words."""
    selection: str
    """Of the best epoch, in words."""
    base_classes: tuple[int, ...]
    """That training draws from."""
    novel_classes: tuple[int, ...]
    """That the test episodes show."""
    left_out: tuple[str, ...]
    """Names of classes with too few images, where leaving them out was asked for."""
    training_pairs: int
    removed_pairs: int
    """Training pairs removed because their image shows a novel class."""
    test_pairs: int
    test_episodes_hash: str


def stage(config: CrossValidationConfig, scanned: Scan, sealed: Stage, fold: int) -> Stage:
    """Draw a fold's episodes from the sealed store."""
    key = fingerprint(
        "draw", CODE_VERSION, sealed.key, _lists_key(config), fold, config.shot, config.removes_novel,
        config.min_object_px, config.skip_small_classes, config.to_json()["validation"], config.training.seed,
        {k: v for k, v in config.to_json()["evaluation"].items() if k != "panels_each"},
    )  # fmt: skip
    folder = storage.join(config.store, "episodes", f"{config.dataset}-fold{fold}-{config.shot}shot-{key}")
    return Stage(
        name=f"draw episodes of fold {fold}",
        result=storage.join(folder, "result.json"),
        run=draw_fold,
        arguments=(config, fold, folder, store_uri(config, scanned)),
        needs=(sealed,),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Draw only: the job's stages up to the folds' episodes."""
    from pipelines.graph import run_stages

    return run_stages(argv, "python -m pipelines.draw", "Draw the folds' episodes.", lambda graph: graph.drawn)


def _lists_key(config: CrossValidationConfig) -> str:
    from mshnet.data.splits import read_split_lists

    if not config.split_lists:
        return "rule"
    return ",".join(read_split_lists(config.dataset, config.split_lists, f).origin for f in sorted(config.folds))


def draw_fold(
    config: CrossValidationConfig, fold: int, folder: str, store: str, sealed: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Lists, then test, validation and threshold episodes, as tables under `folder`."""
    from mshnet.data import folds, splits
    from mshnet.data.episodes import sampled_episodes
    from mshnet.data.store import ImageStore
    from mshnet.data.tables import write_episodes, write_pairs

    images = ImageStore(store)
    contents = images.contents()
    names = images.manifest.class_names
    novel = folds.novel_classes(config.dataset, fold)
    lists = (
        splits.read_split_lists(config.dataset, config.split_lists, fold)
        if config.split_lists
        else splits.derive_split_lists(config.dataset, fold, contents, config.min_object_px)
    )
    _check_listed(lists, images)
    kept = lists.train
    if config.removes_novel:
        kept = splits.without_novel(kept, {image_id: set(px) for image_id, _, px in contents}, novel)
    test, protocol, tested, left_out = _test_episodes(config, fold, lists.val, names)
    held_out: tuple[int, ...] = ()
    if config.validation.selection == "base":
        held_out = folds.held_out_base_classes(
            config.dataset, fold, config.validation.held_out_classes, config.training.seed
        )
    base = [c for c in folds.base_classes(config.dataset, fold) if c not in held_out]
    training = [pair for pair in kept if pair[1] not in held_out]
    base, small = _usable(config, training, base, names)
    chosen_on: list[Episode] = test if config.validation.selection == "novel" else []
    if held_out:
        chosen_on = sampled_episodes(
            [pair for pair in kept if pair[1] in held_out],
            config.shot,
            config.validation.validation_episodes,
            config.training.seed,
            names,
        )
    threshold = sampled_episodes(
        training, config.shot, config.evaluation.threshold_episodes, config.training.seed + 1, names
    )
    write_pairs(storage.join(folder, PAIRS), images, training)
    write_episodes(
        storage.join(folder, EPISODES),
        images,
        fold,
        config.shot,
        {"test": test, "validation": chosen_on, "threshold": threshold},
    )
    return DrawnFold(
        fold=fold,
        folder=folder,
        store=store,
        split_lists=lists.origin,
        protocol=protocol,
        selection=_selection_label(config, [names[c] for c in held_out]),
        base_classes=tuple(base),
        novel_classes=tested,
        left_out=(*left_out, *small),
        training_pairs=len(training),
        removed_pairs=len(lists.train) - len(kept),
        test_pairs=len(lists.val),
        test_episodes_hash=fingerprint([[e.query, list(e.supports), e.class_id] for e in test]),
    ).to_json()


def _check_listed(lists: SplitLists, images: Any) -> None:
    from mshnet.errors import InputError

    there = set(images.image_ids)
    absent = sorted({image_id for image_id, _ in (*lists.train, *lists.val)} - there)
    if absent:
        raise InputError(
            f"expected every image of the split lists in the source, found {len(absent)} missing (first: {absent[0]}); "
            "give the lists made for this source, or leave --split-lists empty to derive them"
        )


def _usable(
    config: CrossValidationConfig, pairs: list[Pair], classes: list[int], names: tuple[str, ...]
) -> tuple[list[int], list[str]]:
    """Classes that can form an episode; the others raise, or are left out where that was asked for."""
    from mshnet.data.episodes import TrainingSampler

    sampler = TrainingSampler(
        pairs,
        classes,
        config.shot,
        config.training.seed,
        1,
        skip_small_classes=config.skip_small_classes,
        class_names=names,
    )
    return list(sampler.classes), [names[c] for c in classes if c not in sampler.classes]


def _test_episodes(
    config: CrossValidationConfig, fold: int, val: tuple[Pair, ...], names: tuple[str, ...]
) -> tuple[list[Episode], str, tuple[int, ...], list[str]]:
    from mshnet.data import folds
    from mshnet.data.episodes import published_episodes, sampled_episodes, small_classes

    evaluation = config.evaluation
    novel = folds.novel_classes(config.dataset, fold)
    count = evaluation.evaluation_episodes
    small = small_classes(val, novel, config.shot)
    tested = tuple(c for c in novel if c not in small)
    left_out = [names[c] for c in small]
    if evaluation.protocol == "published":
        episodes = published_episodes(
            config.dataset, val, fold, config.shot, count, skip_small_classes=config.skip_small_classes
        )
        label = f"published draw, {count} episodes"
    else:
        if not config.skip_small_classes:
            _usable(config, list(val), list(novel), names)
        episodes = sampled_episodes(val, config.shot, count, evaluation.evaluation_seed, names)
        label = f"balanced draw (seed {evaluation.evaluation_seed}), {count} episodes"
    if left_out:
        label += f", {len(tested)} of {len(novel)} classes"
    label += f", {config.shot}-shot, square {config.images.image_size_px} px"
    return episodes, label, tested, left_out


def _selection_label(config: CrossValidationConfig, held_out: list[str]) -> str:
    return {
        "base": f"best epoch on held-out base classes ({', '.join(held_out)})",
        "novel": "best epoch on the test episodes, as published",
        "last": "last epoch, none chosen",
    }[config.validation.selection]


if __name__ == "__main__":
    raise SystemExit(main())
