"""The tables from a real tracker's runs: read back, as a page, as Markdown, as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mshnet.errors import InputError
from pipelines import tables, tracking_search
from pipelines.chosen_runs import Asked
from pipelines.tables import Tables
from pipelines.tracking import Tracker
from pipelines.tracking_search import TrackedRun
from tests.pipelines.recorded_example import configuration as recorded_configuration
from tests.pipelines.recorded_example import record_job
from tests.pipelines.tracked_runs import configuration, log_run, tracked

MIOU = (0.671, 0.72, 0.588, 0.611)


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory, empty_database: bytes) -> str:
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    file.write_bytes(empty_database)
    return f"sqlite:///{file}"


@pytest.fixture(scope="module")
def logged(tracking_uri: str) -> dict[str, TrackedRun]:
    """Runs in the tracker by key, and what is to be read of each."""
    place: dict[str, Any] = {"tracking_uri": tracking_uri, "experiment": "tables"}
    runs = {
        "whole": log_run(configuration(**place), MIOU, "whole"),
        "2-shot": log_run(configuration(shot=2, **place), MIOU[:1], "2-shot"),
        "failed": log_run(configuration(backbone="resnet101", **place), MIOU[:1], "failed", status="FAILED"),
    }
    tracker = Tracker(tracking_uri, "tables")
    # A search and its trial are no cross-validations; nor is what some other program logged.
    search = tracker.start_parent("search", configuration().to_json(), {"search": "s"}, "search")
    tracker.start_child(search, "trial 0", configuration().to_json(), {"search": "s", "trial": "0"}, "trial")
    tracker.start_parent("another program's", {"lr": 0.1}, {}, "foreign")
    return runs


def test_a_run_comes_back_as_it_was_logged(tracking_uri: str, logged: dict[str, TrackedRun]) -> None:
    found = {run.run_id: run for run in tracking_search.cross_validations(tracking_uri, "tables")}
    assert set(found) == {run.run_id for run in logged.values()}
    whole, expected = found[logged["whole"].run_id], logged["whole"]
    assert whole.folds == expected.folds
    assert (whole.miou_interval, whole.problem, whole.status) == (expected.miou_interval, "", "FINISHED")
    assert {name: whole.params[name] for name in expected.params} == expected.params
    failed = found[logged["failed"].run_id]
    assert (failed.status, failed.folds, failed.problem) == ("FAILED", (), "")


def test_a_record_that_cannot_be_read_is_set_apart_with_the_reason(tracking_uri: str) -> None:
    config = configuration(tracking_uri=tracking_uri, experiment="older")
    run = log_run(config, MIOU[:1], "old")
    Tracker(tracking_uri, "older").log_bytes(run.folds[0].run_id, b'{"fold": 0}', "fold.json")
    bare = log_run(replace(config, shot=5), MIOU[:1], "bare")
    Tracker(tracking_uri, "older").finish(bare.folds[0].run_id, "FAILED")
    made = tables.read(tracking_uri, "older", [2], Asked())
    told = {apart.run.run_id: apart.why for apart in made.filled[0].chosen.apart}
    assert told[run.run_id].startswith("FoldResult: expected the fields of FoldResult")
    assert told[bare.run_id] == "no fold.json in the runs of its folds"


def test_what_the_stages_record_can_be_read(tracking_uri: str, tmp_path: Path) -> None:
    config = recorded_configuration(tmp_path, tracking_uri, experiment="stages")
    result = record_job(config, "job", miou=MIOU[:1])
    (run,) = tracking_search.cross_validations(tracking_uri, "stages")
    assert run.run_id == result.parent_run_id
    assert run.folds == tuple(result.folds)
    assert run.miou_interval == result.miou_interval
    assert tracking_search.exists(tracking_uri, run.run_id)
    assert not tracking_search.exists(tracking_uri, "f" * 32)


def test_an_experiment_that_is_not_there_is_named_with_those_that_are(
    tracking_uri: str, logged: dict[str, TrackedRun]
) -> None:
    with pytest.raises(InputError, match=r"no experiment 'mine' at .* \(there are: .*tables.*\); give --experiment"):
        tables.read(tracking_uri, "mine", [2], Asked())
    with pytest.raises(InputError, match="tables must be of 2, 3, 4 and at least one, got"):
        tables.read(tracking_uri, "tables", [1], Asked())


def test_the_command_writes_the_same_numbers_three_times(
    tracking_uri: str, logged: dict[str, TrackedRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables.tables(str(tmp_path / "new"), tracking_uri, "tables")
    paths = json.loads(capsys.readouterr().out)
    parent = logged["whole"].run_id
    assert sorted(paths) == ["html", "json", "md"]
    data = json.loads(Path(paths["json"]).read_text())
    assert [table["table"] for table in data["tables"]] == [2, 3, 4]
    (mean,) = [
        c for c in data["tables"][0]["cells"] if c["run_id"] == parent and (c["kind"], c["column"]) == ("ours", "mIoU")
    ]
    assert (mean["backbone"], mean["shot"], mean["paper"], mean["inside"]) == ("resnet50", 1, 65.5, True)
    assert mean["value"] == pytest.approx(64.75)
    assert mean["difference"] == pytest.approx(-0.75)
    ours = [cell for table in data["tables"] for cell in table["cells"] if cell["kind"] in ("ours", "baseline")]
    assert {cell["state"] for cell in ours} == {"measured", "not run", "failed"}
    known = {parent, *(fold.run_id for fold in logged["whole"].folds)}
    assert all((cell["run_id"] in known) == (cell["state"] == "measured") for cell in ours), "each leads to its run"
    assert [run["why"] for run in data["other_runs"]] == ["no place in these tables: pascal, both, 2-shot"]
    assert {parameters["same"] for parameters in data["tables"][2]["parameters"]} == {True}

    markdown = Path(paths["md"]).read_text()
    assert "| ResNet-50 | MSHNet, here | 67.1 [65.7, 68.4] −0.6 | 72.0 [70.6, 73.3] +0.2 | 58.8 " in markdown
    assert "| 64.8 [64.0, 65.5] −0.8 | 78.5 **+0.7**" not in markdown, "without an interval nothing is bold"
    assert markdown.count("| not run |") > 10


class Page(HTMLParser):
    """A page's rows of cells, its addresses, and whether its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "br"}:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        self.ids |= {value or "" for name, value in attributes if name == "id"}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip() and f"{data.strip()} "


def page(made: Tables, folder: Path) -> tuple[Page, str]:
    text = tables.write(made, folder)["html"].read_text()
    return Page(text), text


def made_of(runs: list[TrackedRun], tracking_uri: str, numbers: tuple[int, ...] = (2,)) -> Tables:
    from pipelines.cells import TABLES
    from pipelines.table_rows import fill

    filled = tuple(fill(TABLES[number], runs, Asked()) for number in numbers)
    return Tables(tracking_uri=tracking_uri, experiment="<b>mine</b>", filled=filled, other=())


def test_the_page_needs_nothing_else_and_every_number_of_ours_leads_to_its_run(tmp_path: Path) -> None:
    runs = [tracked(configuration(), MIOU, "parent-1"), tracked(configuration(), MIOU, "other-1", resize="original")]
    found, text = page(made_of(runs[:1] + runs, "sqlite:////tmp/mlflow.db", (2, 3, 4)), tmp_path)
    assert found.open == []
    assert "<b>mine" not in text
    row = ["MSHNet, here ", "67.1 [65.7, 68.4] −0.6 ", "72.0 [70.6, 73.3] +0.2 ", "58.8 [57.4, 60.1] −1.1 "]
    assert row in [cells[:4] for cells in found.rows]
    assert ["MSHNet, paper ", "67.7 ", "71.8 ", "59.9 ", "62.4 ", "65.5 ", "77.8 "] in [
        cells[:7] for cells in found.rows
    ]
    assert any(cells[1:3] == ["not run ", "not run "] for cells in found.rows), "a whole half of a row says it once"
    anchors = {address for address in found.addresses if address.startswith("#run-")}
    assert "#run-2-parent-1" in anchors
    assert {address.removeprefix("#") for address in found.addresses} <= found.ids, "nothing leads elsewhere"
    assert "measured otherwise: image size: 473 px square, judged at original size" in text


def test_on_a_server_a_number_leads_to_its_run_s_page(tmp_path: Path) -> None:
    run = tracked(configuration(), MIOU, "parent-1")
    found, _ = page(made_of([run], "http://tracker:5000/"), tmp_path)
    assert "http://tracker:5000/#/experiments/7/runs/fold-run-3" in found.addresses
    assert "http://tracker:5000/#/experiments/7/runs/parent-1" in found.addresses


def test_a_difference_looks_as_our_interval_says(tmp_path: Path) -> None:
    run = tracked(configuration(), (0.671, 0.75, 0.55, 0.611), "parent-1")  # the paper: 67.7, 71.8, 59.9, 62.4
    _, text = page(made_of([run], "http://tracker:5000"), tmp_path)
    for shown in ("inside", "−0.6"), ("higher", "+3.2"), ("lower", "−4.9"), ("unknown", "+0.7"):
        assert '<small class="{}">{}</small>'.format(*shown) in text
