"""One definition for flags, files and fingerprints."""

from __future__ import annotations

import json
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mshnet.config import ModelConfig, TrainingConfig
from mshnet.data.own import OwnData
from mshnet.errors import InputError
from mshnet.protocols import EPISODES, Episodes
from pipelines import recipes
from pipelines.config import (
    ComputeConfig,
    CrossValidationConfig,
    EvaluationConfig,
    JobArguments,
    ProtocolName,
    ValidationConfig,
    fingerprint,
    judging_key,
    parse,
    replay,
)

RECIPES = [
    (recipe, data)
    for recipe in ("default", "paper", "published", "quick", "demo")
    for data in ("", "pascal", "coco", "fss")
]


def parsed(*argv: str) -> CrossValidationConfig:
    return parse(JobArguments, argv, "job", "A job.").cross_validation


@pytest.mark.parametrize(("recipe", "dataset"), RECIPES)
def test_every_recipe_survives_json(recipe: str, dataset: str) -> None:
    config = replace(recipes.named(recipe, dataset), folds=(2, 0))
    again = CrossValidationConfig.from_json(config.to_text())
    assert again == config
    assert again.folds == (2, 0)
    assert hash(again.training) == hash(config.training)


def test_a_file_replays_over_the_defaults_as_deep_as_it_goes() -> None:
    config = replay(recipes.paper(), {"shot": 5, "folds": [1], "training": {"learning_rate": 1, "seed": 7}})
    expected = recipes.paper()
    assert config == replace(
        expected, shot=5, folds=(1,), training=replace(expected.training, learning_rate=1.0, seed=7)
    )
    assert isinstance(config.training.learning_rate, float)
    assert replay(expected, {}) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 5}, r"unknown \['shots'\]"),
        ({"training": {"lr": 1}}, r"CrossValidationConfig.training: .*unknown \['lr'\]"),
        ({"shot": "5"}, r"CrossValidationConfig.shot: expected int, got str \('5'\)"),
        ({"shot": True}, "CrossValidationConfig.shot: expected int, got bool"),
        ({"shot": 1.0}, "CrossValidationConfig.shot: expected int, got float"),
        ({"training": 3}, "CrossValidationConfig.training: expected an object"),
        ({"folds": 1}, "CrossValidationConfig.folds: expected tuple, got int"),
        ({"folds": [0, "1"]}, r"CrossValidationConfig.folds\[1\]: expected int, got str"),
        ({"model": {"backbone": "vgg"}}, "CrossValidationConfig.model.backbone: expected 'resnet18' or"),
        ({"compute": {"use_gpu": 1}}, "CrossValidationConfig.compute.use_gpu: expected bool, got int"),
    ],
)
def test_a_replayed_file_is_checked_by_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replay(recipes.paper(), changes)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ValidationConfig, {"selection": "best"}, "selection must be base, novel or last, got 'best'"),
        (
            ValidationConfig,
            {"held_out_classes": -1},
            "held_out_classes must be 0 or more and validation_episodes 1 or more, got -1 and 200",
        ),
        (
            ValidationConfig,
            {"validation_episodes": 0},
            "held_out_classes must be 0 or more and validation_episodes 1 or more, got 3 and 0",
        ),
        (
            EvaluationConfig,
            {"protocol": "random"},
            "protocol must be one of published, published-5x1000, published-10000, balanced, got 'random'",
        ),
        (EvaluationConfig, {"resize": "half"}, "resize must be square or original, got 'half'"),
        (EvaluationConfig, {"ignored": "kept"}, "ignored must be excluded or background, got 'kept'"),
        (
            EvaluationConfig,
            {"evaluation_episodes": -1},
            "evaluation_episodes must be 1 or more, or 0 for the protocol's own, got -1",
        ),
        (EvaluationConfig, {"evaluation_seeds": (-1,)}, "evaluation_seeds must be distinct and 0..2^32 - 1, got (-1,)"),
        (
            EvaluationConfig,
            {"evaluation_seeds": (2**32,)},
            "evaluation_seeds must be distinct and 0..2^32 - 1, got (4294967296,)",
        ),
        (
            EvaluationConfig,
            {"evaluation_seeds": (1, 1)},
            "evaluation_seeds must be distinct and 0..2^32 - 1, got (1, 1)",
        ),
        (EvaluationConfig, {"evaluation_shots": (0,)}, "evaluation_shots must be distinct and 1 or more, got (0,)"),
        (EvaluationConfig, {"evaluation_shots": (5, 5)}, "evaluation_shots must be distinct and 1 or more, got (5, 5)"),
        (EvaluationConfig, {"bootstrap_samples": 0}, "bootstrap_samples must be 1 or more, got 0"),
        (EvaluationConfig, {"evaluation_batch": 0}, "evaluation_batch must be 1 or more, got 0"),
        (EvaluationConfig, {"threshold_episodes": 0}, "threshold_episodes must be 1 or more, got 0"),
        (EvaluationConfig, {"panels_each": 0}, "panels_each must be 1 or more, got 0"),
        (ComputeConfig, {"workers": 0}, "workers and cpus_per_worker must be 1 or more, got 0 and 1"),
        (ComputeConfig, {"cpus_per_worker": 0}, "workers and cpus_per_worker must be 1 or more, got 1 and 0"),
        (ComputeConfig, {"loader_processes": -1}, "loader_processes must be 0 or more, got -1"),
        (ComputeConfig, {"feature_cache_gib": -0.5}, "feature_cache_gib must be 0 or more, got -0.5"),
        (ComputeConfig, {"feature_cache_gib": float("nan")}, "feature_cache_gib must be 0 or more, got nan"),
        (ComputeConfig, {"feature_cache_gib": float("inf")}, "feature_cache_gib must be 0 or more, got inf"),
        (ComputeConfig, {"feature_spill_gib": -1.0}, "feature_spill_gib must be 0 or more, got -1.0"),
        (ComputeConfig, {"evaluation_workers": -1}, "evaluation_workers must be 0 or more, got -1"),
        (ComputeConfig, {"max_failures": -1}, "max_failures must be 0 or more, got -1"),
        (ComputeConfig, {"checkpoint_every_steps": -1}, "checkpoint_every_steps must be 0 or more, got -1"),
        (
            CrossValidationConfig,
            {"dataset": "imagenet"},
            "dataset must be one of pascal, coco, shapes, coco-json, voc, fss, got 'imagenet'",
        ),
        (CrossValidationConfig, {"folds": (0, 4)}, "fold must be 0..3, got 4"),
        (CrossValidationConfig, {"folds": ()}, "folds must be distinct and at least one of 0..3, got ()"),
        (CrossValidationConfig, {"folds": (1, 1)}, "folds must be distinct and at least one of 0..3, got (1, 1)"),
        (CrossValidationConfig, {"shot": 0}, "shot must be 1 or more, got 0"),
        (
            CrossValidationConfig,
            {"images_per_shard": 0},
            "images_per_shard and min_object_px must be 1 or more, got 0 and 2048",
        ),
        (
            CrossValidationConfig,
            {"min_object_px": 0},
            "images_per_shard and min_object_px must be 1 or more, got 2000 and 0",
        ),
        (
            CrossValidationConfig,
            {"compute": ComputeConfig(workers=9)},
            "every worker needs an episode of each part of the global batch: workers must be at most 8, got 9",
        ),
    ],
)
def test_values_are_checked_on_construction(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        kind(**values)
    assert str(raised.value) == message


def test_what_follows_from_the_configuration() -> None:
    assert [CrossValidationConfig(dataset=d).removes_novel for d in ("pascal", "coco", "shapes")] == [True, False, True]
    assert not CrossValidationConfig(dataset="pascal", remove_novel="no").removes_novel
    assert CrossValidationConfig(dataset="coco", remove_novel="yes").removes_novel
    assert CrossValidationConfig(dataset="coco", shot=5).model_name == "mshnet-coco-resnet50-5shot"
    alone = CrossValidationConfig(dataset="pascal", model=ModelConfig(similarity="cosine"))
    assert alone.model_name == "mshnet-pascal-resnet50-cosine-1shot"
    assert CrossValidationConfig(registered_model="mine").model_name == "mine"
    assert CrossValidationConfig(shot=5).test_shots == (5,)
    both = CrossValidationConfig(shot=5, evaluation=EvaluationConfig(evaluation_shots=(1, 5, 2)))
    assert both.test_shots == (5, 1, 2)
    assert ComputeConfig(feature_spill_gib=0.25).feature_spill_bytes == 268_435_456
    assert ComputeConfig(feature_cache_gib=1.5).feature_cache_bytes == 1_610_612_736
    assert ComputeConfig(feature_cache_gib=1.5, use_gpu=True).feature_cache_bytes == 0


def test_test_episodes_follow_from_the_protocol_unless_they_are_given() -> None:
    assert set(typing.get_args(ProtocolName)) == set(EPISODES)
    for name, episodes in EPISODES.items():
        assert EvaluationConfig(protocol=name).episodes == episodes  # type: ignore[arg-type]
    fewer = EvaluationConfig(protocol="published-5x1000", evaluation_episodes=20)
    assert fewer.episodes == Episodes("published", 20, (0, 1, 2, 3, 4))
    assert EvaluationConfig(evaluation_seeds=(7, 3)).episodes == Episodes("published", 1000, (7, 3))
    flags = ("--protocol", "balanced", "--evaluation-seeds", "4", "2", "--evaluation-shots", "1", "5")
    asked = parsed(*flags, "--resize", "original", "--ignored", "background").evaluation
    assert asked.episodes == Episodes("balanced", 100, (4, 2))  # the demo's number
    assert (asked.evaluation_shots, asked.resize, asked.ignored) == ((1, 5), "original", "background")


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({"resize": "original"}, True),
        ({"ignored": "background"}, True),
        ({"evaluation_batch": 4}, True),
        ({"bootstrap_samples": 10}, True),
        ({"panels_each": 1}, True),
        # These make other episodes, whose key has them.
        ({"protocol": "balanced", "evaluation_episodes": 7, "evaluation_seeds": (1,)}, False),
    ],
)
def test_a_way_of_judging_changes_the_key_of_judging(changes: dict[str, Any], other: bool) -> None:
    config = recipes.paper()
    changed = replace(config, evaluation=replace(config.evaluation, **changes))
    assert (judging_key(changed) != judging_key(config)) == other
    assert judging_key(replace(changed, compute=ComputeConfig(evaluation_workers=3))) == judging_key(changed)
    assert len(fingerprint(judging_key(changed))) == 12


def test_a_fingerprint_stays_what_it_was() -> None:
    # By sha256sum over ["images", 1, {"quality": 95, "size": 65}, [1, 2.5, null]].
    assert fingerprint("images", 1, {"size": 65, "quality": 95}, [1, 2.5, None]) == "726ab1f78b67"
    assert fingerprint("images", 1, {"quality": 95, "size": 65}, (1, 2.5, None)) == "726ab1f78b67"
    assert fingerprint("images", 1, {"size": 65, "quality": 95}, [1, 2.5, 0]) != "726ab1f78b67"
    assert fingerprint("a", "b") != fingerprint("ab")


def test_no_flags_give_the_demo_and_a_recipe_gives_its_own() -> None:
    assert parsed() == recipes.demo()
    assert parsed("--recipe", "paper") == recipes.paper("pascal")
    assert parsed("--recipe=published", "--dataset", "coco") == recipes.published("coco")
    assert parsed("--dataset=pascal") == recipes.default("pascal")


def test_flags_reach_every_group() -> None:
    config = parsed(
        *("--folds", "2", "0", "--shot", "5", "--image-size-px", "97", "--backbone", "resnet34", "--epochs", "7"),
        *("--selection", "last", "--panels-each", "2", "--workers", "2", "--skip-small-classes"),
    )
    assert (config.folds, config.shot, config.images.image_size_px, config.model.backbone) == (
        (2, 0),
        5,
        97,
        "resnet34",
    )
    assert (config.training.epochs, config.validation.selection) == (7, "last")
    assert (config.evaluation.panels_each, config.compute.workers, config.skip_small_classes) == (2, 2, True)
    assert config.training.learning_rate == recipes.demo().training.learning_rate


def write(folder: Path, content: Any) -> str:
    file = folder / "config.json"
    file.write_text(json.dumps(content))
    return str(file)


def test_a_files_data_set_chooses_the_recipe_and_flags_win(tmp_path: Path) -> None:
    file = write(tmp_path, {"dataset": "pascal", "shot": 5, "training": {"epochs": 20, "seed": 3}})
    default = recipes.default("pascal")
    expected = replace(default, shot=5, training=replace(default.training, epochs=20, seed=3))
    assert parsed("--config", file) == expected
    assert parsed("--shot", "2", f"--config={file}", "--epochs", "4") == replace(
        expected, shot=2, training=replace(expected.training, epochs=4)
    )
    published = recipes.published("pascal")
    assert parsed("--recipe", "published", "--config", file) == replace(
        published, shot=5, training=replace(published.training, epochs=20, seed=3)
    )


def test_what_a_run_recorded_replays_exactly(tmp_path: Path) -> None:
    config = replace(recipes.published("coco"), training=TrainingConfig(seed=9), folds=(3,), store="s3://bucket/store")
    assert parsed("--config", write(tmp_path, config.to_json())) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shot", "0"], "shot must be 1 or more, got 0"),
        (["--folds", "0", "0"], "folds must be distinct and at least one of 0..3, got (0, 0)"),
        (["--recipe", "slow"], "job: recipe must be one of default, paper, published, quick, demo, got 'slow'"),
        (["--shot", "many"], "many"),
        (["--learning-speed", "1"], "--learning-speed"),
        (["--config", "absent.json"], "job: no configuration file 'absent.json'"),
        (["--config", "."], "job: no configuration file '.'"),
        (["--config", "broken.json"], "job: expected JSON in 'broken.json'"),
        (["--config", "list.json"], "job: expected an object in 'list.json', found list"),
        (["--config", "unknown.json"], "unknown ['shots']"),
    ],
)
def test_bad_usage_exits_with_2_and_says_why_on_stderr(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("broken", "{"), ("list", "[1]"), ("unknown", '{"shots": 5}')):
        Path(f"{name}.json").write_text(text)
    with pytest.raises(SystemExit) as exited:
        parsed(*argv)
    assert exited.value.code == 2
    captured = capsys.readouterr()
    # tyro draws a box around its own messages and breaks their lines.
    assert message in " ".join(captured.err.replace("│", " ").split())
    assert captured.out == ""


OWN = ("--dataset", "coco-json", "--images", "pictures", "--annotations", "a.json")


def test_flags_of_own_data() -> None:
    config = parsed(*OWN, "--data-name", "parts", "--shot", "5")
    assert config.own == OwnData(images="pictures", annotations="a.json", data_name="parts")
    assert (config.folds, config.fold_total, config.is_own) == ((0, 1, 2, 3), 4, True)
    assert config.removes_novel
    assert (config.validation.held_out_classes, config.evaluation.protocol) == (0, "balanced")
    assert config.model_name == "mshnet-parts-resnet50-5shot"
    assert parsed(*OWN).model_name == "mshnet-coco-json-resnet50-1shot"
    assert not recipes.paper().is_own


def test_all_folds_are_run_unless_some_are_named(tmp_path: Path) -> None:
    assert parsed(*OWN, "--fold-count", "3").folds == (0, 1, 2)
    assert parsed(*OWN, "--fold-count=6").folds == (0, 1, 2, 3, 4, 5)
    assert parsed(*OWN, "--fold_count", "3", "--folds", "2").folds == (2,)
    recorded = write(tmp_path, parsed(*OWN, "--fold-count", "3").to_json())
    assert parsed("--config", recorded).folds == (0, 1, 2)
    assert parsed("--config", recorded, "--fold-count", "5").folds == (0, 1, 2, 3, 4)
    some = write(tmp_path, parsed(*OWN, "--fold-count", "3", "--folds", "1").to_json())
    assert parsed("--config", some).folds == (1,)
    assert parsed("--config", some, "--fold-count", "5").folds == (1,)


def test_the_file_of_classes_says_how_many_folds(tmp_path: Path) -> None:
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps({"folds": [["a"], ["b"], ["c"]]}))
    config = parsed(*OWN, "--classes", str(classes))
    assert (config.own.fold_count, config.folds) == (3, (0, 1, 2))
    again = write(tmp_path, config.to_json())
    classes.write_text(json.dumps({"folds": [["a"], ["b"]]}))
    assert parsed("--config", again).folds == (0, 1)
    classes.write_text(json.dumps({"leave_out": ["d"]}))
    assert parsed(*OWN, "--classes", str(classes), "--fold-count", "2").folds == (0, 1)
    with pytest.raises(SystemExit) as exited:
        parsed(*OWN, "--classes", str(tmp_path / "absent.json"))
    assert exited.value.code == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--images", "pictures"], "for one's own data (--dataset coco-json, voc, fss), got them with dataset shapes"),
        (["--dataset", "pascal", "--fold-count", "3"], "got them with dataset pascal; leave them out"),
        ([*OWN, "--protocol", "published"], "protocol must be balanced with coco-json, got 'published'"),
        ([*OWN, "--split-lists", "lists"], "split_lists are the field's"),
        ([*OWN, "--fold-count", "3", "--folds", "3"], "fold must be 0..2, got 3"),
        ([*OWN, "--fold-count", "0"], "fold_count must be 1 or more, got 0"),
        ([*OWN, "--fold-count", "some"], "some"),
        ([*OWN, "--data-name", "a/b"], "data_name must be a name without / : ' `"),
    ],
)
def test_bad_usage_of_own_data(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        parsed(*argv)
    assert exited.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_help_shows_the_recipes_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        parsed("--recipe", "published", "--help")
    assert exited.value.code == 0
    assert "(default: 0.025)" in capsys.readouterr().out
