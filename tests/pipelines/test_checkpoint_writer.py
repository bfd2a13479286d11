"""The background writer: a copy at the step, one write at a time, errors that come to light, state there and back."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mshnet.errors import TrainingDivergedError
from pipelines.checkpoint_writer import BackgroundWriter, load_state, state_tensors
from pipelines.checkpoints import Checkpoints, Progress, TakenOverError, name_of


class SlowCheckpoints(Checkpoints):
    """Writes when told to, and fails when told to."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, "key")
        self.go = threading.Event()
        self.trouble: Exception | None = None

    def write(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        assert self.go.wait(30)
        if self.trouble:
            raise self.trouble
        super().write(progress, tensors)


def test_what_is_written_is_the_state_of_the_step(tmp_path: Path) -> None:
    checkpoints, weight = SlowCheckpoints(str(tmp_path)), torch.zeros(1000)
    with BackgroundWriter(checkpoints) as writer:
        assert writer.offer(Progress(step=1), {"weight": weight})
        weight += 1  # the training goes on while the write waits
        checkpoints.go.set()
        writer.wait()
        assert writer.offer(Progress(step=2), {"weight": weight})
    assert checkpoints.read(name_of(1)).tensors["weight"].unique().tolist() == [0]
    assert checkpoints.read(name_of(2)).tensors["weight"].unique().tolist() == [1]


def test_one_inside_an_epoch_is_left_out_while_another_is_written_and_that_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = SlowCheckpoints(str(tmp_path))
    with BackgroundWriter(checkpoints) as writer:
        assert writer.offer(Progress(step=1), {"weight": torch.ones(3)})
        assert not writer.offer(Progress(step=2), {"weight": torch.ones(3)})
        assert not writer.offer(Progress(step=3), {"weight": torch.ones(3)})
        threading.Timer(0.2, checkpoints.go.set).start()
        writer.put(Progress(step=4), {"weight": torch.full((3,), 4.0)})
    assert checkpoints.names() == [name_of(4), name_of(1)]
    said = capsys.readouterr().err
    assert said.count("left out") == 1
    assert "update 2" in said


def test_an_error_of_the_thread_is_raised_by_the_next_call(tmp_path: Path) -> None:
    checkpoints = SlowCheckpoints(str(tmp_path))
    checkpoints.go.set()
    checkpoints.trouble = OSError("no space left")
    writer = BackgroundWriter(checkpoints)
    writer.put(Progress(step=1), {"weight": torch.ones(3)})
    with pytest.raises(OSError, match="no space left"):
        writer.put(Progress(step=2), {"weight": torch.ones(3)})
    writer.put(Progress(step=3), {"weight": torch.ones(3)})
    with pytest.raises(OSError, match="no space left"):
        writer.close()
    assert checkpoints.names() == []


def test_an_error_of_the_thread_does_not_replace_the_one_that_ends_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = SlowCheckpoints(str(tmp_path))
    checkpoints.go.set()
    checkpoints.trouble = OSError("no space left")

    def diverge() -> None:
        with BackgroundWriter(checkpoints) as writer:
            writer.put(Progress(step=1), {"weight": torch.ones(3)})
            raise TrainingDivergedError("update 7")

    with pytest.raises(TrainingDivergedError, match="update 7"):
        diverge()
    assert "no space left" in capsys.readouterr().err


def test_one_inside_an_epoch_that_cannot_be_written_is_said_once_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = SlowCheckpoints(str(tmp_path))
    checkpoints.go.set()
    checkpoints.trouble = OSError("no space left")
    with BackgroundWriter(checkpoints) as writer:
        for step in (1, 2):
            assert writer.offer(Progress(step=step), {"weight": torch.ones(3)})
            writer.wait()
        checkpoints.trouble = None
        assert writer.offer(Progress(step=3), {"weight": torch.ones(3)})
        writer.wait()
        checkpoints.trouble = OSError("no space left")
        writer.put(Progress(step=4), {"weight": torch.ones(3)})
        with pytest.raises(OSError, match="no space left"):
            writer.wait()
    assert checkpoints.names() == [name_of(3)]
    said = capsys.readouterr().err
    assert said.count("could not be written (OSError: no space left); going on") == 1


def test_a_run_that_was_taken_over_ends_even_inside_an_epoch(tmp_path: Path) -> None:
    checkpoints = SlowCheckpoints(str(tmp_path))
    checkpoints.go.set()
    checkpoints.claim()
    with BackgroundWriter(checkpoints) as writer:
        writer.put(Progress(step=1), {"weight": torch.ones(3)})
        writer.wait()
        Checkpoints(str(tmp_path), "key").claim()
        assert writer.offer(Progress(step=2), {"weight": torch.ones(3)})
        with pytest.raises(TakenOverError):
            writer.wait()
    assert checkpoints.names() == [name_of(1)]


def network() -> tuple[nn.Module, nn.Module, torch.optim.SGD]:
    torch.manual_seed(0)
    relation = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1))
    relation[0].to(memory_format=torch.channels_last)
    return relation, nn.BatchNorm2d(4), torch.optim.SGD(relation.parameters(), 0.1, momentum=0.9)


def update(relation: nn.Module, optimizer: torch.optim.SGD, seed: int) -> None:
    x = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    relation(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("k", [0, 1, 3])
def test_training_goes_on_bit_for_bit_from_every_update(tmp_path: Path, k: int) -> None:
    straight, _, straight_optimizer = network()
    for step in range(5):
        update(straight, straight_optimizer, step)
    relation, backbone, optimizer = network()
    backbone(torch.randn(2, 4, 3, 3))  # its buffers are this machine's
    for step in range(k):
        update(relation, optimizer, step)
    checkpoints = Checkpoints(str(tmp_path), "key")
    with BackgroundWriter(checkpoints) as writer:
        writer.put(Progress(step=k), state_tensors(relation, optimizer, backbone))
    resumed, resumed_backbone, resumed_optimizer = network()
    torch.nn.init.zeros_(resumed[0].weight)  # type: ignore[index, arg-type]
    load_state(checkpoints.read(name_of(k)).tensors, resumed, resumed_optimizer, resumed_backbone)
    for step in range(k, 5):
        update(resumed, resumed_optimizer, step)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert torch.equal(resumed_backbone.running_mean, backbone.running_mean)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_copy_is_of_the_moment_and_nothing_waits_for_it(tmp_path: Path) -> None:
    checkpoints = SlowCheckpoints(str(tmp_path))
    checkpoints.go.set()
    weight = torch.zeros(2**26, device="cuda")
    with BackgroundWriter(checkpoints) as writer:
        for step in range(3):
            if step == 2:
                torch.cuda.set_sync_debug_mode("error")  # the buffers are there by now
            try:
                writer.put(Progress(step=step), {"weight": weight})
                weight += 1
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if step < 2:
                writer.wait()
    for step in (1, 2):
        assert checkpoints.read(name_of(step)).tensors["weight"].unique().tolist() == [step]
