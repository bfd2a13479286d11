"""How the workers share an update: by position, so that their number changes no episode."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mshnet.engine
from mshnet.config import TrainingConfig
from mshnet.data.episodes import TrainingSampler, numbered
from mshnet.errors import InputError, TrainingDivergedError
from mshnet.parallel import share_of
from pipelines import train
from pipelines.checkpoint_writer import BackgroundWriter
from pipelines.checkpoints import CHECKPOINTS, Checkpoints, Progress, name_of
from pipelines.config import CrossValidationConfig
from pipelines.drawn import DrawnTraining
from pipelines.results import EpochRecord
from pipelines.worker import _EpochEpisodes, dropout_seed, own_positions, positions
from tests.pipelines.drawn_fold import UPDATES, draw_fold, small_config, train_here

TRAINING = TrainingConfig(epochs=3, episodes_per_epoch=30, global_batch=8, seed=4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("statistics_batch", [0, 4])
def test_the_ranks_share_every_part_of_a_global_batch(world_size: int, statistics_batch: int) -> None:
    training = replace(TRAINING, statistics_batch=statistics_batch)
    size = training.episodes_per_part
    for step in range(2 * training.steps_per_epoch):
        shares = [own_positions(training, step, share_of(size, rank, world_size)) for rank in range(world_size)]
        start = 8 * (step % 3)
        for part in range(8 // size):
            first = start + part * size
            assert [p for own in shares for p in own[part]] == list(range(first, first + size))
        assert {len(own) for own in shares} == {8 // size}


def test_an_epoch_visits_each_position_once_and_leaves_the_batch_that_is_not_full() -> None:
    assert [p for step in range(3) for p in positions(TRAINING, step)] == list(range(24))
    assert positions(TRAINING, 3) == range(8)
    assert own_positions(TRAINING, 5, share_of(8, 1, 2)) == [range(20, 24)]


def test_an_update_has_the_same_episodes_whatever_the_number_of_workers_and_the_start() -> None:
    pairs, _ = numbered([(f"image{i}", i % 5) for i in range(40)])

    def sampler() -> TrainingSampler:
        return TrainingSampler(pairs, range(5), 2, TRAINING.seed, TRAINING.episodes_per_epoch)

    def update(step: int, world_size: int) -> list[object]:
        episodes = _EpochEpisodes(sampler(), step // TRAINING.steps_per_epoch)
        shares = [share_of(8, rank, world_size) for rank in range(world_size)]
        return [episodes[p] for share in shares for own in own_positions(TRAINING, step, share) for p in own]

    alone = [update(step, 1) for step in range(9)]
    for world_size in (2, 3, 4):
        # Backwards: there is no state that an earlier update leaves.
        assert [update(step, world_size) for step in reversed(range(9))] == alone[::-1]
    assert alone[0] != alone[3] != alone[6]


def test_a_dropout_seed_is_of_seed_and_step_alone() -> None:
    assert dropout_seed(0, 0) == 0
    assert dropout_seed(0, 7) == 7 * 1009
    assert dropout_seed(2, 7) == (2 * 1_000_003 + 7) * 1009
    assert len({dropout_seed(seed, step) for seed in range(3) for step in range(200)}) == 3 * 200


@pytest.mark.parametrize("seed", [0, 2**40, 2**63 - 1])
def test_torch_takes_the_dropout_seed_of_every_seed_that_the_configuration_takes(seed: int) -> None:
    TrainingConfig(seed=seed)
    with torch.random.fork_rng(devices=[]):
        drawn = []
        for step in (5, 6, 5):
            torch.manual_seed(dropout_seed(seed, step))
            drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[2] != drawn[1]
    assert dropout_seed(seed, 5) != dropout_seed(seed ^ 1, 5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("exponential", [0.1, 0.1, 0.05, 0.025]),
        ("step", [0.1, 0.1, 0.1, 0.05]),
        ("cosine", [0.1, 0.1 * (1 + 3**0.5 / 2) / 2, 0.075, 0.025]),
        ("constant", [0.1, 0.1, 0.1, 0.1]),
    ],
)
def test_the_learning_rate_is_of_the_step_alone(schedule: str, expected: list[float]) -> None:
    training = TrainingConfig(
        epochs=3,
        episodes_per_epoch=16,
        global_batch=8,
        learning_rate=0.1,
        schedule=schedule,  # type: ignore[arg-type]
        decay=0.5,
        decay_epochs=2,
    )
    steps = (0, 1, 2, 4)
    assert [training.learning_rate_at(step) for step in steps] == pytest.approx(expected, rel=1e-12)
    assert [training.learning_rate_at(step) for step in reversed(steps)] == pytest.approx(expected[::-1], rel=1e-12)


def test_progress_survives_json_in_the_middle_of_an_epoch() -> None:
    assert Progress() == Progress(step=0, history=[], sums=[0.0, 0.0, 0.0], train_s=0.0)
    record = EpochRecord(
        epoch=1, step=3, loss=0.1, outer_loss=0.05, inner_loss=0.15, learning_rate=0.01, episodes_per_s=3.0,
        validation_miou=1 / 3,
    )  # fmt: skip
    progress = Progress(step=4, history=[record], sums=[0.1 + 0.2, 1e-30, 3.0], train_s=12.5)
    assert Progress.from_json(progress.to_text()) == progress


Fold = tuple[CrossValidationConfig, DrawnTraining]


@pytest.fixture(scope="module")
def fold(tmp_path_factory: pytest.TempPathFactory) -> Fold:
    config = small_config(tmp_path_factory.mktemp("fold"))
    return config, draw_fold(config)


@pytest.fixture(scope="module")
def straight(fold: Fold, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed training of which every update's checkpoint is kept."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BackgroundWriter, "offer", BackgroundWriter.put)
        patch.setattr(Checkpoints, "_remove_all_but", lambda *_, **__: None)
        reached = train_here(*fold, folder)
    assert reached.step == UPDATES
    return folder


def newest(fold: Fold, folder: Path) -> tuple[dict[str, torch.Tensor], Progress]:
    """Tensors and progress of the newest checkpoint."""
    found = train._checkpoints(*fold, str(folder)).newest()
    assert found is not None
    return dict(found[1].tensors), found[1].progress


def losses(progress: Progress) -> list[tuple[Any, ...]]:
    """Of a history what is no time."""
    return [(r.step, r.loss, r.outer_loss, r.inner_loss, r.validation_miou) for r in progress.history]


def assert_same(fold: Fold, folder: Path, expected: Path) -> None:
    tensors, reached = newest(fold, folder)
    wanted, undisturbed = newest(fold, expected)
    assert tensors.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(tensors[name], wanted[name])] == []
    assert losses(reached) == losses(undisturbed)


@pytest.mark.parametrize("k", range(1, UPDATES))
def test_train_k_and_resume_is_train_n_bit_for_bit(fold: Fold, straight: Path, tmp_path: Path, k: int) -> None:
    taken = straight / CHECKPOINTS / name_of(k)
    assert len(list(taken.parent.glob("step-*"))) == UPDATES
    (tmp_path / CHECKPOINTS).mkdir(parents=True)
    (tmp_path / CHECKPOINTS / name_of(k)).hardlink_to(taken)
    train_here(*fold, tmp_path)
    assert_same(fold, tmp_path, straight)


def test_a_finished_training_does_nothing_anew(fold: Fold, straight: Path, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINTS).mkdir(parents=True)
    file = tmp_path / CHECKPOINTS / name_of(UPDATES)
    file.hardlink_to(straight / CHECKPOINTS / name_of(UPDATES))
    before = file.stat().st_mtime_ns
    assert train_here(*fold, tmp_path).step == UPDATES
    assert file.stat().st_mtime_ns == before


def test_the_weights_do_not_know_the_number_of_loader_processes(fold: Fold, straight: Path, tmp_path: Path) -> None:
    config, drawn = fold
    compute = replace(config.compute, loader_processes=2, checkpoint_every_steps=0)
    train_here(replace(config, compute=compute), drawn, tmp_path)
    assert_same(fold, tmp_path, straight)


def test_a_checkpoint_of_another_learning_rate_is_refused(fold: Fold, straight: Path) -> None:
    config, drawn = fold
    other = replace(config, training=replace(config.training, learning_rate=0.5))
    with pytest.raises(InputError, match="expected a checkpoint of format 1 and of the training"):
        train_here(other, drawn, straight)


@pytest.mark.parametrize("update", [0, 3])
def test_a_loss_that_is_not_finite_stops_before_any_checkpoint_and_names_its_episodes(
    fold: Fold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int
) -> None:
    calls, real = 0, mshnet.engine.train_step

    def step(relation: Any, features: Any, parts: Any, optimizer: Any, weight: float, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(relation, features, parts, optimizer, math.inf if calls == update + 1 else weight, *rest)

    monkeypatch.setattr(mshnet.engine, "train_step", step)
    monkeypatch.setattr(BackgroundWriter, "offer", BackgroundWriter.put)
    with pytest.raises(TrainingDivergedError) as raised:
        train_here(*fold, tmp_path)
    assert calls == update + 1
    message = str(raised.value)
    assert f"fold 0 diverged at update {update + 1}: " in message
    assert "inf (total)" in message
    assert message.count("query shapes_") == message.count(f", epoch {update // 2 + 1}") == 4
    assert train.progress(*fold, str(tmp_path)).step == update
