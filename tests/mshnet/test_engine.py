"""One training step, and evaluation, on a network small enough for any machine."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mshnet import ModelConfig, MSHNet
from mshnet.backbone import Features
from mshnet.baselines import foreground
from mshnet.config import TrainingConfig
from mshnet.data.batches import EpisodeBatch
from mshnet.data.transforms import normalise
from mshnet.engine import Part, evaluate, make_optimizer, network_predictor, train_step
from mshnet.features import FeatureCache
from mshnet.judging import Segmentation
from mshnet.loss import segmentation_loss
from mshnet.metrics import Counts
from mshnet.model import Prediction
from mshnet.parallel import ChannelDropout, Share
from tests.mshnet import published
from tests.mshnet.noise_episodes import episode_batch

EPISODES: list[tuple[int, tuple[int, ...]]] = [(0, (1,)), (2, (3,)), (4, (0,)), (1, (2,)), (5, (5,))]
CLASS_IDS = (4, 2, 4, 0, 2)


@pytest.fixture(scope="module")
def untrained() -> MSHNet:
    config = ModelConfig(backbone="resnet18", dropout=0.0)
    return published.build(config, published.seeded(config, salt="engine")).eval()


@pytest.fixture
def model(untrained: MSHNet) -> MSHNet:
    """A copy to train."""
    return copy.deepcopy(untrained).train()


def sgd(model: MSHNet, learning_rate: float = 0.01) -> torch.optim.SGD:
    return make_optimizer(model.relation.parameters(), TrainingConfig(learning_rate=learning_rate))


def whole(batch: EpisodeBatch) -> list[Part]:
    """The batch as the only part, all of it this process's."""
    return [Part(batch, Share(0, len(batch), len(batch)))]


def test_training_lowers_the_loss(model: MSHNet) -> None:
    batch = episode_batch(EPISODES[:2])
    features, optimizer = FeatureCache(model.backbone, 2**30), sgd(model)
    updates = [train_step(model.relation, features, whole(batch), optimizer, 0.3, seed=step) for step in range(6)]
    for update in updates:
        total, outer, inner = update.losses.tolist()
        assert total == pytest.approx(outer + 0.3 * inner, rel=1e-6)
        assert not update.losses.requires_grad  # a kept loss must not keep its graph
        assert update.finite
    first, last = updates[0].losses, updates[-1].losses
    assert last[0] < 0.7 * first[0]
    assert last[2] < first[2]
    assert (features.computed, features.from_memory) == (4, 5 * 4)


def test_a_step_is_sgds_formula(model: MSHNet) -> None:
    batch = episode_batch(EPISODES[:2])
    twin = copy.deepcopy(model)
    before = [parameter.detach().clone() for parameter in model.relation.parameters()]
    optimizer = sgd(model, learning_rate=0.05)
    for parameter in model.relation.parameters():
        parameter.grad = torch.ones_like(parameter)  # what an earlier step left must not be added to
    found = train_step(model.relation, FeatureCache(model.backbone, 0), whole(batch), optimizer, 0.25, seed=0)
    prediction = twin(normalise(batch.query_images), normalise(batch.support_images), batch.support_masks.float())
    expected = segmentation_loss(prediction, batch.query_masks, 0.25)
    expected.total.backward()
    assert found.losses.tolist() == pytest.approx([loss.item() for loss in expected], rel=1e-6)
    for start, moved, truth in zip(before, model.relation.parameters(), twin.relation.parameters(), strict=True):
        assert truth.grad is not None
        step = 0.05 * (truth.grad + 0.0005 * start)
        assert torch.allclose(moved, start - step, rtol=1e-6, atol=1e-6 * float(step.abs().max()) + 1e-9)
    assert all(torch.equal(a, b) for a, b in zip(model.backbone.parameters(), twin.backbone.parameters(), strict=True))


class Poisoned(nn.Module):
    """A network whose prediction or gradient is not a number for one pixel of the second episode."""

    def __init__(self, network: nn.Module, poison: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.network = network
        self.poison = poison

    def forward(self, query: Features, support: Features, masks: Tensor) -> Prediction:
        prediction = self.network(query, support, masks)
        low = prediction.logits_low.clone()
        self.poison(low)
        return Prediction(logits_low=low, inner_logits=prediction.inner_logits, size=prediction.size)


def nan_loss(logits: Tensor) -> None:
    logits[1, :, 0, 0] = torch.tensor([math.nan, -math.nan])


def infinite_loss(logits: Tensor) -> None:
    logits[1, :, 0, 0] = torch.tensor([math.inf, -math.inf])


def nan_gradient(logits: Tensor) -> None:
    logits.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(1), math.nan))


@pytest.mark.parametrize("poison", [nan_loss, infinite_loss, nan_gradient])
@pytest.mark.parametrize("updates_before", [0, 1])
def test_an_update_that_is_not_finite_changes_nothing(
    model: MSHNet, poison: Callable[[Tensor], None], updates_before: int
) -> None:
    batch = episode_batch(EPISODES[:2])
    features, optimizer = FeatureCache(model.backbone, 2**30), sgd(model)
    for step in range(updates_before):  # so that there is momentum to go on
        assert train_step(model.relation, features, whole(batch), optimizer, 0.3, seed=step).finite
    before = [parameter.detach().clone() for parameter in model.relation.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    update = train_step(Poisoned(model.relation, poison), features, whole(batch), optimizer, 0.3, seed=1)
    assert not update.finite
    assert update.losses.isfinite().all() == (poison is nan_gradient)
    assert all(torch.equal(a, b) for a, b in zip(model.relation.parameters(), before, strict=True))
    assert len(state["state"]) == len(before)
    for key, kept in optimizer.state_dict()["state"].items():
        assert torch.equal(kept["momentum_buffer"], state["state"][key]["momentum_buffer"])
    train_step(model.relation, features, whole(batch), optimizer, 0.3, seed=2)  # the same step, sound, does
    assert not any(torch.equal(a, b) for a, b in zip(model.relation.parameters(), before, strict=True))


def test_after_a_stop_no_sound_update_changes_the_weights_either(model: MSHNet) -> None:
    batch = episode_batch(EPISODES[:2])
    features, optimizer = FeatureCache(model.backbone, 2**30), sgd(model)
    before = copy.deepcopy((model.relation, optimizer.state_dict()))
    update = train_step(model.relation, features, whole(batch), optimizer, 0.3, 1, stopped=torch.tensor(True))
    assert update.finite  # which it is; only nothing comes of it
    for parameter, kept in zip(model.relation.parameters(), before[0].parameters(), strict=True):
        assert torch.equal(parameter, kept)
    for key, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], before[1]["state"][key]["momentum_buffer"])
    train_step(model.relation, features, whole(batch), optimizer, 0.3, 1, stopped=torch.tensor(False))
    assert not any(torch.equal(a, b) for a, b in zip(model.relation.parameters(), before[0].parameters(), strict=True))


def test_the_optimizer_is_torchs_plain_sgd(model: MSHNet) -> None:
    """The fused kernel, begun with zero momentum, against the loop over the parameters that begins with none."""
    batch = episode_batch(EPISODES[:2])
    twin = copy.deepcopy(model)
    training = TrainingConfig(learning_rate=0.05, momentum=0.9, weight_decay=0.01)
    optimizer = make_optimizer(model.relation.parameters(), training)
    plain = torch.optim.SGD(twin.relation.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, foreach=False)
    features = FeatureCache(model.backbone, 2**30)
    for step in range(3):
        train_step(model.relation, features, whole(batch), optimizer, 0.3, seed=step)
        for parameter, moved in zip(twin.relation.parameters(), model.relation.parameters(), strict=True):
            parameter.grad = moved.grad
        plain.step()
    for parameter, moved in zip(twin.relation.parameters(), model.relation.parameters(), strict=True):
        torch.testing.assert_close(moved, parameter, rtol=1e-5, atol=1e-7)


def test_parts_are_one_update_of_their_mean(model: MSHNet) -> None:
    """Two parts against two backward passes by hand; batch statistics are those of a part."""
    batches = [episode_batch(EPISODES[:2]), episode_batch(EPISODES[2:4])]
    twin = copy.deepcopy(model)
    update = train_step(
        model.relation,
        FeatureCache(model.backbone, 0),
        [Part(batch, Share(0, 2, 2)) for batch in batches],
        sgd(model),
        inner_weight=0.3,
        seed=0,
    )
    expected = []
    for batch in batches:
        prediction = twin(normalise(batch.query_images), normalise(batch.support_images), batch.support_masks.float())
        losses = segmentation_loss(prediction, batch.query_masks, 0.3)
        (losses.total / 2).backward()
        expected.append(torch.stack(losses).detach())
    torch.testing.assert_close(update.losses, torch.stack(expected).mean(0), rtol=1e-6, atol=0)
    for found, truth in zip(model.relation.parameters(), twin.relation.parameters(), strict=True):
        torch.testing.assert_close(found.grad, truth.grad, rtol=1e-4, atol=1e-6)
    for name, buffer in model.relation.named_buffers():
        torch.testing.assert_close(buffer, twin.relation.get_buffer(name), rtol=1e-5, atol=1e-7)


def test_dropout_is_a_function_of_the_seed(untrained: MSHNet) -> None:
    batch = episode_batch(EPISODES[:2])
    losses = []
    for seed in (7, 7, 8):
        network = copy.deepcopy(untrained.relation).train()
        for module in network.modules():
            if isinstance(module, ChannelDropout):
                module.p = 0.2
        torch.rand(3)  # whatever was drawn before
        optimizer = make_optimizer(network.parameters(), TrainingConfig())
        features = FeatureCache(untrained.backbone, 0)
        losses.append(train_step(network, features, whole(batch), optimizer, 0.3, seed=seed).losses)
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_a_relation_must_lead_to_its_module(model: MSHNet) -> None:
    """Else its dropout would not know the share."""
    features, optimizer = FeatureCache(model.backbone, 0), sgd(model)
    with pytest.raises(TypeError, match=r"expected a module, or a wrapper that holds one as \.module, found function"):
        train_step(
            lambda *inputs: model.relation(*inputs), features, whole(episode_batch(EPISODES[:2])), optimizer, 0.3, 0
        )


@torch.no_grad()
def test_evaluation_equals_a_loop_over_the_episodes(untrained: MSHNet) -> None:
    """By the network's own forward, one episode after the other, counted with NumPy."""
    balanced = copy.deepcopy(untrained)
    intersection, union, unsure = [], [], []
    logits = []
    for episode in EPISODES:
        batch = episode_batch([episode])
        images, supports = normalise(batch.query_images), normalise(batch.support_images)
        logits.append(balanced(images, supports, batch.support_masks.float()).logits[0])
    # Shifted, so that half of the pixels are foreground.
    shift = torch.stack([x[1] - x[0] for x in logits]).median()
    for episode, x in zip(EPISODES, logits, strict=True):
        margin = (x[1] - x[0] - shift).numpy()
        truth = episode_batch([episode]).query_masks[0].numpy()
        valid = truth != 255
        intersection.append([((margin <= 0) & (truth == 0)).sum(), ((margin > 0) & (truth == 1)).sum()])
        union.append([(((margin <= 0) | (truth == 0)) & valid).sum(), (((margin > 0) & valid) | (truth == 1)).sum()])
        unsure.append(int((np.abs(margin) < 1e-4).sum()))  # where rounding may decide
    head_bias = balanced.relation.pyramid.head[-1].bias
    head_bias[0] += shift
    batches = [episode_batch(EPISODES[a:b], CLASS_IDS[a:b]) for a, b in ((0, 2), (2, 4), (4, 5))]
    features = FeatureCache(balanced.backbone, 2**30)
    found = evaluate({"network": network_predictor(balanced.relation), "all": foreground}, features, batches)
    assert tuple(found["network"].class_ids) == tuple(found["all"].class_ids) == CLASS_IDS
    counts = found["network"].counts
    assert counts.intersection.shape == (5, 2)
    assert max(unsure) <= 5
    for name, expected in (("intersection", intersection), ("union", union)):
        distance = np.abs(getattr(counts, name) - np.array(expected)).max(1)
        assert (distance <= unsure).all()
    assert counts.intersection.min() > 100  # the masks are neither empty nor full
    # Every image once, whatever the number of predictors.
    assert (features.computed, features.from_memory) == (6, 4)
    pixels = 65 * 64
    assert (found["all"].counts.union[:, 1] == pixels).all()
    assert (found["all"].counts.intersection[:, 0] == 0).all()


@torch.no_grad()
def test_the_same_counts_however_episodes_are_batched() -> None:
    """With a predictor whose answer is exact, the counts are the same integers."""

    def bright(query: Features, support: Features, batch: EpisodeBatch) -> Segmentation:
        return Segmentation(batch.query_images.float().mean(1, keepdim=True), threshold=110.0)

    class NoFeatures(FeatureCache):
        def __init__(self) -> None:
            empty = torch.empty(0, 0, 0, 0, 0)
            self.nothing = Features(empty, empty, empty)

        def of(self, batch: object) -> tuple[Features, Features]:
            return self.nothing, self.nothing

    found: list[Counts] = []
    for size in (1, 2, 5):
        batches = [episode_batch(EPISODES[i : i + size], CLASS_IDS[i : i + size]) for i in range(0, 5, size)]
        result = evaluate({"bright": bright}, NoFeatures(), iter(batches))["bright"]
        assert tuple(result.class_ids) == CLASS_IDS
        found.append(result.counts)
    for counts in found[1:]:
        np.testing.assert_array_equal(counts.intersection, found[0].intersection)
        np.testing.assert_array_equal(counts.union, found[0].union)
    assert (found[0].intersection[:, 1] / found[0].union[:, 1]).min() > 0.8


@torch.no_grad()
def test_a_tie_is_background() -> None:
    def undecided(query: object, support: object, masks: torch.Tensor) -> Prediction:
        logits = torch.zeros(1, 2, 2, 2)
        logits[0, 1] = torch.tensor([[0.0, 1e-6], [-1e-6, 3.0]])
        return Prediction(logits_low=logits, inner_logits=(), size=(2, 2))

    empty = torch.empty(0, 0, 0, 0, 0)
    features = Features(empty, empty, empty)
    mask = network_predictor(undecided)(features, features, episode_batch([(0, (1,))])).masks((2, 2))
    assert mask.tolist() == [[[False, True], [False, True]]]
