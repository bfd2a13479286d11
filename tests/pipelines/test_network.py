"""The network at its precision: what comes out, and what is compiled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
    relation = Relation(module, "float32", compiled=True, cuda_graphs=True)
    assert relation.module is module
    assert not relation.cuda_graphs  # on a CPU
    assert list(module.state_dict()) == names
    assert module._compiled_call_impl is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("parts", [1, 2])
def test_compiled_on_a_gpu_it_trains_the_same(parts: int) -> None:
    """In a process of its own, without the tests' shape checks, which are graph breaks."""
    line = [sys.executable, "-c", f"from tests.pipelines.test_network import check; check('cuda', {parts})"]
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(line, cwd=repository, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert f"6 updates of {parts} parts" in done.stdout


def check(device: str, parts: int) -> None:
    """Losses and gradients of some updates, dropout on, beside the network uncompiled; CUDA graphs with one part."""
    from mshnet.config import TrainingConfig
    from mshnet.engine import Part, make_optimizer, train_step
    from mshnet.features import FeatureCache
    from mshnet.parallel import Share, synchronise_batch_norm
    from tests.mshnet.noise_episodes import episode_batch

    updates = 6
    rows = [[(4 * i + j, (4 * i + j + 1,)) for j in range(4)] for i in range(parts)]
    batches = [Part(episode_batch(part).to(torch.device(device)), Share(0, 4, 4)) for part in rows]
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = MSHNet(ModelConfig(backbone="resnet18", dropout=0.2)).to(device).train()
        synchronise_batch_norm(model.relation)
        relation = Relation(model.relation, "float32", compiled, cuda_graphs=parts == 1)
        assert relation.cuda_graphs == (compiled and parts == 1 and device == "cuda")
        features = FeatureCache(inference_backbone(model.backbone, "float32"), 0)
        # So small a rate that rounding stays rounding; the gradients of the last update are compared.
        optimizer = make_optimizer(model.relation.parameters(), TrainingConfig(learning_rate=1e-6))
        losses = [train_step(relation, features, batches, optimizer, 0.3, step).losses for step in range(updates)]
        found.append((torch.stack(losses), [x.grad for x in model.relation.parameters()]))
    (plain, expected), (compiled_losses, gradients) = found
    assert plain[:, 0].std() > 1e-4  # dropout does something
    torch.testing.assert_close(compiled_losses, plain, rtol=1e-3, atol=0)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for gradient, truth in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=0, atol=1e-2 * largest)
    print(f"{updates} updates of {parts} parts")
