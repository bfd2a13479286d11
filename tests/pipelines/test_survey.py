"""The data report: the command on files with faults, the same from the sealed store, its place in the job's graph."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mshnet.config import ImageFormat
from mshnet.data.class_choice import read_class_choice
from mshnet.data.own import OwnData
from mshnet.data.shapes_own import write_coco_json
from mshnet.data.source import open_source
from mshnet.errors import InputError
from pipelines import dag, draw, graph, job, preprocess, scan, storage, survey
from pipelines.config import CrossValidationConfig, EvaluationConfig, ValidationConfig
from pipelines.dag import Stage
from pipelines.drawn import DrawnTest, DrawnTraining
from pipelines.survey_page import CHOICE, NUMBERS, PAGE, TEXT
from pipelines.tracking import Tracker
from pipelines.tracking_client import client
from tests.mshnet.data.awkward import write_awkward_coco_json
from tests.pipelines.drawn_fold import done

EVIL = "<script>alert(1)</script>|`$x$`"
"""Of a class: it must come out as text everywhere."""


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures of 7 classes, the first one's name hostile."""
    root = tmp_path_factory.mktemp("labelled")
    write_coco_json(root, images=60, size_px=48)
    content = json.loads((root / "annotations.json").read_text())
    content["categories"][0]["name"] = EVIL
    (root / "annotations.json").write_text(json.dumps(content))
    return root


def config_of(root: Path, store: Path, **changes: Any) -> CrossValidationConfig:
    own = OwnData(images=str(root / "images"), annotations=str(root / "annotations.json"), fold_count=3)
    config = CrossValidationConfig(
        dataset="coco-json",
        source="",
        store=str(store),
        folds=(0, 1, 2),
        own=own,
        images=ImageFormat(image_size_px=33),
        min_object_px=40,
        validation=ValidationConfig(held_out_classes=1, validation_episodes=4),
        evaluation=EvaluationConfig(protocol="balanced", evaluation_episodes=12, threshold_episodes=6),
    )
    return job.resolved(replace(config, **changes))


def flags(config: CrossValidationConfig, out: Path) -> list[str]:
    return [
        *("--dataset", "coco-json", "--images", config.own.images, "--annotations", config.own.annotations),
        *("--fold-count", "3", "--min-object-px", "40", "--held-out-classes", "1", "--image-size-px", "33"),
        *("--out", str(out)),
    ]


def test_the_command_writes_a_page_and_says_what_to_expect(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(labelled, tmp_path / "store")
    out = tmp_path / "out"
    assert survey.main(flags(config, out)) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert (result["images"], result["classes"], result["folds"], result["problems"]) == (60, 7, 3, 0)
    assert "have a look: Few classes to learn from" in told.err
    assert result["report"] == str(out / PAGE)
    page, text = (out / PAGE).read_text(), (out / TEXT).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "picture missing" not in page + text
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page must need nothing from outside"
    assert page.count("data:image/jpeg") == 7
    for name in re.findall(r"\]\((pictures/[^)]*)\)", text):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "store").exists()
    numbers = json.loads((out / NUMBERS).read_text())
    assert [c["images"] for c in numbers["classes"]] == [sum(row) for row in _shown(config)]
    assert read_class_choice(str(out / CHOICE)).leave_out == ()


def _shown(config: CrossValidationConfig) -> list[list[bool]]:
    source = open_source(config.dataset, config.source, config.own)
    masks = [source.load(record).masks for record in source.records()]
    return [[class_id in of_image for of_image in masks] for class_id in range(7)]


def test_all_faults_are_in_the_report_and_the_exit_code_is_that_of_a_report(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    awkward = write_awkward_coco_json(tmp_path / "awkward")
    labels = json.loads(Path(awkward.own.annotations).read_bytes().decode("utf-8-sig"))
    labels["annotations"].append({**labels["annotations"][0], "id": "lost", "image_id": "nowhere"})
    Path(awkward.own.annotations).write_text(json.dumps(labels))
    picture = next(path for path in sorted(Path(awkward.own.images).rglob("*.jpg")))
    picture.write_bytes(picture.read_bytes()[:300])
    out = tmp_path / "out"
    arguments = [
        *("--dataset", "coco-json", "--images", awkward.own.images, "--annotations", awkward.own.annotations),
        *("--classes", awkward.own.classes, "--fold-count", "2", "--min-object-px", "50", "--out", str(out)),
    ]
    assert survey.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["expectations"][0] == ["stops", "2 images or files cannot be used"]
    page = (out / PAGE).read_text()
    assert "annotation lost is of image" in page
    assert "cannot decode" in page
    assert "the same picture as" in page
    assert "turned upright" in page
    # On top of the choice that was given: what nobody shows goes too, and the job takes the file.
    choice = read_class_choice(str(out / CHOICE))
    assert (dict(choice.merge), choice.leave_out) == ({"crack": ("crack",)}, ("dirt", "unused"))
    assert choice.apply(("manhole", "крыша 屋根", "crack", "dirt", "crack", "Pothole (large)", "unused"))


def test_data_that_cannot_be_counted_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert survey.main(["--dataset", "coco-json", "--images", str(tmp_path), "--annotations", "no.json"]) == 1
    assert "no.json" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        survey.main(["--dataset", "coco-json", "--small", "both"])
    assert ended.value.code == 2
    with pytest.raises(InputError, match="leave --dry-run out"):
        survey.SurveyArguments(dry_run=True)


@pytest.fixture(scope="module")
def sealed(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CrossValidationConfig, scan.Scan, Stage]:
    config = config_of(labelled, tmp_path_factory.mktemp("sealed") / "store")
    scanned = scan.scan_source(config)
    stage = preprocess.stages(config, scanned)
    done(stage)
    return config, scanned, stage


def test_the_job_s_report_counts_what_the_job_draws(
    sealed: tuple[CrossValidationConfig, scan.Scan, Stage], tmp_path: Path
) -> None:
    config, scanned, stage = sealed
    result = done(survey.stage(config, scanned, stage, ""))
    folder = survey.stage(config, scanned, stage, "").folder
    numbers = json.loads(storage.read_bytes(storage.join(folder, NUMBERS)))
    for fold in config.folds:
        training = DrawnTraining.from_json(done(draw.training_stage(config, scanned, stage, fold)))
        test = DrawnTest.from_json(done(draw.test_stage(config, scanned, stage, fold)))
        found = numbers["folds"][fold]
        assert found["training_pairs"] == training.training_pairs
        assert found["removed_pairs"] == training.removed_pairs
        assert found["test_pairs"] == test.test_pairs
        assert found["novel"] == [scanned.class_names[c] for c in test.novel_classes]
        assert found["training_classes"] == [scanned.class_names[c] for c in training.base_classes]
    # From the files the same is counted; only the store knows nothing of files that it has not.
    from_files = survey.survey_source(config, str(tmp_path))
    assert from_files["expectations"] == result["expectations"]
    assert numbers["folds"] == json.loads((tmp_path / NUMBERS).read_text())["folds"]
    assert "picture missing" not in storage.read_bytes(storage.join(folder, PAGE)).decode()
    assert survey.summary_text(result).startswith("What coco-json holds: 60 images, 7 classes\n  have a look: ")


def test_the_parent_run_gets_the_whole_report(
    sealed: tuple[CrossValidationConfig, scan.Scan, Stage], tmp_path: Path, empty_database: bytes
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database)
    config, scanned, stage = sealed
    config = replace(config, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", store=str(tmp_path / "store"))
    tracker = Tracker(config.tracking_uri, config.experiment)
    run_id = tracker.start_parent("parent", {}, {}, "key")
    of_run = survey.stage(config, scanned, stage, run_id)
    result = survey.survey_store(config, of_run.folder, stage.folder, run_id, {})
    assert result["parent_run_id"] == run_id
    assert of_run.complete(result)
    assert not survey.stage(config, scanned, stage, "another run").complete(result)
    logged = client(config.tracking_uri)
    names = {entry.path for entry in logged.list_artifacts(run_id, survey.ARTIFACTS)}
    assert {survey.ARTIFACT, f"{survey.ARTIFACTS}/{CHOICE}", f"{survey.ARTIFACTS}/pictures"} <= names


def test_small_classes_are_refused_by_the_report_as_by_the_job(
    sealed: tuple[CrossValidationConfig, scan.Scan, Stage],
) -> None:
    config, scanned, stage = sealed
    many = replace(config, shot=400)
    result = done(survey.stage(many, scanned, stage, ""))
    assert ["stops", "7 classes have too few images"] in result["expectations"]
    with pytest.raises(InputError, match="expected 401 images or more"):
        done(draw.training_stage(many, scanned, stage, 0))


def names(plan: dag.Plan) -> list[str]:
    return [stage.name for stage in plan.pending]


def test_training_waits_for_the_report_and_nothing_needs_it(
    sealed: tuple[CrossValidationConfig, scan.Scan, Stage],
) -> None:
    config, scanned, _ = sealed
    built = graph.build(config, scanned, "")
    assert built.surveyed is not None
    assert all(built.surveyed in trained.after for trained in built.trained)
    assert "data report" not in names(dag.plan([built.reported]))
    field = graph.build(CrossValidationConfig(), scan.UNKNOWN, "")
    assert field.surveyed is None
    assert all(trained.after == () for trained in field.trained[:1])


def test_the_report_is_made_where_anything_is_to_do(sealed: tuple[CrossValidationConfig, scan.Scan, Stage]) -> None:
    config, scanned, _ = sealed
    built = graph.build(config, scanned, "")
    targets = job.with_data_report(lambda built: [built.reported])
    assert [target.name for target in targets(built)] == ["report", "data report"]
    finished = job.with_data_report(lambda built: [built.sealed])
    assert [target.name for target in finished(built)] == ["seal the store"]


def test_the_stage_s_name_follows_what_it_counts_for(sealed: tuple[CrossValidationConfig, scan.Scan, Stage]) -> None:
    config, scanned, stage = sealed

    def key(**changes: Any) -> str:
        return survey.stage(replace(config, **changes), scanned, stage, "").key

    changed: list[Mapping[str, Any]] = [
        {"shot": 2}, {"min_object_px": 41}, {"remove_novel": "no"}, {"own": replace(config.own, fold_seed=1)},
        {"skip_small_classes": True}, {"validation": ValidationConfig(selection="last")},
    ]  # fmt: skip
    assert len({key(), *(key(**changes) for changes in changed)}) == 7
    assert key(experiment="other") == key()
