"""What the folds train and are tested on, drawn from a small store that the real preprocessing sealed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mshnet.config import ImageFormat, TrainingConfig
from mshnet.data.episodes import Episode
from mshnet.data.folds import base_classes, novel_classes, published_partition
from mshnet.data.shapes import write_voc
from mshnet.data.splits import Pair
from mshnet.data.store.images import ImageStore
from mshnet.data.tables import read_episodes, read_pairs, write_episodes
from mshnet.errors import InputError
from mshnet.protocols import Protocol
from pipelines import draw, preprocess, scan, storage
from pipelines.config import CrossValidationConfig, EvaluationConfig, ValidationConfig, fingerprint
from pipelines.dag import Stage
from pipelines.drawn import EPISODES, PAIRS, DrawnTest, DrawnTraining, episodes_hash, read_test
from pipelines.scan import Scan

MIN_PX = 60


def done(stage: Stage) -> Mapping[str, Any]:
    """The stage's result; what is missing is run here, as Ray would run it elsewhere."""
    recorded = stage.recorded()
    if recorded is None:
        recorded = stage.run(*stage.arguments, *(done(need) for need in stage.needs))
        storage.write_json(stage.result, recorded)
    return recorded


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CrossValidationConfig:
    """150 generated images, sealed in two shards."""
    root = tmp_path_factory.mktemp("draw")
    write_voc(root / "source", images=150, size_px=48, seed=0)
    config = CrossValidationConfig(
        source=str(root / "source"),
        store=str(root / "store"),
        images=ImageFormat(image_size_px=33),
        min_object_px=MIN_PX,
        images_per_shard=80,
        validation=ValidationConfig(held_out_classes=3, validation_episodes=12),
        evaluation=EvaluationConfig(evaluation_episodes=40, threshold_episodes=15),
    )
    done(preprocess.stages(config, scan.scan_source(config)))
    return config


@pytest.fixture(scope="module")
def scanned(config: CrossValidationConfig) -> Scan:
    return scan.scan_source(config)


@pytest.fixture(scope="module")
def images(config: CrossValidationConfig, scanned: Scan) -> ImageStore:
    return ImageStore(preprocess.store_uri(config, scanned))


def stages(config: CrossValidationConfig, scanned: Scan, fold: int = 0) -> tuple[Stage, Stage]:
    sealed = preprocess.stages(config, scanned)
    return draw.training_stage(config, scanned, sealed, fold), draw.test_stage(config, scanned, sealed, fold)


def keys(config: CrossValidationConfig, scanned: Scan) -> tuple[str, str]:
    training, test = stages(config, scanned)
    return training.key, test.key


def drawn_training(config: CrossValidationConfig, scanned: Scan, fold: int = 0) -> DrawnTraining:
    return DrawnTraining.from_json(done(stages(config, scanned, fold)[0]))


def drawn_test(config: CrossValidationConfig, scanned: Scan, fold: int = 0) -> DrawnTest:
    return DrawnTest.from_json(done(stages(config, scanned, fold)[1]))


def pairs(config: CrossValidationConfig, drawn: DrawnTraining, images: ImageStore) -> list[Pair]:
    read = read_pairs(storage.join(config.store, drawn.folder, PAIRS), drawn.pairs_sha256)
    return [(images.image_id(row), c) for row, c in zip(read.images.tolist(), read.class_ids.tolist(), strict=True)]


def episodes(
    config: CrossValidationConfig, drawn: DrawnTraining | DrawnTest, images: ImageStore, split: str
) -> list[Episode[str]]:
    sha256 = drawn.episodes_sha256 if isinstance(drawn, DrawnTest) else drawn.validation_sha256
    read = read_episodes(storage.join(config.store, drawn.folder, EPISODES), sha256, split)
    return [episode.named(images.image_id) for episode in read]


@pytest.mark.parametrize("fold", range(4))
def test_a_fold_trains_on_no_novel_and_no_held_out_class(
    config: CrossValidationConfig, scanned: Scan, images: ImageStore, fold: int
) -> None:
    drawn = drawn_training(config, scanned, fold)
    kept = pairs(config, drawn, images)
    held_out = published_partition("shapes").held_out(fold, 3, 0)
    novel = set(novel_classes("shapes", fold))
    assert {c for _, c in kept} == set(drawn.base_classes) == set(base_classes("shapes", fold)) - set(held_out)
    contents = {image_id: (subset, pixels) for image_id, subset, pixels in images.contents()}
    assert {contents[image_id][0] for image_id, _ in kept} == {"train"}
    assert all(contents[image_id][1][c] >= MIN_PX for image_id, c in kept)
    assert all(novel.isdisjoint(contents[image_id][1]) for image_id, _ in kept)
    # The rule, by hand: every base pair that is large enough and in an image without a novel class.
    large = [
        (image_id, c) for image_id, (subset, pixels) in contents.items() if subset == "train"
        for c, px in pixels.items() if px >= MIN_PX and c not in novel
    ]  # fmt: skip
    clean = [(image_id, c) for image_id, c in large if novel.isdisjoint(contents[image_id][1])]
    assert sorted(kept) == sorted(pair for pair in clean if pair[1] not in held_out)
    assert (drawn.training_pairs, drawn.removed_pairs) == (len(kept), len(large) - len(clean))
    assert drawn.removed_pairs > 0

    chosen_on = episodes(config, drawn, images, "validation")
    assert len(chosen_on) == 12
    assert {e.class_id for e in chosen_on} == set(held_out)
    assert all({(e.query, e.class_id), (e.supports[0], e.class_id)} <= set(clean) for e in chosen_on)
    assert all(scanned.class_names[c] in drawn.selection for c in held_out)
    assert drawn.split_lists == f"rule: at least {MIN_PX} px"


@pytest.mark.parametrize("fold", range(4))
def test_a_fold_is_tested_on_novel_classes_only(
    config: CrossValidationConfig, scanned: Scan, images: ImageStore, fold: int
) -> None:
    drawn = drawn_test(config, scanned, fold)
    novel = novel_classes("shapes", fold)
    test = episodes(config, drawn, images, "test")
    assert len(test) == 40
    assert {e.class_id for e in test} == set(drawn.novel_classes) == set(novel)
    contents = {image_id: (subset, pixels) for image_id, subset, pixels in images.contents()}
    val = sorted(
        (i, c) for i, (subset, pixels) in contents.items() if subset == "val"
        for c, px in pixels.items() if c in novel and px >= MIN_PX
    )  # fmt: skip
    assert drawn.test_pairs == len(val)
    # As published, the test walks through the list.
    assert [(e.query, e.class_id) for e in test] == [val[i % len(val)] for i in range(40)]
    assert all((e.supports[0], e.class_id) in val and e.supports[0] != e.query for e in test)
    assert drawn.protocol == Protocol(
        name="published draw, 40 episodes", draw="published", episodes=40, seeds=(0,), shot=1, resize="square",
        side_px=33, ignore="excluded", mask_mode=images.manifest.mask_mode, split_lists=f"rule: at least {MIN_PX} px",
        novel_removed=True, selection=drawn_training(config, scanned, fold).selection,
    )  # fmt: skip
    assert drawn.protocol.label == "published draw, 40 episodes, 1-shot, square 33 px"
    assert [(test.shot, test.seed, test.split) for test in drawn.tests] == [(1, 0, "test")]
    assert drawn.tests[0].episodes_hash == drawn.episodes_hash == episodes_hash(test)
    # The baseline's threshold is chosen on what training draws from.
    training = drawn_training(config, scanned, fold)
    threshold = episodes(config, drawn, images, "threshold")
    assert len(threshold) == 15
    assert {(e.query, e.class_id) for e in threshold} <= set(pairs(config, training, images))


def test_novel_classes_stay_in_training_images_where_that_is_asked_for(
    config: CrossValidationConfig, scanned: Scan, images: ImageStore
) -> None:
    keeping = replace(config, remove_novel="no")
    drawn = drawn_training(keeping, scanned)
    contents = {image_id: pixels for image_id, _, pixels in images.contents()}
    kept = pairs(keeping, drawn, images)
    assert drawn.removed_pairs == 0
    assert any(set(contents[image_id]) & set(novel_classes("shapes", 0)) for image_id, _ in kept)
    assert not {c for _, c in kept} & set(novel_classes("shapes", 0))
    assert len(kept) > drawn_training(config, scanned).training_pairs


def test_the_balanced_draw_takes_classes_in_turn_and_follows_its_seed(
    config: CrossValidationConfig, scanned: Scan, images: ImageStore
) -> None:
    def balanced(seed: int) -> tuple[DrawnTest, list[Episode[str]]]:
        chosen = replace(
            config, shot=2, evaluation=replace(config.evaluation, protocol="balanced", evaluation_seeds=(seed,))
        )
        drawn = drawn_test(chosen, scanned)
        return drawn, episodes(chosen, drawn, images, "test")

    (drawn, test), (other_drawn, other) = balanced(0), balanced(5)
    assert [{e.class_id for e in test[i : i + 5]} for i in range(0, 40, 5)] == [set(range(5))] * 8
    assert all(len({e.query, *e.supports}) == 3 for e in test)
    assert drawn.protocol.label == "balanced draw, 40 episodes, 2-shot, square 33 px"
    assert other_drawn.protocol.label == "balanced draw, 40 episodes, 2-shot, square 33 px, seed 5"
    assert test != other
    assert drawn.episodes_hash != other_drawn.episodes_hash
    assert balanced(0)[0].episodes_hash == drawn.episodes_hash


def test_selection_novel_is_on_the_test_episodes_and_says_so(
    config: CrossValidationConfig, scanned: Scan, images: ImageStore
) -> None:
    novel = replace(config, validation=replace(config.validation, selection="novel"))
    training, test = drawn_training(novel, scanned), drawn_test(novel, scanned)
    assert episodes(novel, training, images, "validation") == episodes(novel, test, images, "test")
    assert training.selection == "best epoch on the test episodes, as published"
    assert training.base_classes == base_classes("shapes", 0)
    assert test.protocol.selection == training.selection

    last = replace(config, validation=replace(config.validation, selection="last"))
    assert episodes(last, drawn_training(last, scanned), images, "validation") == []
    assert drawn_training(last, scanned).selection == "last epoch, none chosen"


def test_the_test_episodes_are_read_back_as_drawn_or_refused_by_name(
    config: CrossValidationConfig, scanned: Scan, images: ImageStore, tmp_path: Path
) -> None:
    drawn = drawn_test(config, scanned)
    named = episodes(config, drawn, images, "test")
    rows = [Episode(images.row(e.query), tuple(images.row(i) for i in e.supports), e.class_id) for e in named]
    assert read_test(config, drawn, images) == [(drawn.tests[0], rows)]
    # The hash is of image ids: other images behind the same rows are another test.
    order = range(len(images))[::-1]
    shifted = SimpleNamespace(uri=images.uri, image_id=lambda row: images.image_id(order[row]))
    folder = storage.join(config.store, drawn.folder)
    with pytest.raises(InputError, match=rf"{drawn.episodes_hash} in '{folder}/.* delete the folder '{folder}'"):
        read_test(config, drawn, shifted)  # type: ignore[arg-type]

    copied = replace(config, store=str(shutil.copytree(config.store, tmp_path / "store")))
    table = Path(copied.store, drawn.folder, EPISODES)
    write_episodes(str(table), images, 0, {"test": named[1:], "threshold": []})
    with pytest.raises(InputError, match=rf"expected the table '{table}' as it was drawn"):
        read_test(copied, drawn, images)


def test_equal_tests_have_equal_hashes_whatever_the_store(config: CrossValidationConfig, scanned: Scan) -> None:
    larger = replace(config, images=ImageFormat(image_size_px=65))
    done(preprocess.stages(larger, scanned))
    first, second = drawn_test(config, scanned), drawn_test(larger, scanned)
    assert first.store != second.store
    assert first.episodes_hash == second.episodes_hash


def changed(
    config: CrossValidationConfig, scanned: Scan, changes: Mapping[str, Mapping[str, Any]], plain: Mapping[str, Any]
) -> tuple[bool, bool]:
    """Whether the training's and the test's key change."""
    nested = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
    before, after = keys(config, scanned), keys(replace(config, **nested, **plain), scanned)
    return before[0] != after[0], before[1] != after[1]


@pytest.mark.parametrize(
    ("selection", "changes", "plain", "expected"),
    [
        ("base", {"evaluation": {"evaluation_episodes": 41}}, {}, (False, True)),
        ("base", {"evaluation": {"protocol": "balanced"}}, {}, (False, True)),
        ("base", {"evaluation": {"protocol": "published-5x1000"}}, {}, (False, True)),
        # With the number given, only the draw and the seeds are the protocol's.
        ("base", {"evaluation": {"protocol": "published-10000"}}, {}, (False, False)),
        ("base", {"evaluation": {"threshold_episodes": 16}}, {}, (False, True)),
        ("base", {"evaluation": {"evaluation_seeds": (5,)}}, {}, (False, True)),
        ("base", {"evaluation": {"evaluation_seeds": (0,)}}, {}, (False, False)),
        ("base", {"evaluation": {"evaluation_shots": (5,)}}, {}, (False, True)),
        ("base", {"evaluation": {"evaluation_shots": (1,)}}, {}, (False, False)),
        ("base", {"evaluation": {"resize": "original"}}, {}, (False, True)),
        ("base", {"evaluation": {"ignored": "background"}}, {}, (False, True)),
        ("base", {"evaluation": {"panels_each": 5, "bootstrap_samples": 9, "evaluation_batch": 3}}, {}, (False, False)),
        # The epoch is chosen on the first seed's episodes.
        ("novel", {"evaluation": {"evaluation_seeds": (0, 5), "evaluation_shots": (2,)}}, {}, (False, True)),
        ("novel", {"evaluation": {"evaluation_seeds": (5, 0)}}, {}, (True, True)),
        ("novel", {"evaluation": {"resize": "original"}}, {}, (False, True)),
        ("novel", {"evaluation": {"evaluation_episodes": 41}}, {}, (True, True)),
        ("novel", {"evaluation": {"threshold_episodes": 16}}, {}, (False, True)),
        ("base", {"validation": {"validation_episodes": 13}}, {}, (True, False)),
        ("novel", {"validation": {"validation_episodes": 13}}, {}, (False, False)),
        ("last", {"validation": {"validation_episodes": 13}}, {}, (False, False)),
        # The threshold is chosen on the classes that training draws from.
        ("base", {"validation": {"held_out_classes": 2}}, {}, (True, True)),
        ("novel", {"validation": {"held_out_classes": 2}}, {}, (False, False)),
        ("last", {"validation": {"held_out_classes": 2}}, {}, (False, False)),
        ("novel", {"validation": {"selection": "last"}}, {}, (True, True)),
        ("base", {"validation": {"selection": "last"}}, {}, (True, True)),
        ("base", {"training": {"seed": 1}}, {}, (True, True)),
        ("base", {"training": {"epochs": 7, "learning_rate": 0.5}}, {}, (False, False)),
        ("base", {"model": {"backbone": "resnet18"}, "compute": {"workers": 2}}, {}, (False, False)),
        ("base", {"images": {"image_size_px": 65}}, {}, (True, True)),
        ("base", {}, {"shot": 2}, (True, True)),
        ("base", {}, {"remove_novel": "no"}, (True, True)),
        ("base", {}, {"remove_novel": "yes"}, (False, False)),
        ("base", {}, {"min_object_px": 61}, (True, True)),
        ("base", {}, {"skip_small_classes": True}, (True, True)),
        ("base", {}, {"store": "memory://elsewhere", "folds": (1,), "precision": "bfloat16"}, (False, False)),
    ],
)  # fmt: skip
def test_a_setting_changes_the_key_of_what_it_acts_on(
    config: CrossValidationConfig,
    scanned: Scan,
    selection: str,
    changes: dict[str, dict[str, Any]],
    plain: dict[str, Any],
    expected: tuple[bool, bool],
) -> None:
    start = replace(config, validation=replace(config.validation, selection=selection))  # type: ignore[arg-type]
    assert changed(start, scanned, changes, plain) == expected


def test_what_was_trained_before_protocols_had_names_is_found_again(
    config: CrossValidationConfig, scanned: Scan
) -> None:
    """The keys as they were made then, written out."""
    sealed = preprocess.stages(config, scanned).key
    old = ["draw training", 2, sealed, f"rule {MIN_PX}", 0, 1, True, False, 0]
    novel = replace(config, validation=replace(config.validation, selection="novel"))
    balanced = replace(novel, evaluation=replace(config.evaluation, protocol="balanced", evaluation_seeds=(5,)))
    for now, then in (
        (config, ["base", [3, 12]]),
        (novel, ["novel", ["published", 40, None]]),
        (balanced, ["novel", ["balanced", 40, 5]]),
    ):
        assert f"-{fingerprint(*old, *then)}/" in keys(now, scanned)[0]


@pytest.mark.parametrize("protocol", ["published", "balanced"])
def test_several_seeds_and_shots_are_lists_of_one_table(
    config: CrossValidationConfig, scanned: Scan, images: ImageStore, protocol: Any
) -> None:
    one = replace(config, evaluation=replace(config.evaluation, protocol=protocol))
    several = replace(
        one,
        evaluation=replace(one.evaluation, evaluation_seeds=(0, 7), evaluation_shots=(2, 1)),
        validation=replace(config.validation, selection="novel"),
    )
    drawn, training = drawn_test(several, scanned), drawn_training(several, scanned)
    assert [(test.shot, test.seed) for test in drawn.tests] == [(1, 0), (1, 7), (2, 0), (2, 7)]
    lists = read_test(several, drawn, images)
    assert [test for test, _ in lists] == drawn.tests
    assert len({test.split for test, _ in lists}) == len({test.episodes_hash for test, _ in lists}) == 4
    for test, drawn_episodes in lists:
        assert len(drawn_episodes) == 40
        assert all(len(e.supports) == test.shot and e.query not in e.supports for e in drawn_episodes)
    # A list is the same whatever is drawn beside it, and the hash of the whole is of both seeds in order.
    assert drawn.tests[0].episodes_hash == drawn_test(one, scanned).episodes_hash
    both = [e.named(images.image_id) for _, drawn_episodes in lists[:2] for e in drawn_episodes]
    assert drawn.episodes_hash == episodes_hash(both)
    assert drawn.episodes_hash not in {test.episodes_hash for test in drawn.tests}
    # The epoch is chosen on the first of them, and the label says so.
    chosen_on = episodes(several, training, images, "validation")
    assert chosen_on == [e.named(images.image_id) for e in lists[0][1]]
    assert drawn.protocol.selection == f"{training.selection} (of seed 0)"
    assert drawn.protocol.seeds == (0, 7)
    assert drawn.protocol.label == f"{protocol} draw, 40 episodes, 1-shot, square 33 px, seeds 0, 7"
    assert DrawnTest.from_json(drawn.to_text()) == drawn


def test_how_it_is_judged_is_recorded_and_draws_nothing_else(config: CrossValidationConfig, scanned: Scan) -> None:
    judged = replace(config, evaluation=replace(config.evaluation, resize="original", ignored="background"))
    drawn, plain = drawn_test(judged, scanned), drawn_test(config, scanned)
    assert drawn.protocol == replace(plain.protocol, resize="original", ignore="background")
    assert replace(drawn, protocol=plain.protocol, folder=plain.folder) == plain
    assert drawn.protocol.label.endswith("square 33 px, original size, ignored pixels as background")


def test_other_images_and_other_folds_are_other_draws(config: CrossValidationConfig, scanned: Scan) -> None:
    other = keys(config, replace(scanned, fingerprint="0" * 64))
    assert not set(other) & set(keys(config, scanned))
    every = [stage.key for fold in range(4) for stage in stages(config, scanned, fold)]
    assert len(set(every)) == 8


def write_lists(folder: Path, images: ImageStore, few: int | None = None, extra: str = "") -> Path:
    """The field's layout: all pairs of the store; of the class `few` only one test and one training image."""
    lines: dict[str, list[str]] = {}
    counts: dict[tuple[str, int], int] = {}
    for image_id, subset, pixels in images.contents():
        for c in pixels:
            counts[subset, c] = counts.get((subset, c), 0) + 1
            if c != few or counts[subset, c] == 1:
                name = f"{'trn' if subset == 'train' else 'val'}/fold{c // 5}.txt"
                lines.setdefault(name, []).append(f"{image_id}__{c + 1}")
    if extra:
        lines["val/fold0.txt"].append(f"{extra}__1")
    for name, pairs_of in lines.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(pairs_of))
    return folder


def test_given_lists_win_over_the_rule_and_are_part_of_the_key(
    config: CrossValidationConfig, scanned: Scan, images: ImageStore, tmp_path: Path
) -> None:
    listed = replace(config, split_lists=str(write_lists(tmp_path / "a", images)))
    drawn = drawn_test(listed, scanned)
    assert drawn.test_pairs == sum(c < 5 for _, subset, px in images.contents() if subset == "val" for c in px)
    assert drawn.test_pairs > drawn_test(config, scanned).test_pairs
    assert drawn_training(listed, scanned).split_lists.startswith("lists:")
    # With lists the rule is of no matter; the lists' content is, not where they lie.
    assert changed(listed, scanned, {}, {"min_object_px": 61}) == (False, False)
    assert changed(listed, scanned, {}, {"split_lists": str(write_lists(tmp_path / "b", images))}) == (False, False)
    fewer = str(write_lists(tmp_path / "c", images, few=2))
    assert changed(listed, scanned, {}, {"split_lists": fewer}) == (True, True)


@pytest.mark.parametrize("protocol", ["published", "balanced"])
def test_a_novel_class_with_too_few_images_is_an_error_or_left_out_by_name(
    config: CrossValidationConfig, scanned: Scan, images: ImageStore, tmp_path: Path, protocol: Any
) -> None:
    lists = str(write_lists(tmp_path, images, few=2))
    evaluation = replace(config.evaluation, protocol=protocol)
    small = replace(config, split_lists=lists, evaluation=evaluation)
    name = scanned.class_names[2]
    with pytest.raises(InputError, match=rf"every class needs 2 images or more .*too few: {name} \(1\)"):
        drawn_test(small, scanned)

    skipping = replace(small, skip_small_classes=True)
    drawn = drawn_test(skipping, scanned)
    assert drawn.left_out == (name,)
    assert drawn.novel_classes == (0, 1, 3, 4)
    assert {e.class_id for e in episodes(skipping, drawn, images, "test")} == {0, 1, 3, 4}
    assert drawn.protocol.label.endswith("40 episodes, 1-shot, square 33 px, 4 of 5 classes")


def test_a_base_class_with_too_few_images_is_an_error_or_left_out_by_name(
    config: CrossValidationConfig, scanned: Scan, images: ImageStore, tmp_path: Path
) -> None:
    small_class = next(c for c in base_classes("shapes", 0) if c not in published_partition("shapes").held_out(0, 3, 0))
    small = replace(config, split_lists=str(write_lists(tmp_path, images, few=small_class)))
    name = scanned.class_names[small_class]
    with pytest.raises(InputError, match=rf"too few: {name} \([01]\)"):
        drawn_training(small, scanned)
    drawn = drawn_training(replace(small, skip_small_classes=True), scanned)
    assert drawn.left_out == (name,)
    assert small_class not in drawn.base_classes
    assert len(drawn.base_classes) == 11


def test_a_held_out_class_with_too_few_images_is_left_out_of_the_choice(
    config: CrossValidationConfig, scanned: Scan, images: ImageStore, tmp_path: Path
) -> None:
    small_class, *others = published_partition("shapes").held_out(0, 3, 0)
    small = replace(config, split_lists=str(write_lists(tmp_path, images, few=small_class)))
    with pytest.raises(InputError, match=f"too few: {scanned.class_names[small_class]}"):
        drawn_training(small, scanned)
    skipping = replace(small, skip_small_classes=True)
    drawn = drawn_training(skipping, scanned)
    assert drawn.left_out == (scanned.class_names[small_class],)
    assert {e.class_id for e in episodes(skipping, drawn, images, "validation")} == set(others)
    named = ", ".join(scanned.class_names[c] for c in others)
    assert drawn.selection == f"best epoch on held-out base classes ({named})"


def test_lists_that_name_absent_images_are_refused(
    config: CrossValidationConfig, scanned: Scan, images: ImageStore, tmp_path: Path
) -> None:
    listed = replace(config, split_lists=str(write_lists(tmp_path, images, extra="2007_000033")))
    with pytest.raises(InputError, match=r"found 1 missing \(first: 2007_000033\); give the lists made for"):
        drawn_training(listed, scanned)
    with pytest.raises(InputError, match="found 1 missing"):
        drawn_test(listed, scanned)


def test_a_damaged_shard_is_found_before_anything_trains_on_it(
    config: CrossValidationConfig, scanned: Scan, images: ImageStore, tmp_path: Path
) -> None:
    copied = replace(config, store=str(shutil.copytree(config.store, tmp_path / "store")))
    shard = Path(preprocess.store_uri(copied, scanned), images.manifest.shards[0].name)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    training = stages(replace(copied, training=TrainingConfig(seed=8)), scanned)[0]
    with pytest.raises(InputError, match=f"expected sha256 .* in shard {shard.name} of the store"):
        training.run(*training.arguments, {})
