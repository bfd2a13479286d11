"""The seven golden cases evaluated in float32: the published code's numbers, ours, and the slow ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from mshnet import ModelConfig
from mshnet.data.transforms import normalise
from mshnet.loss import segmentation_loss
from tests import tolerances
from tests.conftest import SHARED, needs_shared
from tests.mshnet import published
from tests.reference import golden, slow_mshnet
from tests.reference.golden import GoldenCase

pytestmark = needs_shared

REFERENCE = SHARED / "reference"
LEVELS = (3, 4, 5)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an implementation gave for one case."""

    case: GoldenCase
    cosine: dict[int, Tensor] | None
    prototype: dict[int, Tensor] | None
    merged: dict[int, Tensor]
    logits_low: Tensor
    logits: Tensor
    eval_loss: float


@lru_cache(maxsize=1)
def case_and_state(name: str) -> tuple[GoldenCase, dict[str, Tensor]]:
    """Kept for the other implementation's turn: making the weights takes longer than the network."""
    case = golden.load_case(name, REFERENCE)
    return case, case.state(REFERENCE)


@torch.no_grad()
def run_fast(case: GoldenCase, state: dict[str, Tensor]) -> Outcome:
    config = ModelConfig(backbone=case.backbone, similarity=case.similarity)
    model = published.build(config, state).eval()
    query, supports = normalise(case.tensor("query_image")), normalise(case.tensor("support_images"))
    masks = case.tensor("support_masks").float()
    merged: dict[int, Tensor] = {}
    for level in LEVELS:
        model.relation.merging[str(level)].register_forward_hook(
            lambda _, __, output, level=level: merged.__setitem__(level, output)
        )
    maps = model.similarities(query, supports, masks)
    prediction = model(query, supports, masks)
    return Outcome(
        case=case,
        cosine=maps.cosine,
        prototype=maps.prototype,
        merged=merged,
        logits_low=prediction.logits_low,
        logits=prediction.logits,
        eval_loss=segmentation_loss(prediction, case.query_mask, inner_weight=0.3).outer.item(),
    )


@torch.no_grad()
def run_slow(case: GoldenCase, state: dict[str, Tensor]) -> Outcome:
    """The reference that other tests trust must itself be right."""
    found = slow_mshnet.forward(state, *case.inputs(torch.float32), case.backbone)
    return Outcome(
        case=case,
        cosine=found.cosine,
        prototype=found.prototype,
        merged=found.merged,
        logits_low=found.logits_low,
        logits=found.logits,
        eval_loss=slow_mshnet.outer_loss(found, case.query_mask).item(),
    )


RUNS = {"fast": run_fast, "slow": run_slow}


@pytest.fixture(
    scope="module",
    params=[(run, name) for name in golden.CASES for run in RUNS],
    ids=lambda param: "-".join(param),
)
def outcome(request: pytest.FixtureRequest) -> Outcome:
    """One implementation on one case, computed once for all tests of this module."""
    run, name = request.param
    return RUNS[run](*case_and_state(name))


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a part of the expected tensor's largest magnitude."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", ["cosine", "prototype"])
def test_similarity_maps(outcome: Outcome, kind: str) -> None:
    maps: dict[int, Tensor] | None = getattr(outcome, kind)
    if maps is None:
        assert outcome.case.similarity not in ("both", kind)
        assert not any(key.startswith(kind) for key in outcome.case.arrays)
        return
    for level in LEVELS:
        expected = outcome.case.tensor(f"{kind}_block{level}")
        assert maps[level].shape == expected.shape
        assert float((maps[level] - expected).abs().max()) <= tolerances.GOLDEN_SIMILARITY.bound, level


@pytest.mark.parametrize("level", LEVELS)
def test_merging_block(outcome: Outcome, level: int) -> None:
    expected = outcome.case.tensor(f"smb_block{level}_channels0to7")
    assert distance(outcome.merged[level][:, :8], expected) <= tolerances.GOLDEN_ACTIVATION.bound


def test_logits(outcome: Outcome) -> None:
    bound = tolerances.GOLDEN_ACTIVATION.bound
    assert distance(outcome.logits_low, outcome.case.tensor("logits_low")) <= bound
    assert distance(outcome.logits[:, :, ::8, ::8], outcome.case.tensor("logits_full_stride8")) <= bound


def test_eval_loss(outcome: Outcome) -> None:
    expected = outcome.case.number("eval_loss")
    assert outcome.eval_loss == pytest.approx(expected, rel=tolerances.GOLDEN_EVAL_LOSS.bound, abs=0)


def test_normalisation_is_the_golden_one() -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=random)
    torch.testing.assert_close(normalise(images), golden.normalise(images), rtol=0, atol=0)
