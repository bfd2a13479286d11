"""`compute.profile`: files on the store and in the run that hold the updates' regions."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from mshnet.errors import InputError, TrainingDivergedError
from mshnet.profiling import region
from pipelines.profile import NUMBERS, SKIPPED, TABLE, TRACE, StepProfiler


class Artifacts:
    """A tracker that keeps what it is given."""

    def __init__(self, away: bool = False) -> None:
        self.away = away
        self.asked = 0
        self.files: dict[str, bytes] = {}

    def log_bytes(self, run_id: str, data: bytes, artifact_path: str) -> None:
        self.asked += 1
        if self.away:
            raise ConnectionError("nobody there")
        self.files[f"{run_id}/{artifact_path}"] = data


def train(profiler: StepProfiler, updates: int) -> None:
    network = torch.nn.Conv2d(4, 8, 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(updates):
        with region("merging"):
            loss = network(torch.ones(2, 4, 32, 32)).mean()
        with region("backward"):
            loss.backward()
        with region("optimizer"):
            optimizer.step()
        profiler.step()
    profiler.close()


def test_the_trace_and_the_table_hold_the_regions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker: Any = Artifacts()
    profiler = StepProfiler(str(tmp_path), steps=3, tracker=tracker, run_id="run")
    train(profiler, SKIPPED + 6)
    trace = json.loads(gzip.decompress((tmp_path / TRACE).read_bytes()))
    named = [event["name"] for event in trace["traceEvents"]]
    assert [named.count(name) for name in ("merging", "backward", "optimizer", "loss")] == [3, 3, 3, 0]
    numbers = json.loads((tmp_path / NUMBERS).read_bytes())
    assert numbers["updates"] == 3
    assert sum(row["ms"] for row in numbers["regions"]) == pytest.approx(numbers["total_ms"])
    took = {row["name"] for row in numbers["regions"] if row["ms"] > 0}
    assert took == {"merging", "backward", "optimizer", "other"}
    assert profiler.breakdown is not None
    assert (tmp_path / TABLE).read_text() == profiler.breakdown.table()
    assert profiler.breakdown.table() in capsys.readouterr().err
    assert tracker.files == {f"run/profile/{name}": (tmp_path / name).read_bytes() for name in (TRACE, TABLE, NUMBERS)}


def test_a_short_fold_gives_the_updates_that_were_whole(tmp_path: Path) -> None:
    train(StepProfiler(str(tmp_path), steps=50), SKIPPED + 2)
    assert json.loads((tmp_path / NUMBERS).read_bytes())["updates"] == 2


@pytest.mark.parametrize("updates", [0, SKIPPED - 1, SKIPPED])
def test_a_fold_that_ends_before_it_says_so(updates: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(StepProfiler(str(tmp_path)), updates)
    assert f"no profile: {updates} updates were made, and the first {SKIPPED}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_away_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker: Any = Artifacts(away=True)
    train(StepProfiler(str(tmp_path), steps=1, tracker=tracker, run_id="run"), SKIPPED + 3)
    assert "profile/trace.json.gz was not logged, and no other file of the profile will be (nobody there)" in (
        capsys.readouterr().err
    )
    assert tracker.asked == 1
    assert {file.name for file in tmp_path.iterdir()} == {TRACE, TABLE, NUMBERS}


def test_a_store_that_is_away_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    tracker: Any = Artifacts()
    train(StepProfiler(str(tmp_path / "file" / "no folder"), steps=1, tracker=tracker, run_id="run"), SKIPPED + 3)
    said = capsys.readouterr().err
    assert said.count("was not kept in") == 3
    assert "| backward |" in said
    assert len(tracker.files) == 3


def full(*_: object, **__: object) -> NoReturn:
    raise OSError(28, "No space left on device")


def no_table(*_: object) -> NoReturn:
    raise InputError("expected a trace of at least one update, found none")


@pytest.mark.parametrize(
    ("broken", "how", "kept"),
    [
        ("torch.profiler.profile.start", full, set()),
        ("torch.profiler.profile.step", full, set()),
        ("torch.profiler.profile.stop", full, set()),
        ("torch.profiler.profile.export_chrome_trace", full, set()),
        ("tempfile.TemporaryDirectory", full, set()),
        ("mshnet.profiling.breakdown_of_trace", no_table, {TRACE}),
    ],
)
def test_a_profiler_that_fails_ends_no_training(
    broken: str,
    how: Callable[..., NoReturn],
    kept: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(broken, how)
    train(StepProfiler(str(tmp_path / "kept"), steps=1), SKIPPED + 3)
    said = capsys.readouterr().err
    assert said.count("profile: none is made (") == 1
    assert "No space left" in said or "at least one update" in said
    assert {file.name for file in (tmp_path / "kept").iterdir()} == kept


def test_the_error_that_ends_training_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryDirectory", full)

    def diverge() -> None:
        with closing(StepProfiler(str(tmp_path), steps=50)) as profiler:
            for _ in range(SKIPPED + 2):
                profiler.step()
            raise TrainingDivergedError("at update 7")

    with pytest.raises(TrainingDivergedError, match="at update 7"):
        diverge()


def test_other_ranks_do_nothing(tmp_path: Path) -> None:
    train(StepProfiler(str(tmp_path), steps=1, rank=1), SKIPPED + 3)
    assert list(tmp_path.iterdir()) == []
