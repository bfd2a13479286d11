"""The network at its precision: what comes out, and what is compiled."""

from __future__ import annotations

import pytest
import torch

from mshnet import ModelConfig, MSHNet
from mshnet.backbone import Features
from pipelines.network import Relation, inference_backbone


@pytest.fixture(scope="module")
def model() -> MSHNet:
    torch.manual_seed(0)
    return MSHNet(ModelConfig(backbone="resnet18")).eval()


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
@torch.no_grad()
def test_outputs_are_float32_at_any_precision(model: MSHNet, precision: str, dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (2, 3, 65, 65), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(1, 1, 65, 65)
    masks[..., 10:40, 20:50] = 1
    features = inference_backbone(model.backbone, precision)(images)
    assert {maps.dtype for maps in features} == {dtype}
    query, support = (Features(*(maps[i : i + 1] for maps in features)) for i in range(2))
    found = Relation(model.relation, precision)(query, support, masks)
    whole = model.backbone(images)
    query, support = (Features(*(maps[i : i + 1] for maps in whole)) for i in range(2))
    expected = model.relation(query, support, masks)
    assert {x.dtype for x in (found.logits_low, found.logits, *found.inner_logits)} == {torch.float32}
    assert found.logits.shape == (1, 2, 65, 65)
    error = float((found.logits - expected.logits).abs().max() / expected.logits.abs().max())
    assert error <= (1e-4 if precision == "float32" else 0.1)
    assert (error > 1e-4) == (precision == "bfloat16")  # the precision does arrive


def test_compiling_leaves_the_modules_names() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    names = list(module.state_dict())
    relation = Relation(module, "float32", compiled=True)
    assert relation.module is module
    assert list(module.state_dict()) == names
    assert module._compiled_call_impl is not None
