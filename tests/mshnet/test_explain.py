"""Energy maps against the plain mean of the similarity maps, and what they are of."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mshnet.config import ModelConfig
from mshnet.explain import BLOCKS, energy_maps
from mshnet.model import MSHNet, Similarities
from tests.tolerances import COSINE_FLOAT32

LAYERS = {3: 2, 4: 2, 5: 2}
"""Of a ResNet-18."""


@pytest.fixture(scope="module")
def episode() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two queries, three supports each, 64 px; the object is a square."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(2, 3, 64, 64)
    masks[:, :, 16:48, 16:48] = 1
    return torch.randn(2, 3, 64, 64, generator=generator), torch.randn(2, 3, 3, 64, 64, generator=generator), masks


@torch.no_grad()
def similarities(kind: Literal["both", "cosine", "prototype"], episode: tuple[torch.Tensor, ...]) -> Similarities:
    torch.manual_seed(0)
    model = MSHNet(ModelConfig(backbone="resnet18", similarity=kind)).eval()
    return model.similarities(*episode)


@pytest.mark.parametrize(
    ("kind", "names"),
    [("both", ["cosine", "prototype"]), ("cosine", ["cosine"]), ("prototype", ["prototype"])],
)
def test_a_map_is_the_plain_mean_over_shots_and_layers(
    kind: Literal["both", "cosine", "prototype"], names: list[str], episode: tuple[torch.Tensor, ...]
) -> None:
    found = similarities(kind, episode)
    maps = energy_maps(found)
    assert list(maps) == [(level, name) for level in (5, 4, 3) for name in names], "deepest block first"
    for (level, name), energy in maps.items():
        of_level = (found.cosine if name == "cosine" else found.prototype or {})[level]
        assert of_level.shape[1:3] == (3, LAYERS[level])
        assert energy.shape == (2, {3: 8, 4: 4, 5: 2}[level], {3: 8, 4: 4, 5: 2}[level])
        assert 0 <= float(energy.min()) <= float(energy.max()) <= 1
        for b in range(2):
            layers = [of_level[b, k, layer] for k in range(3) for layer in range(LAYERS[level])]
            torch.testing.assert_close(energy[b], sum(layers) / len(layers), rtol=0, atol=COSINE_FLOAT32.bound)


def test_one_size_for_all_keeps_the_corners(episode: tuple[torch.Tensor, ...]) -> None:
    found = similarities("both", episode)
    small, large = energy_maps(found), energy_maps(found, (64, 48))
    for key, energy in large.items():
        assert energy.shape == (2, 64, 48)
        expected = F.interpolate(small[key][:, None], (64, 48), mode="bilinear", align_corners=True)[:, 0]
        torch.testing.assert_close(energy, expected, rtol=0, atol=COSINE_FLOAT32.bound)
        corners = np.ix_([0, 1], [0, -1], [0, -1])
        torch.testing.assert_close(
            energy.numpy()[corners], small[key].numpy()[corners], rtol=0, atol=COSINE_FLOAT32.bound
        )


def test_the_cosine_s_energy_is_higher_where_the_query_shows_the_support_s_object() -> None:
    generator = torch.Generator().manual_seed(1)
    texture = torch.rand(3, 64, 64, generator=generator)
    query, support = torch.full((3, 128, 128), 0.5), torch.full((3, 128, 128), 0.5)
    query[:, :64, :64] = texture
    support[:, 64:, 64:] = texture
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 64:, 64:] = 1
    torch.manual_seed(0)
    model = MSHNet(ModelConfig(backbone="resnet18", similarity="cosine")).eval()
    with torch.no_grad():
        maps = energy_maps(model.similarities(query[None], support[None, None], mask), (128, 128))
    energy = maps[3, "cosine"][0]
    assert float(energy[8:56, 8:56].mean()) > float(energy[72:, 72:].mean())


def test_blocks_have_the_names_of_the_paper_s_figure() -> None:
    assert BLOCKS == {5: "Block4", 4: "Block3", 3: "Block2"}
