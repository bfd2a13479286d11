"""The plan over a store, and a graph run by a real local Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mshnet.errors import InputError
from pipelines import dag, storage
from pipelines.dag import Stage, StageFailedError, StageInputError


def never(*arguments: Any) -> Mapping[str, Any]:
    raise AssertionError("planning must run nothing")


def stage(root: Path, name: str, *needs: Stage, **changes: Any) -> Stage:
    return Stage(name=name, result=f"{root}/{name}/result.json", run=never, needs=needs, **changes)


def record(of: Stage, **result: Any) -> None:
    storage.write_json(of.result, result)


def names(stages: tuple[Stage, ...]) -> list[str]:
    return [stage.name for stage in stages]


def test_everything_is_pending_on_an_empty_store_needs_first(tmp_path: Path) -> None:
    top = stage(tmp_path, "top")
    left, right = stage(tmp_path, "left", top), stage(tmp_path, "right", top)
    planned = dag.plan([stage(tmp_path, "end", left, right)])
    assert planned.done == {}
    assert names(planned.pending) == ["top", "left", "right", "end"]
    assert planned.skipped == 0
    assert list(planned.lines()) == [
        "run   top",
        "run   left  <- top",
        "run   right  <- top",
        "run   end  <- left, right",
    ]


def test_what_a_done_stage_needed_is_not_looked_at(tmp_path: Path) -> None:
    top = stage(tmp_path, "top")
    left, right = stage(tmp_path, "left", top), stage(tmp_path, "right")
    record(left, value=3)
    Path(top.folder).mkdir()
    Path(top.result).write_text("{ damaged")
    planned = dag.plan([stage(tmp_path, "end", left, right)])
    assert planned.done == {"left": {"value": 3}}
    assert names(planned.pending) == ["right", "end"]
    assert planned.skipped == 1
    assert list(planned.lines()) == ["done  left", "run   right", "run   end  <- left, right"]


def test_order_alone_makes_nothing_run(tmp_path: Path) -> None:
    earlier = stage(tmp_path, "earlier")
    assert names(dag.plan([stage(tmp_path, "later", after=(earlier,))]).pending) == ["later"]


def test_a_stage_is_done_only_with_all_its_parts(tmp_path: Path) -> None:
    whole = stage(tmp_path, "whole", parts=("a.bin", "model/b.bin"))
    record(whole, value=1)
    storage.write_bytes(storage.join(whole.folder, "a.bin"), b"a")
    assert names(dag.plan([whole]).pending) == ["whole"]
    storage.write_bytes(storage.join(whole.folder, "model/b.bin"), b"b")
    assert dag.plan([whole]).done == {"whole": {"value": 1}}


def test_a_result_that_does_not_hold_any_more_is_made_again(tmp_path: Path) -> None:
    checked = stage(tmp_path, "checked", complete=lambda result: result["value"] == 2)
    record(checked, value=1)
    assert names(dag.plan([checked]).pending) == ["checked"]
    record(checked, value=2)
    assert dag.plan([checked]).done == {"checked": {"value": 2}}


def test_a_result_that_only_a_thorough_look_can_judge_is_pending_and_shown_apart(tmp_path: Path) -> None:
    known, unknown = (stage(tmp_path, name, holds=never) for name in ("known", "unknown"))
    record(known, value=1)
    planned = dag.plan([known, unknown])
    assert names(planned.pending) == ["known", "unknown"]
    assert list(planned.lines()) == ["check known", "run   unknown"]


@pytest.mark.parametrize(("text", "found"), [('{"value": ', "expected JSON"), ("[1, 2]", "found list")])
def test_a_damaged_result_is_named(tmp_path: Path, text: str, found: str) -> None:
    damaged = stage(tmp_path, "damaged")
    Path(damaged.folder).mkdir()
    Path(damaged.result).write_text(text)
    with pytest.raises(InputError, match=r"delete .*to make it again") as raised:
        dag.plan([damaged])
    assert found in str(raised.value)
    assert damaged.result in str(raised.value)


def test_a_key_does_not_know_where_the_store_lies(tmp_path: Path) -> None:
    one, other = stage(tmp_path / "one", "draw-0a1b"), stage(tmp_path / "other", "draw-0a1b")
    assert one.key == other.key == "draw-0a1b/result.json"
    assert one.folder == f"{tmp_path}/one/draw-0a1b"


def test_the_cause_is_what_the_task_raised_not_rays_wrapping() -> None:
    from ray.exceptions import RayTaskError
    from ray.train import ControllerError, WorkerGroupError

    raised = InputError("expected a mask")
    task = RayTaskError("preprocess", "traceback", raised).as_instanceof_cause()
    assert dag.cause(raised) is raised
    assert dag.cause(task) is raised
    assert dag.cause(RayTaskError("draw", "traceback", task)) is raised
    in_worker = WorkerGroupError("a worker failed", {1: task})
    assert dag.cause(in_worker) is raised
    assert dag.cause(RayTaskError("train", "traceback", in_worker)) is raised
    assert dag.cause(ControllerError(task)) is raised
    empty = WorkerGroupError("no worker said why", {})
    assert dag.cause(empty) is empty


def test_each_cause_is_named_once_with_the_stage_where_it_arose() -> None:
    lost = RuntimeError("node lost")
    with pytest.raises(StageFailedError) as raised:
        dag._raise({"train fold 0": lost, "evaluate fold 0": lost, "train fold 1": ValueError("other")})
    assert str(raised.value) == (
        "2 stage(s) failed; submit the same job again to go on from what is done:\n"
        "  train fold 0: RuntimeError: node lost\n"
        "  train fold 1: ValueError: other"
    )
    assert raised.value.stages == ("train fold 0", "evaluate fold 0", "train fold 1")
    assert raised.value.__cause__ is lost


def test_bad_input_among_the_causes_makes_it_the_users_matter() -> None:
    bad = InputError("expected 3 images, found 1")
    with pytest.raises(StageInputError) as raised:
        dag._raise({"train": RuntimeError("node lost"), "draw": bad})
    assert "  train: RuntimeError: node lost\n  draw: expected 3 images, found 1" in str(raised.value)
    assert raised.value.__cause__ is bad
    assert raised.value.stages == ("train", "draw")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray; the environment that it sets is put back."""
    from pipelines.cluster import connected

    with patch.dict(os.environ):
        os.environ.pop("RAY_ADDRESS", None)
        with connected():
            yield


def count_up(root: str, name: str, *needed: Mapping[str, Any]) -> Mapping[str, Any]:
    """One more than the sum of what it needs; leaves a line in the log and something in its scratch folder.

    Fails as long as there is a file `fail-NAME`, but only a second after `right` is done: what needs `right` alone
    has then run, unless it was told to wait.
    """
    folder = Path(root)
    storage.write_bytes(f"{root}/{name}/scratch/state.bin", b"state")
    switch = folder / f"fail-{name}"
    if switch.exists():
        until = time.monotonic() + 60
        while not storage.exists(f"{root}/right/result.json") and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(1)
    with (folder / "log").open("a") as log:
        log.write(f"{name}\n")
    if switch.exists():
        raise InputError(f"expected no file {switch.name}")
    return {"value": 1 + sum(result["value"] for result in needed)}


def counting(root: Path, name: str, *needs: Stage, **changes: Any) -> Stage:
    plain = stage(root, name, *needs, cpus=0.25, scratch=f"{root}/{name}/scratch", **changes)
    return replace(plain, run=count_up, arguments=(str(root), name))


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_an_attempt_tells_of_each_end_and_gives_what_was_reached(tmp_path: Path) -> None:
    top = counting(tmp_path, "top")
    left, right = counting(tmp_path, "left", top), counting(tmp_path, "right", top)
    end, later = counting(tmp_path, "end", left), counting(tmp_path, "later", right, after=(left,))
    (tmp_path / "fail-left").touch()
    ended: dict[str, bool] = {}
    outcome = dag.attempt([end, later], ended.__setitem__)
    assert outcome.results == {"later": {"value": 3}}
    assert dag.causes(outcome.failures) == {"left": "expected no file fail-left"}
    assert set(outcome.failures) == {"left", "end"}
    assert ended == {"top": True, "right": True, "left": False, "end": False, "later": True}
    assert list(ended).index("later") > list(ended).index("left")


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_a_failure_keeps_the_others_results_and_a_second_submission_does_the_rest(tmp_path: Path) -> None:
    top = counting(tmp_path, "top")
    left, right = counting(tmp_path, "left", top), counting(tmp_path, "right", top)
    end = counting(tmp_path, "end", left, right)
    later = counting(tmp_path, "later", right, after=(left,))
    (tmp_path / "fail-left").touch()

    with pytest.raises(StageInputError) as raised:
        dag.execute([end, later])
    assert str(raised.value).endswith(":\n  left: expected no file fail-left")
    assert raised.value.stages == ("left", "end")
    # Not retried; and what was only to wait for it did wait, and ran.
    log = (tmp_path / "log").read_text().split()
    assert sorted(log) == ["later", "left", "right", "top"]
    assert log.index("top") == 0
    assert log.index("later") > log.index("left")
    assert {s.name: s.recorded() for s in (top, left, right, end, later)} == {
        "top": {"value": 1}, "left": None, "right": {"value": 2}, "end": None, "later": {"value": 3}
    }  # fmt: skip
    # A failed stage's scratch is what it goes on from.
    assert {s.name for s in (top, left, right, later) if storage.exists(s.scratch)} == {"left"}

    (tmp_path / "fail-left").unlink()
    (tmp_path / "log").unlink()
    assert dag.execute([end, later]) == {"end": {"value": 5}, "later": {"value": 3}}
    assert (tmp_path / "log").read_text().split() == ["left", "end"]
    assert not storage.exists(left.scratch)
    assert storage.read_json(end.result) == {"value": 5}


def lose(*needed: Mapping[str, Any]) -> Mapping[str, Any]:
    raise ZeroDivisionError("lost")


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_a_failure_that_is_not_the_users_is_told_apart(tmp_path: Path) -> None:
    broken = replace(stage(tmp_path, "broken"), run=lose, cpus=0.25)
    with pytest.raises(StageFailedError, match=r"1 stage\(s\) failed") as raised:
        dag.execute([counting(tmp_path, "downstream", broken)])
    assert str(raised.value).endswith("\n  broken: ZeroDivisionError: lost")
    assert not isinstance(raised.value, InputError)
    assert not (tmp_path / "log").exists()


def is_three(result: Mapping[str, Any]) -> bool:
    return bool(result["value"] == 3)


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_a_recorded_result_is_kept_if_it_holds_and_made_again_if_not(tmp_path: Path) -> None:
    kept = counting(tmp_path, "kept", holds=is_three)
    lost = counting(tmp_path, "lost", holds=is_three)
    record(kept, value=3)
    record(lost, value=4)
    assert dag.execute([kept, lost]) == {"kept": {"value": 3}, "lost": {"value": 1}}
    assert (tmp_path / "log").read_text().split() == ["lost"]
    assert storage.read_json(lost.result) == {"value": 1}


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_of_two_jobs_that_race_for_a_result_one_wins_and_the_other_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Each job looks before it runs, so both think that the result is theirs to write.
    seal = replace(counting(tmp_path, "seal"), exclusive=True, complete=lambda result: False)
    assert dag.execute([seal]) == {"seal": {"value": 1}}
    assert not caplog.records
    assert dag.execute([seal]) == {"seal": {"value": 1}}
    assert f"seal: {seal.result!r} was there first, with the same contents" in caplog.text
    record(seal, value=7)
    with pytest.raises(StageInputError, match="is there already and holds something else"):
        dag.execute([seal])
    assert storage.read_json(seal.result) == {"value": 7}


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_what_a_stage_says_is_told_before_what_comes_after_it_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(result: Mapping[str, Any]) -> str:
        later = storage.exists(f"{tmp_path}/later/scratch/state.bin")
        return f"found {result['value']}, {'too late' if later else 'in time'}"

    first = counting(tmp_path, "first", says=told)
    later = counting(tmp_path, "later", after=(first,))
    with caplog.at_level("INFO", "pipelines.dag"):
        dag.execute([later, first])
        assert caplog.messages == ["first: found 1, in time"]
        dag.execute([later, first])
    assert len(caplog.messages) == 1  # done before: nothing new to say


def half(root: str, number: int) -> float:
    if number % 2:
        raise InputError(f"expected an even number, found {number}")
    return number / 2


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster")
def test_calls_come_back_in_order_and_bad_input_as_such(tmp_path: Path) -> None:
    assert dag.each(half, [(str(tmp_path), n) for n in (8, 2, 6)], "halves") == [4, 1, 3]
    with pytest.raises(StageInputError, match="halves: expected an even number, found 3"):
        dag.each(half, [(str(tmp_path), n) for n in (2, 3)], "halves")
