"""`torch.compile` takes the learnable part whole: no graph break, the same numbers.

In a process of its own: the tests' shape checks, which wrap every function, are themselves graph breaks.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from mshnet import ModelConfig
from mshnet.architectures import build
from mshnet.config import Architecture
from mshnet.kernels.cosine import mean_cosine
from tests import tolerances
from tests.mshnet.plain_cosine import comparison

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_relation_is_one_graph() -> None:
    line = [sys.executable, "-c", "from tests.mshnet.test_compile import check; check()"]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "8 graphs" in done.stdout


def test_the_operator_is_well_formed() -> None:
    case = comparison(2, 3, 3, 48, 70, 40, (7, 0, 40, 1)).to(torch.float32)
    torch.library.opcheck(torch.ops.mshnet.mean_cosine, case.arguments())
    assert mean_cosine(*case.arguments()).shape == (2, 3, 3, 70)


def check() -> None:
    """Of both architectures; in a process of its own."""
    print(f"{check_of('mshnet') + check_of('panet')} graphs")


def check_of(architecture: Architecture) -> int:
    """Training and evaluation, one and two shots, in float32: forward and gradients."""
    torch.manual_seed(0)
    model = build(ModelConfig(architecture=architecture, backbone="resnet18"))
    masks = torch.zeros(2, 2, 65, 65)
    masks[..., 5:30, 5:40] = 1
    query = model.backbone(torch.randn(2, 3, 65, 65))
    graphs = 0
    for shots in (1, 2):
        support = model.backbone(torch.randn(2 * shots, 3, 65, 65))
        for training in (True, False):
            model.relation.train(training)
            torch.compiler.reset()
            compiled = torch.compile(model.relation, backend="aot_eager", fullgraph=True, dynamic=False)
            found, expected = [], []
            for relation, into in ((compiled, found), (model.relation, expected)):
                torch.manual_seed(1)  # of the dropout
                model.relation.zero_grad()
                prediction = relation(query, support, masks[:, :shots])
                into.append(prediction.logits)
                if training:
                    # Of all outputs: compiled, a parameter that has no part in the loss has zeros, else nothing.
                    inner = sum(logits.square().mean() for logits in prediction.inner_logits)
                    sum(prediction.auxiliary, prediction.logits_low.square().mean() + inner).backward()
                    into += [x.grad.clone() for x in model.relation.parameters()]
            for x, y in zip(found, expected, strict=True):
                error = float((x - y).detach().abs().max())
                assert error <= tolerances.COMPILED.bound * max(1.0, float(y.detach().abs().max())), error
            graphs += 1
    return graphs
