"""What a fold trains and tests on: lists, removal of images that show a novel class, stored episodes.

Two stages, so that another evaluation of the same training does not train again.

    python -m pipelines.draw --dataset pascal --source data/VOC2012 --folds 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from mshnet.errors import InputError
from mshnet.protocols import Protocol, named
from pipelines import own_folds, storage
from pipelines.config import CrossValidationConfig, fingerprint
from pipelines.dag import Stage
from pipelines.drawn import EPISODES, PAIRS, DrawnTest, DrawnTraining, TestList, episodes_hash
from pipelines.fold_lists import FoldLists, read_fold
from pipelines.preprocess import store_uri
from pipelines.results import CHOSEN_ON_TEST, GIVEN
from pipelines.scan import Scan

if TYPE_CHECKING:
    from mshnet.data.episodes import Episode
    from mshnet.data.splits import Pair

TRAINING_VERSION, TEST_VERSION = 2, 3
"""Raise one when the same images would give other episodes, or that stage's result has other fields."""
MAIN = "test"
"""The split of the test list that `--shot` and the protocol's first seed give."""


def training_stage(config: CrossValidationConfig, scanned: Scan, sealed: Stage, fold: int) -> Stage:
    """Draw what a fold trains on."""
    validation = config.validation
    chosen_on: Any = {
        "base": [validation.held_out_classes, validation.validation_episodes],
        "novel": _main_key(config),
        "last": [],
        "given": [],
    }[config.selection]
    key = fingerprint(
        "draw training", TRAINING_VERSION, *_common_key(config, sealed, fold), config.selection, chosen_on
    )
    return _stage("training", draw_training, (EPISODES, PAIRS), config, scanned, sealed, fold, key)


def test_stage(config: CrossValidationConfig, scanned: Scan, sealed: Stage, fold: int) -> Stage:
    """Draw what a fold is tested on."""
    evaluation, validation = config.evaluation, config.validation
    drawn = evaluation.episodes
    lists = [drawn.draw, drawn.episodes, drawn.seeds, config.test_shots]
    # The threshold's episodes are of the classes that training draws from.
    threshold = [evaluation.threshold_episodes, validation.held_out_classes if config.selection == "base" else 0]
    # Of no matter to the episodes, but the recorded protocol says them.
    judged = [evaluation.resize, evaluation.ignored, config.selection]
    key = fingerprint("draw test", TEST_VERSION, *_common_key(config, sealed, fold), lists, threshold, judged)
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
    return [sealed.key, lists, fold, config.shot, *flags, config.training.seed, *own_folds.key(config)]


@cache
def _origin(dataset: str, split_lists: str, fold: int) -> str:
    from mshnet.data.splits import read_split_lists

    return read_split_lists(dataset, split_lists, fold).origin


def _main_key(config: CrossValidationConfig) -> list[Any]:
    drawn = config.evaluation.episodes
    seed: int | None = drawn.seeds[0]
    if drawn.draw == "published" and seed == 0:
        seed = None  # as in keys from before that draw had a seed
    return [drawn.draw, drawn.episodes, seed]


def draw_training(
    config: CrossValidationConfig, fold: int, folder: str, store: str, sealed: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Training pairs and validation episodes, as tables under `folder`."""
    from mshnet.data.episodes import sampled_episodes
    from mshnet.data.store.images import ImageStore
    from mshnet.data.tables import write_episodes, write_pairs

    images = ImageStore(store)
    images.verify()  # once, before anything is trained on them
    lists = read_fold(config, fold, images)
    try:
        base, small = _usable(config, lists.training, lists.base, lists.names)
    except InputError as error:
        if not lists.removed:
            raise
        raise InputError(
            f"fold {fold}: {lists.removed} of {lists.removed + len(lists.train)} training pairs are left out, as their "
            f"images show a class that the fold tests; of the others, {error}. Such images are kept with "
            "--remove-novel no; classes that occur together do least harm in one fold (--classes, own data)"
        ) from error
    validation: list[Episode[str]] = []
    chosen_on: tuple[int, ...] = ()
    if config.selection == "novel":
        # Not of every seed: a validation after each epoch would be as long as the whole test.
        validation = _test_episodes(config, fold, lists, config.shot, config.evaluation.episodes.seeds[0])
    elif config.selection == "base":
        chosen_on, too_small = _usable(config, lists.to_choose_on, lists.held_out, lists.names)
        small += too_small
        count = config.validation.validation_episodes
        validation = sampled_episodes(lists.to_choose_on, config.shot, count, config.training.seed, lists.names)
    drawn = {"validation": validation}
    pairs_sha256 = write_pairs(storage.join(folder, PAIRS), images, lists.training)
    validation_sha256 = write_episodes(storage.join(folder, EPISODES), images, fold, drawn)
    return DrawnTraining(
        fold=fold,
        folder=storage.below(config.store, folder),
        store=storage.below(config.store, store),
        split_lists=lists.origin,
        selection=_selection(config, [lists.names[c] for c in chosen_on]),
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
    lists = read_fold(config, fold, images)
    wanted = config.evaluation.episodes
    tests: list[TestList] = []
    drawn: dict[str, list[Episode[str]]] = {}
    for shot in config.test_shots:
        for seed in wanted.seeds:
            split = f"{MAIN}-{shot}shot-seed{seed}" if drawn else MAIN
            drawn[split] = _test_episodes(config, fold, lists, shot, seed)
            tests.append(TestList(shot=shot, seed=seed, split=split, episodes_hash=episodes_hash(drawn[split])))
    main = [episode for test in tests if test.shot == config.shot for episode in drawn[test.split]]
    drawn["threshold"] = sampled_episodes(
        lists.training, config.shot, config.evaluation.threshold_episodes, config.training.seed + 1, lists.names
    )
    sha256 = write_episodes(storage.join(folder, EPISODES), images, fold, drawn)
    small = small_classes(lists.val, lists.novel, config.shot)
    # With fewer episodes than pairs, a walk through the list may not reach every class.
    tested = tuple(sorted({episode.class_id for episode in main}))
    return DrawnTest(
        fold=fold,
        folder=storage.below(config.store, folder),
        store=storage.below(config.store, store),
        protocol=Protocol(
            name=named(wanted.draw, wanted.episodes, wanted.seeds),
            draw=wanted.draw,
            episodes=wanted.episodes,
            seeds=wanted.seeds,
            shot=config.shot,
            resize=config.evaluation.resize,
            side_px=config.images.image_size_px,
            ignore=config.evaluation.ignored,
            mask_mode=images.manifest.mask_mode,
            split_lists=lists.origin,
            novel_removed=config.removes_novel,
            selection=_test_selection(config, lists),
            # Not the published protocol any more, so the label says so.
            classes=f"{len(tested)} of {len(lists.novel)} classes" if len(tested) < len(lists.novel) else "",
        ),
        tests=tests,
        novel_classes=tested,
        left_out=tuple(lists.names[c] for c in small),
        test_pairs=len(lists.val),
        episodes_hash=episodes_hash(main),
        episodes_sha256=sha256,
    ).to_json()


def _usable(
    config: CrossValidationConfig, pairs: Sequence[Pair], classes: Sequence[int], names: tuple[str, ...]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Classes that can form an episode; the others raise, or are left out (named) where that was asked for."""
    from mshnet.data.episodes import usable_classes

    skip = config.skip_small_classes
    usable = usable_classes(pairs, classes, config.shot, skip_small_classes=skip, class_names=names)
    return usable, tuple(names[c] for c in classes if c not in usable)


def _test_episodes(
    config: CrossValidationConfig, fold: int, lists: FoldLists, shot: int, seed: int
) -> list[Episode[str]]:
    from mshnet.data.episodes import published_episodes, sampled_episodes, usable_classes

    wanted, skip = config.evaluation.episodes, config.skip_small_classes
    if wanted.draw == "published":
        return published_episodes(config.dataset, lists.val, fold, shot, wanted.episodes, seed, skip_small_classes=skip)
    usable_classes(lists.val, lists.novel, shot, skip_small_classes=skip, class_names=lists.names)
    return sampled_episodes(lists.val, shot, wanted.episodes, seed, lists.names)


def _selection(config: CrossValidationConfig, held_out: Sequence[str]) -> str:
    return {
        "base": f"best epoch on held-out base classes ({', '.join(held_out)})",
        "novel": CHOSEN_ON_TEST,
        "last": "last epoch, none chosen",
        "given": f"{GIVEN} (training unknown)",
    }[config.selection]


def _test_selection(config: CrossValidationConfig, lists: FoldLists) -> str:
    """As the training says it, and on which of several seeds it chose."""
    held_out = _usable(config, lists.to_choose_on, lists.held_out, lists.names)[0] if lists.held_out else ()
    label = _selection(config, [lists.names[c] for c in held_out])
    seeds = config.evaluation.episodes.seeds
    on_one = config.selection == "novel" and len(seeds) > 1
    return f"{label} (of seed {seeds[0]})" if on_one else label


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
