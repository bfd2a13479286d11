"""The literal loops that the benchmark measures against compute the same network: outputs, loss and gradients."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mshnet import ModelConfig, MSHNet
from mshnet.loss import segmentation_loss
from tests import tolerances

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "literal_mshnet.py"


def literal_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("literal_mshnet", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shots", [1, 3])
def test_the_literal_loops_compute_the_same(shots: int) -> None:
    torch.manual_seed(0)
    model = MSHNet(ModelConfig(backbone="resnet18", dropout=0.0)).double()
    literals = literal_module()
    literal = literals.LiteralMSHNet(model.backbone, dropout=0.0).double()
    literal.relation.load_state_dict(model.relation.state_dict())
    queries = torch.randn(2, 3, 65, 65, dtype=torch.float64)
    supports = torch.randn(2, shots, 3, 65, 65, dtype=torch.float64)
    masks = torch.zeros(2, shots, 65, 65, dtype=torch.float64)
    masks[:, :, 5:30, 10:45] = 1
    masks[1, -1] = 0  # an object that is not there
    truth = torch.zeros(2, 65, 65, dtype=torch.uint8)
    truth[:, 20:50, 10:40] = 1

    model.train()
    literal.train()
    prediction = model(queries, supports, masks)
    losses = segmentation_loss(prediction, truth, inner_weight=0.3)
    losses.total.backward()
    full, low, inner = literal(queries, supports, masks)
    loss = literals.literal_loss(low, inner, truth, 0.3)
    loss.backward()

    forward, backward = tolerances.PARITY_FORWARD.bound, tolerances.PARITY_GRADIENT.bound
    pairs = [(full, prediction.logits), (low, prediction.logits_low), (loss, losses.total)]
    for found, expected in [*pairs, *zip(inner, prediction.inner_logits, strict=True)]:
        assert (found - expected).abs().max() <= forward * expected.abs().max()
    gradients = {name: parameter.grad for name, parameter in model.relation.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in literal.relation.named_parameters():
        assert parameter.grad is not None
        expected = gradients[name]
        # Of biases before a batch norm nothing but rounding is left, on the scale of what cancels.
        allowed = backward * expected.abs().max() + tolerances.ZERO_GRADIENT.bound * max(1.0, largest)
        assert (parameter.grad - expected).abs().max() <= allowed, name
