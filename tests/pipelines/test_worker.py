"""How the workers share an update: by position, so that their number changes no episode."""

from __future__ import annotations

import pytest
import torch

from mshnet.config import TrainingConfig
from mshnet.data.episodes import TrainingSampler, numbered
from pipelines.results import EpochRecord
from pipelines.worker import Progress, _EpochEpisodes, dropout_seed, positions

TRAINING = TrainingConfig(epochs=3, episodes_per_epoch=30, global_batch=8, seed=4)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_ranks_share_every_global_batch_in_order(world_size: int) -> None:
    for step in range(2 * TRAINING.steps_per_epoch):
        shares = [positions(TRAINING, step, rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {8 // world_size}
        start = 8 * (step % 3)
        assert [p for share in shares for p in share] == list(range(start, start + 8))


def test_an_epoch_visits_each_position_once_and_leaves_the_batch_that_is_not_full() -> None:
    visited = [p for step in range(3) for p in positions(TRAINING, step, 0, 1)]
    assert visited == list(range(24))
    assert positions(TRAINING, 3, 0, 1) == range(8)
    assert positions(TRAINING, 5, 1, 2) == range(20, 24)


def test_an_update_has_the_same_episodes_whatever_the_number_of_workers_and_the_start() -> None:
    pairs, _ = numbered([(f"image{i}", i % 5) for i in range(40)])

    def sampler() -> TrainingSampler:
        return TrainingSampler(pairs, range(5), 2, TRAINING.seed, TRAINING.episodes_per_epoch)

    def update(step: int, world_size: int) -> list[object]:
        episodes = _EpochEpisodes(sampler(), step // TRAINING.steps_per_epoch)
        return [episodes[p] for rank in range(world_size) for p in positions(TRAINING, step, rank, world_size)]

    alone = [update(step, 1) for step in range(9)]
    for world_size in (2, 4):
        # Backwards: there is no state that an earlier update leaves.
        assert [update(step, world_size) for step in reversed(range(9))] == alone[::-1]
    assert alone[0] != alone[3] != alone[6]


def test_a_dropout_seed_is_of_seed_step_and_rank_alone() -> None:
    assert dropout_seed(0, 0, 0) == 0
    assert dropout_seed(0, 7, 3) == 7 * 1009 + 3
    assert dropout_seed(2, 7, 3) == (2 * 1_000_003 + 7) * 1009 + 3
    seeds = {dropout_seed(seed, step, rank) for seed in range(3) for step in range(200) for rank in range(8)}
    assert len(seeds) == 3 * 200 * 8


@pytest.mark.parametrize("seed", [0, 2**40, 2**63 - 1])
def test_torch_takes_the_dropout_seed_of_every_seed_that_the_configuration_takes(seed: int) -> None:
    TrainingConfig(seed=seed)
    with torch.random.fork_rng(devices=[]):
        drawn = []
        for step in (5, 6, 5):
            torch.manual_seed(dropout_seed(seed, step, 1))
            drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[2] != drawn[1]
    assert dropout_seed(seed, 5, 1) != dropout_seed(seed ^ 1, 5, 1)


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
