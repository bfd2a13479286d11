"""A second model goes through the pipeline by its name alone, and a third one needs no line of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mshnet import architectures, checkpoint
from mshnet.architectures import FewShotModel
from mshnet.backbone import Features
from mshnet.config import ModelConfig
from mshnet.engine import Part, make_optimizer, train_step
from mshnet.features import FeatureCache
from mshnet.masking import resize
from mshnet.model import Prediction
from mshnet.panet import PANet
from mshnet.parallel import Share
from pipelines import checkpoints, train
from pipelines.config import CrossValidationConfig, fingerprint
from pipelines.dag import Stage
from pipelines.network import Relation, build_network, inference_backbone
from tests.mshnet.noise_episodes import episode_batch
from tests.pipelines.drawn_fold import UPDATES, draw_fold, small_config, train_here

DRAWN = Stage(name="draw", result="store/draw-0123456789ab.json", run=dict)


def panet(root: Path) -> CrossValidationConfig:
    return replace(small_config(root), model=ModelConfig(architecture="panet", backbone="resnet18"))


def test_fingerprints_of_mshnet_are_what_they_were_before_there_were_two(tmp_path: Path) -> None:
    of_mshnet = small_config(tmp_path)
    training = of_mshnet.to_json()["training"]
    fields = {"backbone": "resnet18", "similarity": "both", "dropout": 0.2}
    expected = fingerprint("train", train.CODE_VERSION, DRAWN.key, "random", fields, training, "float32")
    assert train.key(of_mshnet, {"backbone_weights": "random"}, DRAWN) == expected
    assert train.key(panet(tmp_path), {"backbone_weights": "random"}, DRAWN) != expected
    recorded = of_mshnet.to_json()
    del recorded["model"]["architecture"]
    assert CrossValidationConfig.from_json(recorded) == of_mshnet


def test_registered_names_do_not_mix_architectures(tmp_path: Path) -> None:
    assert small_config(tmp_path).model_name == "mshnet-shapes-resnet18-1shot"
    assert panet(tmp_path).model_name == "panet-shapes-resnet18-1shot"


def test_panet_is_trained_resumed_and_kept_by_the_same_worker(tmp_path: Path) -> None:
    job = panet(tmp_path)
    drawn = draw_fold(job)
    folder = tmp_path / "store" / "fold"
    first = train_here(job, drawn, folder)
    assert first.step == UPDATES
    for record in first.history:
        assert record.inner_loss == 0
        assert record.loss > record.outer_loss  # the alignment is in it
        assert record.validation_miou is not None
    stored = checkpoints.Checkpoints(str(folder / checkpoints.CHECKPOINTS), checkpoints.fold_key(job, drawn))
    newest = stored.newest()
    assert newest is not None
    (folder / checkpoints.CHECKPOINTS / newest[0]).unlink()  # as if killed in the last update
    again = train_here(job, drawn, folder)
    assert again.step == UPDATES
    resumed = stored.newest()
    assert resumed is not None
    assert all(torch.equal(value, newest[1].tensors[name]) for name, value in resumed[1].tensors.items())

    kept = train._keep(job, {"backbone_weights": "random"}, str(folder), "", drawn, again)
    model = checkpoint.load_model(str(Path(job.store) / kept.model), job.model)
    assert type(model) is PANet


class Averages(nn.Module):
    """A toy: a linear map of the level's mean colours, and a loss of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(2 * channels, 2, 1)

    def forward(self, query: Features, support: Features, masks: Tensor) -> Prediction:
        of_query = query.level3.mean(1)
        of_supports = support.level3.mean(1).unflatten(0, masks.shape[:2]).mean((1, -2, -1))
        both = torch.cat([of_query, of_supports[..., None, None].expand_as(of_query)], dim=1)
        logits = self.linear(both)
        low = resize(logits, (2 * logits.shape[-2], 2 * logits.shape[-1]))
        auxiliary = (0.01 * logits.square().mean(),) if self.training else ()
        return Prediction(low, (), (masks.shape[-2], masks.shape[-1]), auxiliary)


class Toy(FewShotModel):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.relation = Averages(self.backbone.channels[3])


def test_a_third_model_needs_no_line_of_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By a name that is taken: the tests' type checks know no other, and nothing that follows asks for it.
    monkeypatch.setitem(architectures.BUILDERS, "panet", Toy)
    job = panet(tmp_path)
    model = build_network(job)
    assert type(model) is Toy
    before = {key: value.clone() for key, value in model.state_dict().items()}
    features = FeatureCache(inference_backbone(model.backbone, job.precision), 2**28)
    optimizer = make_optimizer(model.relation.parameters(), job.training)
    batch = episode_batch([(0, (1,)), (2, (3,))])
    model.train()
    for step in range(2):
        update = train_step(
            Relation(model.relation, job.precision), features, [Part(batch, Share(0, 2, 2))], optimizer, 0.3, seed=step
        )
        total, outer, inner = update.losses.tolist()
        assert update.finite
        assert inner == 0 < outer < total
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"relation.linear.weight", "relation.linear.bias"}

    checkpoint.save_model(model, str(tmp_path / "model"), {})
    loaded = checkpoint.load_model(str(tmp_path / "model"), job.model)
    assert type(loaded) is Toy
    assert torch.equal(loaded.relation.get_parameter("linear.weight"), model.relation.get_parameter("linear.weight"))
