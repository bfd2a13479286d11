"""An `MSHNet` seen by the published names: built from such a state, and its gradients named so."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mshnet import ModelConfig, MSHNet
from mshnet.checkpoint import load_published_state_dict, published_state_dict
from tests.reference import golden


def build(config: ModelConfig, state: Mapping[str, Tensor]) -> MSHNet:
    """A network in training mode that holds `merge.*` and `backbone.*` of `state`, in float32."""
    with torch.device("meta"):  # no random initialisation of 50 million numbers that are overwritten at once
        model = MSHNet(config)
    model.to_empty(device="cpu")
    load_published_state_dict(model, state)
    return model


def seeded(config: ModelConfig, salt: str) -> dict[str, Tensor]:
    """Weights by the golden rule for any configuration, also for those without golden vectors."""
    with torch.device("meta"):
        exported = published_state_dict(MSHNet(config))
    shapes = golden.backbone_shapes(config.backbone) | {k: tuple(v.shape) for k, v in exported.items()}
    return golden.seeded_state(shapes, salt)


def gradients(model: MSHNet) -> dict[str, Tensor]:
    """Published name -> gradient: the export of the model while its gradients stand in for its weights."""
    parameters = list(model.relation.parameters())
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.data = parameter.grad
    exported = published_state_dict(model)
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    return {name: x for name, x in exported.items() if name.endswith((".weight", ".bias"))}
