"""Prototype alignment: against loops over positions, and what must hold whatever the weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mshnet.backbone import Features
from mshnet.config import TrainingConfig
from mshnet.data.batches import EpisodeBatch
from mshnet.engine import Part, Update, make_optimizer, train_step
from mshnet.features import FeatureCache
from mshnet.model import Prediction
from mshnet.panet import ALIGNMENT_WEIGHT, SCALE, PrototypeAlignment, alignment_loss, cosine_logits, prototypes
from mshnet.parallel import Share
from tests import tolerances
from tests.mshnet.noise_episodes import episode_batch

CHANNELS = {3: 5, 4: 7}
SHOTS = 3


class Pooled(FeatureCache):
    """Features without a backbone: two layers of level 3 and of level 4, in float64."""

    def __init__(self) -> None:
        pass

    def of(self, batch: EpisodeBatch) -> tuple[Features, Features]:
        return self._of(batch.query_images), self._of(batch.support_images.flatten(0, 1))

    def _of(self, images: Tensor) -> Features:
        colours = images.double() / 255 - 0.4
        wide = torch.cat([colours, -colours, colours.roll(1, -1)], dim=1)
        level3 = F.adaptive_avg_pool2d(wide[:, :5], 12)
        level4 = F.adaptive_avg_pool2d(wide[:, :7], 6)
        return Features(*(torch.stack([maps + 9, maps], dim=1) for maps in (level3, level4, level4)))


@pytest.fixture
def relation() -> PrototypeAlignment:
    torch.manual_seed(0)
    return PrototypeAlignment(CHANNELS).double().train()


def batch_of(episodes: int, shots: int = 1) -> EpisodeBatch:
    return episode_batch([(row, tuple(range(row + 1, row + 1 + shots))) for row in range(episodes)])


def predicted(relation: PrototypeAlignment, batch: EpisodeBatch) -> Prediction:
    found: Prediction = relation(*Pooled().of(batch), batch.support_masks.double())
    return found


# By loops ---------------------------------------------------------------------------------------------


def slow_prototype(embedded: Tensor, weights: Tensor) -> Tensor:
    """One class's, from maps (k, d, h, w) and weights (k, h, w)."""
    means = []
    for image, weight in zip(embedded, weights, strict=True):
        total, mass = torch.zeros(image.shape[0], dtype=image.dtype), 0.0
        for y in range(image.shape[1]):
            for x in range(image.shape[2]):
                total = total + float(weight[y, x]) * image[:, y, x]
                mass += float(weight[y, x])
        means.append(total / mass if mass else total)
    return torch.stack(means).mean(0)


def slow_cosine(a: Tensor, b: Tensor) -> float:
    lengths = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / lengths if lengths else 0.0


def slow_resized(grid: list[list[float]], height: int, width: int) -> list[list[float]]:
    """Bilinear, the corners on the corners."""
    rows, columns = len(grid), len(grid[0])

    def at(y: int, x: int) -> float:
        v, u = y * (rows - 1) / (height - 1), x * (columns - 1) / (width - 1)
        i, j = min(int(v), rows - 2), min(int(u), columns - 2)
        top = (1 - (u - j)) * grid[i][j] + (u - j) * grid[i][j + 1]
        bottom = (1 - (u - j)) * grid[i + 1][j] + (u - j) * grid[i + 1][j + 1]
        return (1 - (v - i)) * top + (v - i) * bottom

    return [[at(y, x) for x in range(width)] for y in range(height)]


def slow_alignment(queries: Tensor, logits: Tensor, supports: Tensor, truth: Tensor) -> float:
    of_episodes = []
    for query, scores, shots, masks in zip(queries, logits, supports, truth, strict=True):
        is_object = scores.argmax(0) == 1
        if not is_object.any():
            of_episodes.append(0.0)
            continue
        taught = [slow_prototype(query[None], mask[None].double()) for mask in (~is_object, is_object)]
        of_shots = []
        for image, mask in zip(shots, masks, strict=True):
            height, width = mask.shape
            grids = [
                slow_resized(
                    [
                        [SCALE * slow_cosine(image[:, y, x], prototype) for x in range(image.shape[2])]
                        for y in range(image.shape[1])
                    ],
                    height,
                    width,
                )
                for prototype in taught
            ]
            losses = []
            for y in range(height):
                for x in range(width):
                    both = [grid[y][x] for grid in grids]
                    losses.append(math.log(sum(math.exp(v) for v in both)) - both[int(mask[y, x])])
            of_shots.append(sum(losses) / len(losses))
        of_episodes.append(sum(of_shots) / len(of_shots))
    return sum(of_episodes) / len(of_episodes)


def random_maps() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    queries = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=random)
    supports = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64, generator=random)
    truth = torch.randint(0, 2, (3, 2, 10, 12), generator=random)
    return queries, supports, truth


def test_prototypes_and_logits_are_those_of_the_loops() -> None:
    queries, supports, _ = random_maps()
    shown = torch.rand(3, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shown[1, 0] = 0  # one support of two shows no object
    shown[2] = 0  # none does
    found = prototypes(supports, torch.stack([1 - shown, shown], dim=2))
    logits = cosine_logits(queries, found)
    for b in range(3):
        for label, weights in enumerate((1 - shown[b], shown[b])):
            expected = slow_prototype(supports[b], weights)
            torch.testing.assert_close(found[b, label], expected, rtol=0, atol=tolerances.SAME_COMPUTATION.bound)
            for y, x in ((0, 0), (4, 5), (2, 3)):
                of_position = SCALE * slow_cosine(queries[b, :, y, x], expected)
                assert float(logits[b, label, y, x]) == pytest.approx(of_position, abs=1e-9)
    assert not logits[2, 1].any()


def test_the_alignment_loss_is_that_of_the_loops() -> None:
    queries, supports, truth = random_maps()
    logits = torch.randn(3, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    logits[1, 0] = 9  # this query is all background: nothing to learn from
    found = float(alignment_loss(queries, logits, supports, truth))
    assert found == pytest.approx(slow_alignment(queries, logits, supports, truth), rel=1e-10)
    alone = float(alignment_loss(queries[1:2], logits[1:2], supports[1:2], truth[1:2]))
    assert alone == 0
    flipped = float(alignment_loss(queries, logits.flip(1), supports, truth))
    assert abs(flipped - found) > 0.1  # it does look at the prediction


# Whatever the weights -----------------------------------------------------------------------------------


@torch.no_grad()
def test_copies_of_a_support_are_that_support_and_order_is_irrelevant(relation: PrototypeAlignment) -> None:
    batch = batch_of(2, SHOTS)
    query, support = Pooled().of(batch)
    masks = batch.support_masks.double()
    masks[1, 2] = 0  # one shot without an object
    by_shot = Features(*(maps.unflatten(0, (2, SHOTS)) for maps in support))

    def found(shots: list[int]) -> Prediction:
        chosen = Features(*(maps[:, shots].flatten(0, 1) for maps in by_shot))
        prediction: Prediction = relation(query, chosen, masks[:, shots])
        return prediction

    alone, copies = found([0]), found([0, 0, 0])
    one_order, other_order = found([0, 1, 2]), found([2, 0, 1])
    for a, b in ((copies, alone), (other_order, one_order)):
        torch.testing.assert_close(a.logits_low, b.logits_low, rtol=0, atol=1e-9)
        torch.testing.assert_close(a.auxiliary, b.auxiliary, rtol=0, atol=1e-9)
    assert float((alone.logits_low - one_order.logits_low).abs().max()) > 1e-2  # more shots do change the answer


@torch.no_grad()
def test_an_episode_does_not_know_its_neighbours(relation: PrototypeAlignment) -> None:
    together = predicted(relation, batch_of(3))
    one_by_one = [predicted(relation, episode_batch([(row, (row + 1,))])) for row in range(3)]
    torch.testing.assert_close(together.logits, torch.cat([each.logits for each in one_by_one]), rtol=0, atol=1e-9)
    mean = sum(float(each.auxiliary[0]) for each in one_by_one) / 3
    assert float(together.auxiliary[0]) == pytest.approx(mean, rel=1e-10)


def test_no_object_anywhere_gives_finite_losses_and_gradients(relation: PrototypeAlignment) -> None:
    batch = batch_of(2)
    prediction = relation(*Pooled().of(batch), torch.zeros_like(batch.support_masks).double())
    (prediction.logits_low.square().mean() + prediction.auxiliary[0]).backward()
    assert not prediction.logits[:, 1].any()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in relation.parameters())


def test_the_alignment_loss_is_of_training_alone(relation: PrototypeAlignment) -> None:
    batch = batch_of(2)
    training, judged = predicted(relation, batch), predicted(relation.eval(), batch)
    assert len(training.auxiliary) == 1
    assert judged.auxiliary == ()
    assert training.inner_logits == judged.inner_logits == ()
    assert torch.equal(training.logits_low, judged.logits_low)
    assert judged.logits.shape == (2, 2, 65, 65)
    assert float(judged.logits.detach().abs().max()) <= SCALE


# Trained -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InFloat64:
    """The masks too."""

    module: PrototypeAlignment

    def __call__(self, query: Features, support: Features, masks: Tensor) -> Prediction:
        prediction: Prediction = self.module(query, support, masks.double())
        return prediction


def updates(relation: PrototypeAlignment, parts: list[Part], count: int) -> list[Update]:
    optimizer = make_optimizer(relation.parameters(), TrainingConfig(learning_rate=0.1))
    return [train_step(InFloat64(relation), Pooled(), parts, optimizer, 0.3, seed=step) for step in range(count)]


def test_training_lowers_the_loss_and_counts_the_alignment(relation: PrototypeAlignment) -> None:
    batch = batch_of(4)
    before = predicted(relation, batch)
    done = updates(relation, [Part(batch, Share(0, 4, 4))], 12)
    total, outer, inner = done[0].losses.tolist()
    assert inner == 0
    assert total == pytest.approx(outer + ALIGNMENT_WEIGHT * before.auxiliary[0].item(), rel=1e-10)
    assert total > outer + 0.01
    assert all(update.finite for update in done)
    assert done[-1].losses[0] < 0.8 * done[0].losses[0]


def test_parts_of_a_batch_make_the_update_of_the_whole(relation: PrototypeAlignment) -> None:
    """The same sums that several workers make: each one's losses and gradients by its number of episodes."""
    whole, halves = copy.deepcopy(relation), copy.deepcopy(relation)
    episodes = [(row, (row + 1,)) for row in range(8)]
    in_one = updates(whole, [Part(episode_batch(episodes), Share(0, 8, 8))], 2)
    cut = [Part(episode_batch(part), Share(0, len(part), len(part))) for part in (episodes[:3], episodes[3:])]
    in_two = updates(halves, cut, 2)
    for a, b in zip(in_one, in_two, strict=True):
        torch.testing.assert_close(a.losses, b.losses, rtol=1e-10, atol=0)
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerances.SAME_COMPUTATION.bound)
