"""Actors that are given calls: one that dies is replaced, those without room hold nothing back, none is left over."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from mshnet.errors import InputError
from pipelines.crew import Crew


class Squarer:
    """Squares, unless it is to die: as often as the file's number says, over all actors."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def prepare(self) -> None:
        (self.folder / f"up-{os.getpid()}").touch()

    def square(self, number: int, deaths: int = 0) -> int:
        died = self.folder / f"died-{number}"
        before = len(died.read_text()) if died.exists() else 0
        if before < deaths:
            died.write_text("x" * (before + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number

    def refuse(self) -> None:
        raise InputError("expected something else")

    def close(self) -> None:
        (self.folder / f"up-{os.getpid()}").unlink()


@pytest.fixture(scope="module", autouse=True)
def two_cores() -> Iterator[None]:
    ray.shutdown()
    ray.init("local", num_cpus=2, _node_ip_address="127.0.0.1", include_dashboard=False, object_store_memory=2**27)
    yield
    ray.shutdown()


def crew(folder: Path, size: int, **options: Any) -> Crew:
    return Crew(Squarer, (str(folder),), size, {"num_cpus": 1, **options}, max_failures=2, what="squares")


def up(folder: Path) -> int:
    return len(list(folder.glob("up-*")))


def test_more_actors_than_there_is_room_for(tmp_path: Path) -> None:
    """Two crews at once, of four actors each, on two cores; every call is made, and no actor is left."""
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    with crew(folders[0], 4) as one, crew(folders[1], 4) as other:
        first = one.results([("square", (i,)) for i in range(9)])
        found = [next(first)]  # it has begun, and holds what it could get
        found += first
        assert sorted(found) == [(i, i * i) for i in range(9)]
        assert (up(folders[0]), up(folders[1])) == (1, 0)  # the others have given back what they held
        assert sorted(other.results([("square", (i,)) for i in range(3)])) == [(0, 0), (1, 1), (2, 4)]
        assert list(one.results([("square", (7,))])) == [(0, 49)]
        assert one.ready_at is not None
    assert [up(folder) for folder in folders] == [0, 0]


def test_what_a_killed_actor_did_is_done_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    calls = [("square", (number, 2 if number in (1, 4) else 0)) for number in range(6)]
    with crew(tmp_path, 2) as squares:
        assert sorted(squares.results(calls)) == [(i, i * i) for i in range(6)]
    assert capfd.readouterr().err.count("squares: a worker died; another does again what it was doing") == 4


def test_deaths_without_end_are_an_error(tmp_path: Path) -> None:
    with crew(tmp_path, 1) as squares, pytest.raises(RuntimeError, match="squares: 3 workers died one after the other"):
        list(squares.results([("square", (3, 100))]))
    assert len((tmp_path / "died-3").read_text()) == 3


def test_what_a_call_raises_is_raised_as_itself(tmp_path: Path) -> None:
    with crew(tmp_path, 2) as squares, pytest.raises(InputError, match=r"^expected something else$"):
        list(squares.results([("square", (1,)), ("refuse", ())]))
    assert up(tmp_path) == 0
