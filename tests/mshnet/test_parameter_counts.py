"""Learnable parameters, to the last digit: the proof that widths and biases are those of the paper."""

from __future__ import annotations

import pytest
import torch

from mshnet import ModelConfig, MSHNet

COUNTS = {
    ("resnet50", "both"): 29_626_952,
    ("resnet101", "both"): 29_633_480,
    ("resnet50", "cosine"): 26_808_776,
    ("resnet101", "cosine"): 26_813_128,
    ("resnet50", "prototype"): 25_880_392,
    ("resnet101", "prototype"): 25_882_568,
}
"""(backbone, similarity) -> parameters without the backbone's."""

PAPER_MILLIONS = {"both": 29.6, "cosine": 26.8, "prototype": 25.9}


@pytest.mark.parametrize(("backbone", "similarity"), COUNTS)
def test_learnable_parameters(backbone: str, similarity: str) -> None:
    with torch.device("meta"):  # shapes only: nothing is allocated
        model = MSHNet(ModelConfig(backbone=backbone, similarity=similarity))
    learnable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learnable == COUNTS[backbone, similarity]
    assert learnable == sum(p.numel() for p in model.relation.parameters())
    assert round(learnable / 1e6, 1) == PAPER_MILLIONS[similarity]


def test_dropout_adds_none() -> None:
    with torch.device("meta"):
        counts = {
            sum(p.numel() for p in MSHNet(ModelConfig(dropout=dropout)).relation.parameters()) for dropout in (0.0, 0.2)
        }
    assert counts == {COUNTS["resnet50", "both"]}
