from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mshnet.errors import InputError
from pipelines import report_sections as sections
from pipelines.fold_table import fold_table_text, table_rows
from pipelines.markdown import GAP
from pipelines.report import figure, show, write_report
from pipelines.results import CHOSEN_ON_TEST, CrossValidation, FoldResult
from tests.pipelines.cross_validation_example import cross_validation_example

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Balanced tags, table cells, addresses and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if not self.open or self.open[-1] != "style":
            self.text += data


def with_protocol(fold: FoldResult, **changes: object) -> FoldResult:
    return dataclasses.replace(fold, protocol=dataclasses.replace(fold.protocol, **changes))


def plain(markdown: Path) -> str:
    return markdown.read_text().replace(GAP, "")


def size(picture: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(picture)).size


def one_fold(result: CrossValidation, **changes: object) -> CrossValidation:
    return dataclasses.replace(result, folds=result.folds[:1], mean_miou=result.folds[0].score.miou, **changes)


def test_the_page_has_every_number_and_needs_no_network(tmp_path: Path) -> None:
    result, pictures = cross_validation_example()
    html, _ = write_report(result, pictures, tmp_path)
    page = Page(html.read_text())
    assert page.open == []
    assert ["MSHNet, trained", "40.2", "47.1", "38.6", "37.1", "40.8", "63.5"] in page.rows
    assert ["everything is foreground", "18.6", "19.6", "20.6", "21.6", "20.1", "40.0"] in page.rows
    assert ["paper, table 2", "67.7", "71.8", "59.9", "62.4", "65.5", "77.8"] in page.rows
    assert page.rows[2][:6] == [
        "95 % interval",
        "[38.2, 42.2]",
        "[45.1, 49.1]",
        "[36.6, 40.6]",
        "[35.1, 39.1]",
        "[39.8, 41.8]",
    ]
    assert ["aeroplane", "48.2", "[43.2, 53.2]", "20.1", "26.6", "30.6"] in page.rows
    assert ["learnable parameters", "29,626,952", "29.6M"] in page.rows
    assert ["image size", "473 px", "473 px"] in page.rows
    assert ["git commit", result.git_commit] in page.rows
    assert ["fold 2", result.folds[2].run_id] in page.rows
    assert "16.6 points above the best baseline (prototype matching, no training)" in page.text
    pictured = [address for address in page.addresses if not address.startswith("#")]
    assert len(pictured) == len(pictures) + 3, "every picture, and the three charts of all folds"
    charts = [base64.b64decode(address.partition(",")[2]) for address in pictured if "image/png" in address[:20]]
    assert {data for name, data in pictures.items() if name.endswith(("curve.png", "bars.png"))} <= set(charts)
    photos = [address for address in pictured if address.startswith("data:image/jpeg;base64,")]
    assert len(charts) + len(photos) == len(pictured)
    assert {size(base64.b64decode(address.partition(",")[2])) for address in photos} == {
        size(data) for name, data in pictures.items() if "panel" in name
    }
    assert not re.search(r"https?://(?!tracker:5000)", html.read_text()), "nothing is loaded from elsewhere"


def test_the_markdown_has_the_same_table_and_its_pictures_beside_it(tmp_path: Path) -> None:
    result, pictures = cross_validation_example()
    _, markdown = write_report(result, pictures, tmp_path)
    text = plain(markdown)
    assert "| MSHNet, trained | 40.2 | 47.1 | 38.6 | 37.1 | 40.8 | 63.5 |" in text
    assert "| paper, table 2 | 67.7 | 71.8 | 59.9 | 62.4 | 65.5 | 77.8 |" in text
    linked = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(linked) == 3 + len(pictures) - 4, "all but the folds' own curves"
    for name in linked:
        assert (tmp_path / name).read_bytes() == pictures.get(name, (tmp_path / name).read_bytes())
    config = text.partition("```json\n")[2].partition("```")[0]
    assert json.loads(config) == result.config


def test_the_terminal_table_is_aligned_and_says_what_was_run() -> None:
    result, _ = cross_validation_example()
    lines = fold_table_text(result).splitlines()
    assert lines[0] == "pascal, resnet50, both similarities, 1-shot, 473 px, 4 of 4 folds"
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[4].split() == ["MSHNet,", "trained", "40.2", "47.1", "38.6", "37.1", "40.8", "63.5"]
    assert lines[-2].split() == ["paper,", "table", "2", "67.7", "71.8", "59.9", "62.4", "65.5", "77.8"]


def test_every_number_of_an_epoch_chosen_on_the_test_episodes_is_labelled(tmp_path: Path) -> None:
    example, pictures = cross_validation_example()
    folds = [with_protocol(fold, selection=CHOSEN_ON_TEST) for fold in example.folds]
    result = dataclasses.replace(example, folds=folds)
    note = "epoch chosen on the test episodes"
    html, markdown = write_report(result, pictures, tmp_path)
    page = Page(html.read_text())
    assert ["MSHNet, trained, " + note, "40.2", "47.1", "38.6", "37.1", "40.8", "63.5"] in page.rows
    assert f"mIoU on novel classes ({note})" in page.text
    assert page.text.count(f"% ({note})") == 1 + len(folds), "the title and each fold's heading"
    assert plain(markdown).count(f"% ({note})") == len(folds)
    assert f"MSHNet, trained, {note}" in fold_table_text(result)
    assert note not in fold_table_text(example)


def test_a_setting_that_the_paper_lacks_says_so(tmp_path: Path) -> None:
    example, pictures = cross_validation_example()
    result = dataclasses.replace(example, dataset="shapes", backbone="resnet18")
    html, markdown = write_report(result, pictures, tmp_path)
    assert "not in the paper" in fold_table_text(result)
    assert "| paper | not in the paper |" in plain(markdown)
    rows = Page(html.read_text()).rows
    assert ["paper", "not in the paper: no row for shapes, resnet18, both, 1-shot"] in rows
    assert ["learnable parameters", "29,626,952"] in rows


def test_a_run_of_one_fold_is_compared_with_that_fold_only(tmp_path: Path) -> None:
    result, pictures = cross_validation_example()
    rows = {row.key: row.values for row in table_rows(one_fold(result))}
    assert rows["paper"] == (67.7, 67.7, None)
    assert rows["trained"][:2] == pytest.approx((40.2, 40.2))
    html, _ = write_report(one_fold(result), pictures, tmp_path)
    assert ["paper, table 2", "67.7", "67.7", "–"] in Page(html.read_text()).rows
    assert "1 of 4 folds" in html.read_text()


def test_a_baseline_missing_in_a_fold_has_no_mean() -> None:
    result, _ = cross_validation_example()
    bare: FoldResult = dataclasses.replace(result.folds[1], baselines={})
    rows = {row.key: row for row in table_rows(dataclasses.replace(result, folds=[result.folds[0], bare]))}
    assert rows["untrained"].cells == ["12.1", "–", "–", "–"]
    none = dataclasses.replace(result, folds=[bare])
    assert [row.key for row in table_rows(none)] == ["trained", "paper"]


def test_what_differs_between_folds_is_told_by_fold(tmp_path: Path) -> None:
    result, pictures = cross_validation_example()
    other = with_protocol(result.folds[1], split_lists="rule: at least 2048 px")
    html, _ = write_report(dataclasses.replace(result, folds=[result.folds[0], other]), pictures, tmp_path)
    assert "fold 0: lists:4f2c1a9be07d; fold 1: rule: at least 2048 px" in html.read_text()


def test_names_are_escaped(tmp_path: Path) -> None:
    example, pictures = cross_validation_example()
    result = dataclasses.replace(example, name="<script>alert('x')</script> | a")
    html, markdown = write_report(result, pictures, tmp_path)
    assert "<script>" not in html.read_text()
    assert "&lt;script&gt;" in html.read_text()
    assert plain(markdown).startswith("# \\<script\\>alert('x')\\</script\\> \\| a\n")


def test_a_class_without_pixels_and_a_diverged_run_are_shown_as_they_are(tmp_path: Path) -> None:
    example, pictures = cross_validation_example()
    fold = example.folds[0]
    score = dataclasses.replace(fold.score, class_iou={**fold.score.class_iou, "bird": math.nan})
    history = [dataclasses.replace(fold.history[0], loss=math.nan, validation_miou=None)]
    folds = [dataclasses.replace(fold, score=score, history=history)]
    html, _ = write_report(dataclasses.replace(example, folds=folds), pictures, tmp_path)
    assert ["bird", "–", "[35.2, 45.2]", "12.1", "18.6", "22.6"] in Page(html.read_text()).rows


def test_a_missing_picture_is_named_not_fatal(tmp_path: Path) -> None:
    result, pictures = cross_validation_example()
    kept = {name: data for name, data in pictures.items() if name != "fold0/bars.png"}
    html, markdown = write_report(result, kept, tmp_path)
    assert "picture missing: fold0/bars.png" in html.read_text()
    assert "picture missing: fold0/bars.png" in plain(markdown)


def test_bad_use_is_refused(tmp_path: Path) -> None:
    result, pictures = cross_validation_example()
    with pytest.raises(InputError, match="at least one fold"):
        write_report(dataclasses.replace(result, folds=[]), pictures, tmp_path)
    with pytest.raises(InputError, match=r"below the report's folder, got '\.\./x\.png'"):
        write_report(result, {"../x.png": b""}, tmp_path / "out")
    assert not (tmp_path / "x.png").exists()
    with pytest.raises(InputError, match="no result at"):
        show(str(tmp_path / "absent.json"), str(tmp_path))


def test_a_stored_result_gives_the_same_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, pictures = cross_validation_example()
    html, markdown = write_report(result, pictures, tmp_path / "first")
    for name, data in pictures.items():
        (tmp_path / "stored" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stored" / name).write_bytes(data)
    (tmp_path / "stored" / "result.json").write_text(result.to_text())
    show((tmp_path / "stored" / "result.json").as_uri(), str(tmp_path / "second"))
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Path(told["html"]).read_bytes() == html.read_bytes()
    assert Path(told["markdown"]).read_bytes() == markdown.read_bytes()


def test_the_command_explains_itself_at_once_and_fails_in_one_line() -> None:
    start = time.monotonic()
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipelines.report", "show", "--help"], capture_output=True, text=True
    )
    assert (told.returncode, "--result" in told.stdout) == (0, True)
    assert not re.search(r"\| +(torch|ray|mlflow|matplotlib)$", told.stderr, re.MULTILINE), "nothing heavy is imported"
    assert time.monotonic() - start < 30
    failed = subprocess.run(
        [sys.executable, "-m", "pipelines.report", "show", "--result", "absent.json", "--out", "x"],
        capture_output=True,
        text=True,
    )
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.count("\n") == 1
    assert "no result at 'absent.json'" in failed.stderr
    usage = subprocess.run([sys.executable, "-m", "pipelines.report", "--no-such"], capture_output=True, text=True)
    assert usage.returncode == 2


def test_the_numbers_of_every_table_stand_on_the_page_and_in_the_markdown(tmp_path: Path) -> None:
    example, pictures = cross_validation_example()
    folds = [
        dataclasses.replace(
            with_protocol(fold, name="published-5x1000", seeds=(0, 1, 2)),
            score=dataclasses.replace(fold.score, by_seed=(0.30 + 0.01 * fold.fold, 0.34, 0.38)),
        )
        for fold in example.folds
    ]
    html, markdown = write_report(dataclasses.replace(example, folds=folds), pictures, tmp_path)
    rows, text = Page(html.read_text()).rows, plain(markdown)
    expected = [
        ["fold 1", "47.1", "[45.1, 49.1]", "63.0", "[62.0, 64.0]", "1,000"],
        ["mean", "40.8", "[39.8, 41.8]", "63.5", "[63.0, 64.0]", "4,000"],
        # Of 30, 34, 38 the standard deviation is 4; the mean of the first seed 31.5.
        ["fold 0", "30.0", "34.0", "38.0", "4.00"],
        ["mean", "31.5", "34.0", "38.0", "3.28"],
        ["fold 2", "28.6 (n=200)", "38.6 (n=500)", "48.6 (n=300)"],
        ["mean", "30.8", "40.8", "50.7"],
        ["1-shot", "40.2 [38.2, 42.2]", "47.1 [45.1, 49.1]", "38.6 [36.6, 40.6]", "37.1 [35.1, 39.1]", "40.8"],
        ["5-shot", "45.2 [43.2, 47.2]", "52.1 [50.1, 54.1]", "43.6 [41.6, 45.6]", "42.1 [40.1, 44.1]", "45.8"],
        ["fold 3", "345", "2,000", "400", "1,500", "100", "80.0 %", "5.0×"],
        ["seeds", *["0, 1, 2"] * 4],
        ["resize", *["square"] * 4],
        ["episodes' hash", "0b0b0b0b0b0b", "1b1b1b1b1b1b", "2b2b2b2b2b2b", "3b3b3b3b3b3b"],
        ["fold 1", "evaluations/pascal-fold1/outcomes.arrow, sha256 " + "1a" * 32],
    ]
    for row in expected:
        assert row in rows
        assert "| " + " | ".join(cell.replace("[", "\\[").replace("]", "\\]") for cell in row) + " |" in text


def test_what_was_not_measured_has_no_table() -> None:
    example, _ = cross_validation_example()
    bare = dataclasses.replace(
        example.folds[0].score,
        miou_interval=None, fb_iou_interval=None, class_interval={}, by_size={}, by_seed=(),
    )  # fmt: skip
    fold = dataclasses.replace(example.folds[0], score=bare, other_shots={}, features=None)
    result = one_fold(dataclasses.replace(example, folds=[fold]), miou_interval=None, fb_iou_interval=None)
    assert [table(result) for _, _, table in sections.SECTIONS] == [None] * 4
    assert sections.feature_table(result) is None
    assert set(sections.charts(result)) == {sections.CURVES}
    assert sections.class_table(fold).header == ("class", "trained", "untrained", "foreground", "prototype")


def test_failures_have_a_gallery_with_definitions_captions_and_energy_maps(tmp_path: Path) -> None:
    result, pictures = cross_validation_example()
    html, markdown = write_report(result, pictures, tmp_path)
    text, prose = Page(html.read_text()).text, plain(markdown)
    for rank, (heading, definition) in sections.FAILURES.items():
        shown = sections.ranked(result, rank)
        assert [fold.fold for fold, _ in shown] == [0, 1, 2, 3]
        assert heading in text
        assert f"## Failures: {heading.lower()}\n\n{definition}" in prose
        for fold, panel in shown:
            caption = sections.caption(fold, panel)
            assert f"Fold {fold.fold}, {panel.class_name}, IoU {100 * panel.iou:.1f} %" in caption
            assert "false foreground 3.5 %" in caption
            assert caption in text
            assert caption in prose
            assert f"(fold{fold.fold}/{panel.energy})" in prose
    assert sections.ENERGY_NOTE in text


def test_stored_episodes_become_one_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, pictures = cross_validation_example()
    for shot in (5, 1):
        folder = tmp_path / f"{shot}"
        write_report(result, pictures, folder)
        (folder / "result.json").write_text(dataclasses.replace(result, shot=shot).to_text())
    sources = (str(tmp_path / "5" / "result.json"), str(tmp_path / "1" / "result.json"))
    figure(sources, str(tmp_path / "figure.png"), rank="median", rows=2)
    assert json.loads(capsys.readouterr().out) == {"figure": str(tmp_path / "figure.png")}
    drawn = Image.open(tmp_path / "figure.png")
    width, height = size(pictures["fold0/panel-median-2.png"])
    assert 2 * width < drawn.width < 2.1 * width
    assert 8 * height < drawn.height < 8.3 * height
    last = drawn.crop((0, drawn.height - height, width, drawn.height))
    assert last.tobytes() == Image.open(io.BytesIO(pictures["fold3/panel-median-3.png"])).convert("RGB").tobytes()
    with pytest.raises(InputError, match="rows must be 1 or more"):
        figure(sources, str(tmp_path / "none.png"), rows=0)
