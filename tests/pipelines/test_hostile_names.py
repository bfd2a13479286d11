"""Names from data sets and result files that were made to do harm: in paths, pages and the tracker."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mshnet.errors import InputError
from pipelines import storage
from pipelines.config import CrossValidationConfig
from pipelines.report import show, write_report
from pipelines.results import CrossValidation
from pipelines.tracking import Tracker
from pipelines.train import TrainedFold
from tests.pipelines.cross_validation_example import cross_validation_example

OUTSIDE = ["../x", "a/../../x", "/etc/passwd", "..", "a\0b"]
MARKUP = """<img src=x onerror="alert('x')"> ]( javascript:alert(1) ) | ``` </pre><script>alert(1)</script>"""


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("root", ["/store", "s3://bucket/store"])
def test_a_place_below_a_place_is_below_it(root: str, name: str) -> None:
    with pytest.raises(InputError, match="expected the name of something below"):
        storage.join(root, "folds", name)


@pytest.mark.parametrize("name", ["a..b", "...", "a\\..\\b", "a/b", "ü x", "s3://elsewhere"])
def test_other_names_are_names(name: str) -> None:
    assert storage.below("/store", storage.join("/store", name)) == name


@pytest.mark.parametrize("model", OUTSIDE)
def test_a_fold_s_model_lies_on_the_store(model: str) -> None:
    text = TrainedFold(
        fold=0, model=model, history=[], best_epoch=1, train_episodes=1, train_s=1.0, run_id="", git_commit=""
    ).to_text()
    with pytest.raises(InputError, match="below '/store'"):
        storage.join("/store", TrainedFold.from_json(text).model)


class Page(HTMLParser):
    """What a browser would make of a page: its tags, and the attributes that act."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.acting: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.acting += [
            f"{tag} {name}" for name, value in attrs if name.startswith("on") or "script" in (value or "")[:20]
        ]


def hostile(result: CrossValidation) -> CrossValidation:
    """With markup in every name that comes from a data set, a flag or a package."""

    def classes(values: dict[str, float]) -> dict[str, float]:
        return {f"{MARKUP}{name}": value for name, value in values.items()}

    folds = []
    for fold in result.folds:
        panels = [
            dataclasses.replace(panel, query=MARKUP, supports=[MARKUP], class_name=MARKUP) for panel in fold.panels
        ]
        folds.append(
            dataclasses.replace(
                fold,
                novel_classes=[f"{MARKUP}{name}" for name in fold.novel_classes],
                score=dataclasses.replace(fold.score, class_iou=classes(fold.score.class_iou)),
                panels=panels,
                protocol=dataclasses.replace(
                    fold.protocol,
                    **dict.fromkeys(("name", "mask_mode", "split_lists", "selection", "classes"), MARKUP),  # type: ignore[arg-type]
                ),
            )
        )
    return dataclasses.replace(
        result, name=MARKUP, folds=folds, config={MARKUP: MARKUP}, artifacts={MARKUP: MARKUP}, mask_mode=MARKUP
    )


def test_no_name_acts_in_the_report(tmp_path: Path) -> None:
    example, pictures = cross_validation_example()
    plain, _ = write_report(example, pictures, tmp_path / "plain")
    html, markdown = write_report(hostile(example), pictures, tmp_path / "hostile")
    page = Page(html.read_text())
    assert page.acting == []
    assert page.tags == Page(plain.read_text()).tags
    prose, _, config = markdown.read_text().partition("```json")
    assert "<img" not in prose.replace("\\<img", "")
    for ours in (".png)", "\\](", "](curves", "](intervals", "](sizes", "](fold"):
        prose = prose.replace(ours, "")
    assert "](" not in prose
    assert config.splitlines()[-1] == "```"
    assert config.count("\n```") == 1


@pytest.mark.parametrize("name", ["../../secret", "../x/../../secret"])
def test_a_stored_result_shows_no_file_of_elsewhere(name: str, tmp_path: Path) -> None:
    example, _ = cross_validation_example()
    result = dataclasses.replace(example, folds=[dataclasses.replace(example.folds[0], bars_picture=name)])
    stored = tmp_path / "a" / "b" / "cross_validation.json"
    storage.write_bytes(str(stored), json.dumps(result.to_json()).encode())
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(InputError, match="expected the name"):
        show(str(stored), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_tracker_takes_any_class_name_and_no_path(tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "hostile")
    run = tracker.start_parent("run", {}, {}, "key")
    names = ["..", "../../x", "a/b", "/a", "a//b", "./c", "'; drop table runs; --", "ü\u202e", MARKUP]
    tracker.log_metrics(run, {f"class_iou/{name}": float(number) for number, name in enumerate(names)})
    logged = tracker._client().get_run(run).data.metrics
    assert sorted(logged.values()) == [float(number) for number in range(len(names))]
    assert all(name.startswith("class_iou/") and ".." not in name.split("/") for name in logged)
    for artifact in ("../x", "pictures/../../x", "a/.."):
        with pytest.raises(InputError, match="artifact path"):
            tracker.log_bytes(run, b"x", artifact)


@pytest.mark.parametrize("name", ["../x", "a/b", "a:b", "..", "it's", "a`b"])
def test_a_registered_model_s_name_is_checked_before_anything_starts(name: str) -> None:
    with pytest.raises(InputError, match="registered_model must be a name"):
        CrossValidationConfig(registered_model=name)
