"""What the network costs: counted operations against formulas by hand, counted memory against what is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from mshnet.config import ModelConfig
from mshnet.cost import _flops, batch_norm_calls, episode_flops, update_memory

LEVELS_50 = {60: (4, 512), 30: (6, 1024), 15: (3, 2048)}  # side: layers, channels (473 px)
POSITIONS = 60**2 + 30**2 + 15**2
GIB = 2**30


def test_a_convolution_counts_as_its_formula() -> None:
    with torch.device("meta"):
        conv, x = nn.Conv2d(16, 24, 3, padding=2, dilation=2), torch.empty(2, 16, 10, 12, requires_grad=True)
        multiplications = 2 * 10 * 12 * 24 * 16 * 9
        assert _flops(lambda: conv(x)) == 2 * multiplications
        # Backward: the gradients of the weights and of the input cost as much each.
        assert _flops(lambda: conv(x).sum().backward()) == 3 * 2 * multiplications


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_the_backbone_costs_what_torchvision_publishes(name: str) -> None:
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    multiplications = weights.meta["_ops"] * 1e9 - 2048 * 1000  # less the classifier's
    counted = episode_flops(ModelConfig(backbone=name), shot=1, image_size_px=224).backbone  # type: ignore[arg-type]
    assert counted == pytest.approx(2 * 2 * multiplications, rel=1e-3)  # two images


def merging_by_hand(shot: int) -> int:
    """The published block's layers; a position's multiplications, then the attention's."""
    per_shot = sum(
        side**2 * (layers * 256 + 9 * 256 * 256 + layers * 128 + 9 * 128 * 128)
        for side, (layers, _) in LEVELS_50.items()
    )
    shot_conv = 9 * 256 * 256 + 128 * 128 + 2 * 9 * 128 * 128 + 9 * 384 * 128
    merge = 256 * 256 + 128 * 256 + 2 * 9 * 256 * 256
    attention = len(LEVELS_50) * 2 * 2 * 256 * 64
    return 2 * (shot * per_shot + POSITIONS * (shot_conv + merge) + attention)


@pytest.mark.parametrize("shot", [1, 5])
def test_similarities_and_merging_cost_what_the_formulas_say(shot: int) -> None:
    found = episode_flops(ModelConfig(), shot, object_share=0.25)
    assert found.cosine == sum(2 * shot * n * c * side**2 * round(side**2 / 4) for side, (n, c) in LEVELS_50.items())
    assert found.merging == merging_by_hand(shot)
    assert found.evaluation == found.backbone + found.cosine + found.prototype + found.merging + found.pyramid
    assert found.training == found.evaluation + found.backward
    # The gradients of the weights and of the input cost as much as the forward pass each; a few inputs have none.
    assert found.backward == pytest.approx(2 * (found.merging + found.pyramid), rel=0.05)


def test_what_is_absent_costs_nothing() -> None:
    both = episode_flops(ModelConfig(backbone="resnet18"), 1, 65)
    cosine = episode_flops(ModelConfig(backbone="resnet18", similarity="cosine"), 1, 65)
    assert (cosine.prototype, cosine.cosine, cosine.backbone) == (0, both.cosine, both.backbone)
    assert cosine.merging < both.merging
    assert episode_flops(ModelConfig(backbone="resnet18", similarity="prototype"), 1, 65).cosine == 0


def test_every_shot_asks_for_its_own_batch_statistics() -> None:
    # A level: 2 norms in each Block-Conv per shot, 1 and 4 in the Shot-Convs, 2 behind; 8 in the pyramid.
    assert [batch_norm_calls(ModelConfig(backbone="resnet18"), shot) for shot in (1, 5)] == [
        3 * (4 * shot + 7) + 8 for shot in (1, 5)
    ]


def test_memory_holds_what_is_known_of_it() -> None:
    config = ModelConfig(backbone="resnet18")
    memory = update_memory(config, shot=1, batch=4, image_size_px=129, precision="float32")
    # 17, 9, 5 positions a side; two blocks of 128, 256, 512 channels each.
    assert memory.features == 8 * 4 * 2 * (128 * 17**2 + 256 * 9**2 + 512 * 5**2)
    assert memory.gradients == memory.optimizer
    assert memory.peak > memory.weights + memory.gradients + memory.optimizer + memory.features
    more = update_memory(config, shot=1, batch=8, image_size_px=129, precision="float32")
    assert replace(more, peak=0, features=0) == replace(memory, peak=0, features=0)
    assert more.peak - memory.peak > more.features - memory.features


def test_the_paper_s_input_in_batches_of_16_fits_into_16_gib() -> None:
    memory = update_memory(ModelConfig(), shot=1, batch=16)
    assert memory.gradients == 4 * 29_626_952
    assert memory.features == 32 * 2 * sum(n * c * side**2 for side, (n, c) in LEVELS_50.items())
    assert 2 * GIB < memory.peak < 8 * GIB  # leaves as much for what is not counted
