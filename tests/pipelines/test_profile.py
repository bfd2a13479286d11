"""`compute.profile`: files on the store and in the run that hold the updates' regions."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mshnet.profiling import region
from pipelines.profile import NUMBERS, SKIPPED, TABLE, TRACE, StepProfiler


class Artifacts:
    """A tracker that keeps what it is given."""

    def __init__(self, away: bool = False) -> None:
        self.away = away
        self.files: dict[str, bytes] = {}

    def log_bytes(self, run_id: str, data: bytes, artifact_path: str) -> None:
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
    assert "nobody there" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {TRACE, TABLE, NUMBERS}


def test_a_store_that_is_away_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    tracker: Any = Artifacts()
    train(StepProfiler(str(tmp_path / "file" / "no folder"), steps=1, tracker=tracker, run_id="run"), SKIPPED + 3)
    said = capsys.readouterr().err
    assert said.count("was not kept everywhere") == 3
    assert "| backward |" in said


def test_other_ranks_do_nothing(tmp_path: Path) -> None:
    train(StepProfiler(str(tmp_path), steps=1, rank=1), SKIPPED + 3)
    assert list(tmp_path.iterdir()) == []
