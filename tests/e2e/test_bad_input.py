"""Wrong input at the command line: one clear line, the right exit code, nothing lost and nothing started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, cross_validate, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--folds", "7"], "fold must be 0..3, got 7"),
        (["--shot", "0"], "shot must be 1 or more, got 0"),
        (["--no-such-option", "1"], "no-such-option"),
        (["--backbone", "vgg16"], "vgg16"),
        (["--recipe", "unheard"], "recipe must be one of default, paper, published, quick, demo, got 'unheard'"),
        (["--workers", "5"], "workers must be at most 4, got 5"),
        (["--config", "absent.json"], "no configuration file 'absent.json'"),
    ],
)
def test_usage_errors_exit_with_2_and_touch_nothing(tmp_path: Path, flags: list[str], message: str) -> None:
    outcome = run(cross_validate(*flags), tmp_path)
    assert outcome.code == 2
    assert message in " ".join(outcome.stderr.replace("│", " ").split())
    assert outcome.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shot": "five"}, "shot: expected int, got str"),
        ({"trainig": {"epochs": 1}}, "unknown ['trainig']"),
        ({"training": {"epochs": 0}}, "epochs must be 1 or more, got 0"),
    ],
)
def test_a_wrong_configuration_file_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    (tmp_path / "wrong.json").write_text(json.dumps(changes))
    outcome = run(cross_validate("--config", "wrong.json"), tmp_path)
    assert outcome.code == 2
    assert message in outcome.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "pascal", "--source", "nowhere"], "nowhere"),
        (["--dataset", "coco", "--source", "nowhere"], "nowhere"),
        (["--backbone-weights", "absent.safetensors"], "no weights at"),
        (["--split-lists", "nowhere"], "nowhere"),
    ],
)
def test_absent_input_exits_with_1_before_anything_starts(
    tmp_path: Path, pictures: Path, flags: list[str], message: str
) -> None:
    small = ["--dataset", "pascal", "--source", str(pictures), *SMALL]
    outcome = run(cross_validate(*small, *flags), tmp_path)
    assert outcome.code == 1
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_truncated_picture_is_named_and_the_finished_shards_are_kept(tmp_path: Path, pictures: Path) -> None:
    source = Path(shutil.copytree(pictures, tmp_path / "source"))
    broken = sorted((source / "JPEGImages").iterdir())[-1]
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    flags = ["--dataset", "pascal", "--source", str(source), "--store", "store", *SMALL]
    outcome = run(["-m", "pipelines.preprocess", *flags], tmp_path)
    assert outcome.code == 1
    assert broken.name in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not list(tmp_path.glob("store/images/*/manifest.json"))
    assert len(list(tmp_path.glob("store/images/*/images-*.arrow"))) == 2


def test_a_store_of_another_schema_is_refused_and_left_alone(tmp_path: Path, pictures: Path) -> None:
    flags = ["--dataset", "pascal", "--source", str(pictures), "--store", "store", "--folds", "0", *SMALL]
    assert run(["-m", "pipelines.preprocess", *flags], tmp_path).code == 0
    (path,) = tmp_path.glob("store/images/*/manifest.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "schema": 99}))
    outcome = run(["-m", "pipelines.train", *flags], tmp_path)
    assert outcome.code == 1
    assert "schema version 2, found 99" in outcome.stderr
    assert json.loads(path.read_text())["schema"] == 99


def test_a_class_with_too_few_images_is_named(tmp_path: Path, pictures: Path) -> None:
    flags = ["--dataset", "pascal", "--source", str(pictures), *SMALL, "--min-object-px", "5000"]
    outcome = run(cross_validate(*flags), tmp_path)
    assert outcome.code == 1
    assert "fine striped disc" in outcome.stderr or "aeroplane" in outcome.stderr
    assert "images" in outcome.stderr
    assert "Traceback" not in outcome.stderr
