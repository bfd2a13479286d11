"""The network as a configuration describes it: before training, and at its precision."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.config import CrossValidationConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mshnet.backbone import Backbone, Features, InferenceBackbone
    from mshnet.data.store.images import ImageStore
    from mshnet.model import FewShotModel, Prediction


CALIBRATION_IMAGES = 64


def build_network(config: CrossValidationConfig, images: ImageStore | None = None) -> FewShotModel:
    """The network before training: weights drawn from the seed, backbone loaded.

    A backbone with random weights is calibrated on some of the training images, where they are given.
    """
    import torch

    from mshnet import architectures
    from mshnet.checkpoint import load_backbone_weights
    from mshnet.data.transforms import normalise

    torch.manual_seed(config.training.seed)
    model = architectures.build(config.model)
    # A given network brings its own, and only the learnable part of this one is judged beside it.
    source = "random" if config.trained else config.backbone_weights
    load_backbone_weights(model.backbone, source, config.training.seed)
    if config.backbone_weights == "random" and images is not None:
        rows = [row for row, (_, subset, _) in enumerate(images.contents()) if subset == "train"]
        chosen = rows[:: max(1, len(rows) // CALIBRATION_IMAGES)][:CALIBRATION_IMAGES]
        model.backbone.calibrate(normalise(torch.stack([images.image(row) for row in chosen])))
    return model


def inference_backbone(backbone: Backbone, precision: str) -> InferenceBackbone:
    """The frozen backbone made fast, at the configured precision, from its weights and statistics as they are now."""
    import torch

    from mshnet.backbone import InferenceBackbone

    return InferenceBackbone(backbone, torch.bfloat16 if precision == "bfloat16" else torch.float32)


@dataclass
class Relation:
    """The learnable part at the configured precision; outputs are float32."""

    module: torch.nn.Module
    precision: str
    compiled: bool = False
    """By `torch.compile`, with torch's own random numbers: dropout's masks are those of the network uncompiled, at
    any number of workers. The first calls take minutes."""
    cuda_graphs: bool = False
    """On a GPU, compiled: launches are off the CPU. Only where an update is one part and one worker's: what a replay
    returns lies in memory that the next one writes, gradients included, and collectives belong into none."""

    def __post_init__(self) -> None:
        on_gpu = any(parameter.is_cuda for parameter in self.module.parameters())
        self.cuda_graphs = self.compiled and self.cuda_graphs and on_gpu
        if self.compiled:
            # With CUDA graphs, "reduce-overhead" by its own option: a mode and options exclude each other.
            options = {"fallback_random": True, "triton.cudagraphs": self.cuda_graphs}
            self.module.compile(dynamic=False, options=options)

    def __call__(self, query: Features, support: Features, masks: Tensor) -> Prediction:
        import torch

        from mshnet.model import Prediction

        if self.cuda_graphs:
            # What the last call returned has been used: its memory may be written again.
            torch.compiler.cudagraph_mark_step_begin()
        with _autocast(self.precision, masks.device):
            prediction: Prediction = self.module(query, support, masks)
        return Prediction(
            logits_low=prediction.logits_low.float(),
            inner_logits=tuple(logits.float() for logits in prediction.inner_logits),
            size=prediction.size,
            auxiliary=tuple(loss.float() for loss in prediction.auxiliary),
        )


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
