"""Checkpoints: whole or not at all, the right ones kept, the newest sound one found."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from mshnet.data.files import remove_orphans
from mshnet.data.filesystem import filesystem
from mshnet.errors import InputError
from pipelines import storage
from pipelines.checkpoints import (
    Checkpoints,
    DamagedCheckpointError,
    Progress,
    TakenOverError,
    kept,
    name_of,
)
from pipelines.results import EpochRecord

EPOCH = 10


def epoch_end(epoch: int, *scores: float | None) -> Progress:
    """Progress at an epoch's end, by the validation of each epoch so far."""
    history = [
        EpochRecord(
            epoch=i + 1, step=EPOCH * (i + 1), loss=0.1, outer_loss=0.05, inner_loss=0.15, learning_rate=0.01,
            episodes_per_s=3.0, validation_miou=score,
        )
        for i, score in enumerate(scores)
    ]  # fmt: skip
    assert len(history) == epoch
    return Progress(step=EPOCH * epoch, history=history)


def state(value: float) -> dict[str, Tensor]:
    return {
        "relation.weight": torch.full((3, 4), value),
        "relation.seen": torch.tensor(int(value)),
        "momentum.weight": torch.arange(12, dtype=torch.float64).reshape(3, 4) * value,
        "backbone.mean": torch.full((5,), value, dtype=torch.bfloat16),
        "backbone.none": torch.empty(0),
    }


def same(found: object, expected: dict[str, Tensor]) -> bool:
    assert isinstance(found, dict)
    assert found.keys() == expected.keys()
    return all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    progress = Progress(step=4, history=epoch_end(1, 1 / 3).history, sums=[0.1 + 0.2, 1e-30, 3.0], train_s=12.5)
    Checkpoints(str(tmp_path), "key").write(progress, state(2))
    newest = Checkpoints(str(tmp_path), "key").newest()
    assert newest is not None
    name, found = newest
    assert name == "step-000000004.safetensors"
    assert found.progress == progress
    assert same(found.tensors, state(2))


def test_there_is_none_at_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path / "absent"), "key")
    assert checkpoints.newest() is None
    with pytest.raises(FileNotFoundError, match="no sound checkpoint of an epoch's end"):
        checkpoints.best(Progress())


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), "key")
    first = epoch_end(1, 0.5)
    worse = epoch_end(2, 0.5, 0.4)
    for progress in (Progress(step=3), first, Progress(step=14, history=first.history), worse):
        checkpoints.write(progress, state(progress.step))
    assert checkpoints.names() == [name_of(step) for step in (20, 14, 10)]
    checkpoints.write(Progress(step=23, history=worse.history), state(23))
    assert checkpoints.names() == [name_of(step) for step in (23, 20, 10)]
    better = epoch_end(3, 0.5, 0.4, 0.6)
    checkpoints.write(better, state(30))
    # Were the newest damaged, the one before would still need its best.
    assert checkpoints.names() == [name_of(step) for step in (30, 23, 10)]
    checkpoints.write(Progress(step=31, history=better.history), state(31))
    assert checkpoints.names() == [name_of(step) for step in (31, 30)]
    record, best = checkpoints.best(better)
    assert record.epoch == 3
    assert same(best.tensors, state(30))


@pytest.mark.parametrize("damage", ["cut", "lost"])
def test_in_place_of_a_best_one_that_is_damaged_the_best_of_the_others_is_taken(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(str(tmp_path), "key")
    for epoch in (1, 2, 3):
        checkpoints.write(epoch_end(epoch, *(0.6, 0.4, 0.5)[:epoch]), state(10 * epoch))
    reached = epoch_end(3, 0.6, 0.4, 0.5)
    assert checkpoints.best(reached)[0].epoch == 1
    assert not capsys.readouterr().err
    path = tmp_path / name_of(10)
    path.write_bytes(path.read_bytes()[:-3])
    if damage == "lost":
        path.unlink()
    record, best = checkpoints.best(reached)
    assert record.epoch == 3
    assert same(best.tensors, state(30))
    said = capsys.readouterr().err
    assert said.count("the weights of epoch 1 are lost") == said.count("taking the best of the others") == 1
    for name in checkpoints.names():
        storage.remove(storage.join(str(tmp_path), name))
    with pytest.raises(FileNotFoundError, match="no sound checkpoint of an epoch's end"):
        checkpoints.best(reached)


def test_who_claims_the_folder_ends_the_one_before(tmp_path: Path) -> None:
    orphan, successor = Checkpoints(str(tmp_path), "key"), Checkpoints(str(tmp_path), "key")
    orphan.claim()
    orphan.write(Progress(step=3), state(3))
    successor.claim()
    newest = successor.newest()
    assert newest is not None
    assert newest[0] == name_of(3)
    for step in (3, 6):  # neither replaced nor added
        with pytest.raises(TakenOverError, match="expected to be the run that writes"):
            orphan.write(Progress(step=step), state(99))
    assert successor.names() == [name_of(3)]
    assert same(successor.read(name_of(3)).tensors, state(3))
    successor.write(Progress(step=6), state(6))
    assert successor.names() == [name_of(6), name_of(3)]


def test_one_that_is_taken_over_inside_a_write_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orphan, successor = Checkpoints(str(tmp_path), "key"), Checkpoints(str(tmp_path), "key")
    orphan.claim()
    for step in (3, 6):
        orphan.write(Progress(step=step), state(step))
    write = storage.write_bytes

    def overtaken(uri: str, data: bytes) -> None:
        write(uri, data)
        monkeypatch.undo()
        successor.claim()

    monkeypatch.setattr(storage, "write_bytes", overtaken)
    with pytest.raises(TakenOverError):
        orphan.write(Progress(step=9), state(9))
    assert successor.names() == [name_of(step) for step in (9, 6, 3)]


def test_a_folder_that_was_removed_is_not_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    orphan = Checkpoints(str(folder), "key")
    orphan.claim()
    orphan.write(Progress(step=3), state(3))
    storage.remove(str(tmp_path / "run"))
    with pytest.raises(TakenOverError, match="the fold is finished, or was removed"):
        orphan.write(Progress(step=6), state(6))
    assert not (tmp_path / "run").exists()


def test_old_ones_that_cannot_be_removed_are_a_warning_and_go_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(str(tmp_path), "key")
    for step in (3, 6):
        checkpoints.write(Progress(step=step), state(step))

    def refuse(uri: str) -> None:
        raise PermissionError(f"may not remove {uri}")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", refuse)
        checkpoints.write(Progress(step=9), state(9))
    said = capsys.readouterr().err
    assert said.count("could not be removed") == 1
    assert f"may not remove {tmp_path / name_of(3)}" in said
    assert checkpoints.names() == [name_of(step) for step in (9, 6, 3)]
    checkpoints.write(Progress(step=12), state(12))
    assert checkpoints.names() == [name_of(step) for step in (12, 9)]


@pytest.mark.parametrize(
    ("scores", "best"),
    [((0.1, 0.3, 0.2), 2), ((0.3, 0.3, 0.2), 2), ((None, None, None), 3), ((0.0, None, None), 1), ((0.2,), 1)],
)
def test_the_best_is_that_of_the_highest_validation_of_equals_the_last(
    scores: tuple[float | None, ...], best: int
) -> None:
    record = epoch_end(len(scores), *scores).best
    assert record is not None
    assert record.epoch == best
    assert Progress().best is None


def test_a_run_that_goes_on_removes_what_it_has_passed(tmp_path: Path) -> None:
    before = Checkpoints(str(tmp_path), "key")
    for step in (3, 6, 9):
        before.write(Progress(step=step), state(step))
    after = Checkpoints(str(tmp_path), "key")
    newest = after.newest()
    assert newest is not None
    assert newest[0] == name_of(9)
    after.write(Progress(step=12), state(12))
    assert after.names() == [name_of(12), name_of(9)]


def test_one_of_a_run_that_was_just_killed_is_left_alone(tmp_path: Path) -> None:
    own, killed = Checkpoints(str(tmp_path), "key"), Checkpoints(str(tmp_path), "key")
    own.write(Progress(step=3), state(3))
    killed.newest()
    killed.write(Progress(step=9), state(9))
    own.write(Progress(step=6), state(6))
    assert own.names() == [name_of(step) for step in (9, 6, 3)]


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "text", "progress"])
def test_a_damaged_newest_one_is_named_and_the_one_before_is_taken(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(str(tmp_path), "key")
    for step in (3, 6):
        checkpoints.write(Progress(step=step), state(step))
    path = tmp_path / name_of(6)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[: len(whole) - 7],
            "empty": b"",
            "bit": whole[:-20] + bytes([whole[-20] ^ 4]) + whole[-19:],
            "text": b"no checkpoint at all, but some text of more than eight bytes",
            "progress": whole.replace(b'\\"step\\": 6', b'\\"step\\": 7'),
        }[damage]
    )
    assert path.read_bytes() != whole
    with pytest.raises(DamagedCheckpointError):
        checkpoints.read(name_of(6))
    again = Checkpoints(str(tmp_path), "key")
    newest = again.newest()
    assert newest is not None
    assert newest[0] == name_of(3)
    assert same(newest[1].tensors, state(3))
    said = capsys.readouterr().err
    assert name_of(6) in said
    assert "damaged" in said
    again.write(Progress(step=4), state(4))
    assert again.names() == [name_of(4), name_of(3)]


def test_one_of_another_training_is_refused(tmp_path: Path) -> None:
    Checkpoints(str(tmp_path), "theirs").write(Progress(step=3), state(3))
    with pytest.raises(InputError, match=r"of the training ours at .*step-000000003.*found format 1 and theirs"):
        Checkpoints(str(tmp_path), "ours").newest()


def test_on_an_object_store_the_same(s3_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = f"{s3_folder}/run/checkpoints"
    checkpoints = Checkpoints(folder, "key")
    assert checkpoints.newest() is None
    for step in (3, 6, 9):
        checkpoints.write(Progress(step=step), state(step))
    assert checkpoints.names() == [name_of(9), name_of(6)]
    fs, path = filesystem(folder)
    whole = fs.cat_file(f"{path}/{name_of(9)}")
    fs.pipe_file(f"{path}/{name_of(9)}", whole[:200])
    newest = Checkpoints(folder, "key").newest()
    assert newest is not None
    assert newest[0] == name_of(6)
    assert same(newest[1].tensors, state(6))
    assert name_of(9) in capsys.readouterr().err


WRITER = """
import sys, torch
from pipelines.checkpoints import Checkpoints, Progress
tensors = {"relation.weight": torch.ones(2**23)}
checkpoints = Checkpoints(sys.argv[1], "key")
for step in range(1, 10**6):
    checkpoints.write(Progress(step=step), tensors)
    print(step, flush=True)
"""


def _stop_inside_a_write(process: psutil.Process, folder: Path) -> None:
    until = time.monotonic() + 60
    while True:
        while not list(folder.glob(".writing-*")):
            assert time.monotonic() < until
        process.suspend()
        while process.status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < until
        if list(folder.glob(".writing-*")):
            return
        process.resume()


def test_a_writer_killed_in_the_middle_of_a_write_leaves_a_sound_newest_one(tmp_path: Path) -> None:
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(3):
            written = int(process.stdout.readline())
        _stop_inside_a_write(psutil.Process(process.pid), tmp_path)
        process.kill()
        process.communicate()
        assert list(tmp_path.glob(".writing-*"))
        newest = Checkpoints(str(tmp_path), "key").newest()
        assert newest is not None
        assert newest[1].progress.step >= written
        assert newest[0] == Checkpoints(str(tmp_path), "key").names()[0]
        assert len(remove_orphans(str(tmp_path))) == 1
        assert not list(tmp_path.glob(".writing-*"))
        storage.remove(str(tmp_path))


def test_kept_names_two_and_their_best() -> None:
    better = epoch_end(3, 0.5, 0.4, 0.6)
    assert kept(Progress(step=1), None) == {name_of(1)}
    assert kept(better, epoch_end(2, 0.5, 0.4)) == {name_of(step) for step in (30, 20, 10)}
