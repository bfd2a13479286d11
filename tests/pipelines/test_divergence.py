"""What the guard remembers between two looks and says at one; and that nothing waits for a GPU meanwhile."""

from __future__ import annotations

import math

import pytest
import torch

from mshnet import ModelConfig, MSHNet
from mshnet.backbone import InferenceBackbone
from mshnet.config import TrainingConfig
from mshnet.engine import Part, Update, make_optimizer, train_step
from mshnet.errors import TrainingDivergedError
from mshnet.features import FeatureCache
from mshnet.parallel import Share
from pipelines.divergence import DivergenceGuard
from pipelines.network import Relation
from pipelines.watch import Watch
from tests.mshnet.noise_episodes import episode_batch

CPU = torch.device("cpu")


def update(total: float, finite: bool = True) -> Update:
    return Update(torch.tensor([total, 2.0, 1.0]), torch.tensor(finite))


def guard(every: int = 1) -> DivergenceGuard:
    made = DivergenceGuard(3, lambda step: [f"query of {step}"], every, CPU)
    made.every = every  # as on a GPU
    return made


def test_the_first_bad_update_is_kept_until_the_look_and_stops_those_between() -> None:
    kept = guard(every=5)
    stopped = []
    for step, (total, finite) in enumerate([(4.0, True), (math.nan, False), (3.0, True), (math.inf, False)]):
        stopped.append(bool(kept.stopped))
        kept.after(step, update(total, finite))
    assert stopped == [False, False, True, True]
    with pytest.raises(
        TrainingDivergedError,
        match=r"fold 3 diverged at update 2: .* found losses of nan \(total\), 2.0 \(outer\), 1.0 \(inner\); "
        r"noticed after update 5\. .*: query of 1$",
    ):
        kept.after(4, update(3.0))


def test_sound_updates_pass() -> None:
    kept = guard()
    for step in range(3):
        kept.after(step, update(1.0))
    kept.look(2)
    assert not kept.stopped


def test_a_cpu_is_looked_at_after_each_update() -> None:
    with pytest.raises(TrainingDivergedError, match="noticed after update 1"):
        DivergenceGuard(0, lambda step: [], 100, CPU).after(0, update(math.nan, finite=False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_waits_for_a_gpu_between_two_looks() -> None:
    device = torch.device("cuda")
    model = MSHNet(ModelConfig(backbone="resnet18")).to(device).train()
    training = TrainingConfig(epochs=1, episodes_per_epoch=200, global_batch=2)
    optimizer = make_optimizer(model.relation.parameters(), training)
    features = FeatureCache(InferenceBackbone(model.backbone, torch.bfloat16), 0)
    relation = Relation(model.relation, "bfloat16")
    kept = DivergenceGuard(0, lambda step: [], 50, device)
    watch = Watch(None, "", 0, training, 50)
    parts = [Part(episode_batch([(0, (1,)), (2, (3,))]).to(device), Share(0, 2, 2))]

    def train(step: int) -> None:
        found = train_step(relation, features, parts, optimizer, 0.3, step, kept.stopped)
        kept.after(step, found)
        watch.update(step + 1, found.losses, 0.0)

    for step in range(3):  # libraries are loaded, memory is taken
        train(step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 40):
            train(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kept.look(39)
    watch.close()
