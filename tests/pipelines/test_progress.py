"""Progress in a file or a job's log: lines that can be read, no bars."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines import progress
from pipelines.progress import LINE_S, WorkersLines


def test_without_a_terminal_each_stage_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar(total=3, desc="stages", unit="stage", mininterval=0) as bar:
        for name in ("scan", "train fold 0", "report"):
            bar.set_postfix_str(name, refresh=False)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(", after")[0] for line in lines] == [
        "stages: 1/3, scan", "stages: 2/3, train fold 0", "stages: 3/3, report"
    ]  # fmt: skip


def test_images_end_with_their_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar(total=8, desc="images", unit="image", disable=False) as bar:
        bar.set_postfix_str("3 MB written", refresh=False)
        bar.update(8)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("images: 8/8, 3 MB written, after ")
    assert line.endswith("image/s")
    with progress.bar(total=0, desc="images", unit="image", disable=True):
        pass
    assert capsys.readouterr().err == ""


def test_quick_progress_says_nothing_and_leaves_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.bar(range(1000), desc="episodes")) == list(range(1000))
    assert capsys.readouterr().err == ""


def test_bars_of_workers_are_lines_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = WorkersLines(lambda: now)

    def state(uuid: str, x: int, closed: bool = False) -> dict[str, Any]:
        return {
            "uuid": uuid,
            "desc": f"fold {uuid}: epoch 1/2",
            "unit": "update",
            "x": x,
            "total": 90,
            "closed": closed,
        }

    for x in range(90):
        now = x * LINE_S / 30
        lines(state("0", x))
        lines(state("1", 2 * x, closed=x >= 31))
    assert capsys.readouterr().err.splitlines() == [
        "fold 0: epoch 1/2 · update 30/90",
        "fold 1: epoch 1/2 · update 60/90",
        "fold 0: epoch 1/2 · update 60/90",
    ]
