"""Which network a checkpoint in the published layout is of, told from its tensors' names and shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mshnet import architectures
from mshnet.backbone import Backbone
from mshnet.checkpoint import load_published_state_dict, published_state_dict
from mshnet.config import BACKBONES, SIMILARITIES, BackboneName, ModelConfig, Similarity
from mshnet.errors import InputError
from mshnet.model import MSHNet

PUBLISHED_BACKBONES: tuple[BackboneName, ...] = ("resnet50", "resnet101")
"""Of the published code; where two fit, its own is meant."""
Shapes = Mapping[str, tuple[int, ...]]
BACKBONE, MERGE, FOLDED = "backbone.", "merge.", "module."
"""Beginnings of the names; the last is left by DataParallel."""


def parts(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The learnable part (`merge.*` and whatever else there is) and the backbone's, under torchvision's names."""
    plain = {name.removeprefix(FOLDED): value for name, value in state.items()}
    backbone = {name.removeprefix(BACKBONE): value for name, value in plain.items() if name.startswith(BACKBONE)}
    return {name: value for name, value in plain.items() if not name.startswith(BACKBONE)}, backbone


def recognised(
    state: Mapping[str, Tensor], backbone: BackboneName | None = None, similarity: Similarity | None = None
) -> ModelConfig:
    """The configuration of the network that a checkpoint in the published layout is of.

    `backbone` and `similarity`, where they are given, are taken at their word and checked against the shapes. Where
    the shapes fit two backbones (cosine similarities look the same with resnet34 and resnet50, unless the backbone's
    own weights are in the file), it is the published code's.

    Raises InputError for a checkpoint of another layout, or of another network than was asked for.
    """
    learnable, own_backbone = parts(state)
    if not any(name.startswith(MERGE) for name in learnable):
        raise InputError(
            f"expected a checkpoint in the published layout (names that begin with {MERGE}), found "
            f"{', '.join(sorted(learnable)[:3]) or 'no learnable tensors'}; give the file that the published training "
            "wrote, such as best_model.pt"
        )
    found = _shapes(learnable)
    asked = [
        ModelConfig(backbone=b, similarity=s)
        for b in ([backbone] if backbone else BACKBONES)
        for s in ([similarity] if similarity else SIMILARITIES)
    ]
    expected = {config: _expected(config) for config in asked}
    fitting = [config for config, shapes in expected.items() if shapes == found]
    if own_backbone and len(fitting) > 1:
        fitting = [config for config in fitting if _is_of(own_backbone, config.backbone)] or fitting
    if not fitting:
        raise InputError(_nothing_fits(found, expected, backbone or similarity))
    return min(fitting, key=lambda config: config.backbone not in PUBLISHED_BACKBONES)


def build(config: ModelConfig, state: Mapping[str, Tensor]) -> MSHNet:
    """The network in eval mode with a checkpoint's weights; its backbone's only where the file holds them.

    Raises InputError as `load_published_state_dict` does.
    """
    model = architectures.build(config)
    assert isinstance(model, MSHNet)
    load_published_state_dict(model, state)
    return model.eval()


def _expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = architectures.build(config)
    assert isinstance(model, MSHNet)
    return _shapes(published_state_dict(model))


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _is_of(weights: Mapping[str, Tensor], name: BackboneName) -> bool:
    with torch.device("meta"):
        own = _shapes(Backbone(name).state_dict())
    given = {k: shape for k, shape in _shapes(weights).items() if not k.startswith("fc.")}
    counters = {k for k in own if k.endswith("num_batches_tracked")}
    return {k: v for k, v in own.items() if k not in counters} == {k: v for k, v in given.items() if k not in counters}


def _nothing_fits(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[ModelConfig, Mapping[str, tuple[int, ...]]],
    narrowed: object,
) -> str:
    """What the nearest network would have, and has not."""
    nearest = min(expected, key=lambda c: (len(_differing(found, expected[c])), c.backbone not in PUBLISHED_BACKBONES))
    differing = _differing(found, expected[nearest])
    first = differing[0]
    advice = (
        "leave --backbone and --similarity out to have them recognised"
        if narrowed
        else "is it a checkpoint of the published code, and whole?"
    )
    return (
        f"expected a checkpoint of backbone {nearest.backbone} with similarity {nearest.similarity}, found one that "
        f"differs in {len(differing)} of {len(expected[nearest])} tensors (first: {first}, expected shape "
        f"{expected[nearest].get(first, 'none')}, found {found.get(first, 'none')}); {advice}"
    )


def _differing(found: Shapes, expected: Shapes) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
