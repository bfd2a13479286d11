"""One training step, and evaluation, on a network small enough for any machine."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from mshnet import ModelConfig, MSHNet
from mshnet.backbone import Features
from mshnet.baselines import foreground
from mshnet.data.transforms import normalise
from mshnet.engine import evaluate, network_predictor, train_step
from mshnet.features import FeatureCache
from mshnet.loss import segmentation_loss
from mshnet.metrics import Counts
from mshnet.model import Prediction
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
    return torch.optim.SGD(model.relation.parameters(), lr=learning_rate, momentum=0.9, weight_decay=0.0005)


def test_training_lowers_the_loss(model: MSHNet) -> None:
    batch = episode_batch(EPISODES[:2])
    features, optimizer = FeatureCache(model.backbone, 2**30), sgd(model)
    losses = [train_step(model.relation, features, batch, optimizer, inner_weight=0.3) for _ in range(6)]
    for step in losses:
        assert step.total.item() == pytest.approx(step.outer.item() + 0.3 * step.inner.item(), rel=1e-6)
        assert not step.total.requires_grad  # a kept loss must not keep its graph
    assert losses[-1].total < 0.7 * losses[0].total
    assert losses[-1].inner < losses[0].inner
    assert (features.misses, features.hits) == (4, 5 * 4)


def test_a_step_is_sgds_formula(model: MSHNet) -> None:
    batch = episode_batch(EPISODES[:2])
    twin = copy.deepcopy(model)
    before = [parameter.detach().clone() for parameter in model.relation.parameters()]
    optimizer = sgd(model, learning_rate=0.05)
    for parameter in model.relation.parameters():
        parameter.grad = torch.ones_like(parameter)  # what an earlier step left must not be added to
    found = train_step(model.relation, FeatureCache(model.backbone, 0), batch, optimizer, inner_weight=0.25)
    prediction = twin(normalise(batch.query_images), normalise(batch.support_images), batch.support_masks.float())
    expected = segmentation_loss(prediction, batch.query_masks, 0.25)
    expected.total.backward()
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    for start, moved, truth in zip(before, model.relation.parameters(), twin.relation.parameters(), strict=True):
        assert truth.grad is not None
        step = 0.05 * (truth.grad + 0.0005 * start)
        assert torch.allclose(moved, start - step, rtol=1e-6, atol=1e-6 * float(step.abs().max()) + 1e-9)
    assert all(torch.equal(a, b) for a, b in zip(model.backbone.parameters(), twin.backbone.parameters(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_no_weight(model: MSHNet, value: float) -> None:
    batch = episode_batch(EPISODES[:2], class_ids=(4, 2))
    features, optimizer = FeatureCache(model.backbone, 2**30), sgd(model)
    train_step(model.relation, features, batch, optimizer, inner_weight=0.3)  # so that there is momentum to go on
    before = [parameter.detach().clone() for parameter in model.relation.parameters()]
    momentum = copy.deepcopy(optimizer.state_dict()["state"])

    def poisoned(*inputs: object) -> Prediction:
        prediction = model.relation(*inputs)
        low = prediction.logits_low.clone()
        low[1, :, 0, 0] = torch.tensor([value, -value])  # one pixel of one episode
        return Prediction(logits=prediction.logits, logits_low=low, inner_logits=prediction.inner_logits)

    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) for queries \(0, 2\) of classes \(4, 2\)"):
        train_step(poisoned, features, batch, optimizer, inner_weight=0.3)
    assert all(torch.equal(a, b) for a, b in zip(model.relation.parameters(), before, strict=True))
    for key, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], momentum[key]["momentum_buffer"])
    train_step(model.relation, features, batch, optimizer, inner_weight=0.3)  # the same step, sound, does
    assert not any(torch.equal(a, b) for a, b in zip(model.relation.parameters(), before, strict=True))


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
    assert found["network"].class_ids == found["all"].class_ids == CLASS_IDS
    counts = found["network"].counts
    assert counts.intersection.shape == (5, 2)
    assert max(unsure) <= 5
    for name, expected in (("intersection", intersection), ("union", union)):
        distance = np.abs(getattr(counts, name) - np.array(expected)).max(1)
        assert (distance <= unsure).all()
    assert counts.intersection.min() > 100  # the masks are neither empty nor full
    # Every image once, whatever the number of predictors.
    assert (features.misses, features.hits) == (6, 4)
    pixels = 65 * 64
    assert (found["all"].counts.union[:, 1] == pixels).all()
    assert (found["all"].counts.intersection[:, 0] == 0).all()


@torch.no_grad()
def test_the_same_counts_however_episodes_are_batched() -> None:
    """With a predictor whose answer is exact, the counts are the same integers."""

    def bright(query: Features, support: Features, batch: object) -> torch.Tensor:
        return batch.query_images.float().mean(1) > 110  # type: ignore[attr-defined]

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
        assert result.class_ids == CLASS_IDS
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
        return Prediction(logits=logits, logits_low=logits, inner_logits=())

    empty = torch.empty(0, 0, 0, 0, 0)
    features = Features(empty, empty, empty)
    mask = network_predictor(undecided)(features, features, episode_batch([(0, (1,))]))
    assert mask.tolist() == [[[False, True], [False, True]]]
