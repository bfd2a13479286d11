"""What can be set about the method. Checked on construction; importing this loads no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mshnet.errors import InputError

BackboneName = Literal["resnet18", "resnet34", "resnet50", "resnet101"]
Similarity = Literal["both", "cosine", "prototype"]
Architecture = Literal["mshnet", "panet"]
BACKBONES: tuple[BackboneName, ...] = ("resnet18", "resnet34", "resnet50", "resnet101")
SIMILARITIES: tuple[Similarity, ...] = ("both", "cosine", "prototype")
ARCHITECTURES: dict[Architecture, str] = {"mshnet": "MSHNet", "panet": "PANet"}
"""What can be trained, with the name for tables; `mshnet.architectures` builds them."""
IGNORE_INDEX = 255
"""Label of pixels that the metric leaves out."""
PAPER_INNER_WEIGHT = 1 / 3
"""Of the inner losses (eq. 1)."""
PUBLISHED_INNER_WEIGHT = 0.3


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network's shape: all that a checkpoint must agree on."""

    architecture: Architecture = "mshnet"
    """What is learnt on the backbone's features: mshnet, or panet (prototype alignment: small, quick)."""
    backbone: BackboneName = "resnet50"
    """Frozen feature extractor; the paper's are resnet50 and resnet101, the smaller ones suit small machines."""
    similarity: Similarity = "both"
    """Which similarities are merged (paper, table 4); mshnet's alone."""
    dropout: float = 0.2
    """Channel dropout in mshnet's merging blocks and pyramid, 0 to below 1."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise InputError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}")
        if self.backbone not in BACKBONES:
            raise InputError(f"backbone must be one of {', '.join(BACKBONES)}, got {self.backbone!r}")
        if self.similarity not in SIMILARITIES:
            raise InputError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {self.similarity!r}")
        if self.architecture != "mshnet" and self.similarity != "both":
            raise InputError(
                f"similarity is a choice of mshnet's, got {self.similarity!r} with architecture {self.architecture!r}; "
                "leave it out"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be from 0 to below 1, got {self.dropout}")

    @property
    def title(self) -> str:
        """The architecture's name for tables and charts."""
        return ARCHITECTURES[self.architecture]

    @property
    def label(self) -> str:
        """In words for the names of runs: "resnet50 both", "resnet50 panet"."""
        return f"{self.backbone} {self.similarity if self.architecture == 'mshnet' else self.architecture}"

    def identity(self) -> dict[str, Any]:
        """The fields as JSON values, for fingerprints and model folders.

        Without a field that came later while it has its default: what was made before is found and read as before.
        """
        return {k: v for k, v in asdict(self).items() if (k, v) != ("architecture", "mshnet")}


@dataclass(frozen=True, kw_only=True)
class ImageFormat:
    """How the pictures are stored."""

    image_size_px: int = 473
    """Side of the square training image, pixels (paper: 473)."""
    encoding: Literal["jpeg", "png"] = "jpeg"
    """jpeg is small; png is lossless."""
    jpeg_quality: int = 95
    """1 to 95; used with jpeg."""

    def __post_init__(self) -> None:
        if self.image_size_px < 33:
            raise InputError(f"image_size_px must be 33 or more (the backbone divides by 32), got {self.image_size_px}")
        if self.encoding not in ("jpeg", "png"):
            raise InputError(f"encoding must be jpeg or png, got {self.encoding!r}")
        if not 1 <= self.jpeg_quality <= 95:
            raise InputError(f"jpeg_quality must be 1..95, got {self.jpeg_quality}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the learnable part is trained: SGD over episodes."""

    epochs: int = 300
    """Number of epochs."""
    episodes_per_epoch: int = 11250
    """Episodes in an epoch (Pascal: 750 of each of the 15 base classes)."""
    global_batch: int = 8
    """Episodes per update, over all workers together."""
    statistics_batch: int = 0
    """Episodes that share batch-norm statistics, over all workers together; 0: the whole global batch. A smaller
    number runs the global batch in parts of that size, one after the other (gradient accumulation), in less memory."""
    learning_rate: float = 0.01
    """At the start."""
    momentum: float = 0.9
    """Of SGD, 0 to below 1."""
    weight_decay: float = 0.0005
    """On all parameters, batch norm and biases included."""
    schedule: Literal["exponential", "step", "cosine", "constant"] = "exponential"
    """exponential: x decay each epoch; step: x decay every decay_epochs; cosine: to zero over the whole run."""
    decay: float = 0.9 ** (1 / 5)
    """Factor of the exponential and the step schedule, above 0 to 1."""
    decay_epochs: int = 5
    """Epochs between two steps of the step schedule."""
    inner_weight: float = PAPER_INNER_WEIGHT
    """Weight of the summed inner losses (paper, eq. 1: 1/3; published code: 0.3)."""
    seed: int = 0
    """Of the initial weights and of the order of the training episodes."""

    def __post_init__(self) -> None:
        for name in ("epochs", "episodes_per_epoch", "global_batch", "decay_epochs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.global_batch > self.episodes_per_epoch:
            raise InputError(
                f"episodes_per_epoch must be at least global_batch ({self.global_batch}), got {self.episodes_per_epoch}"
            )
        if self.statistics_batch < 0 or self.global_batch % self.episodes_per_part:
            raise InputError(
                "statistics_batch must be 0 or divide global_batch, got "
                f"{self.statistics_batch} and {self.global_batch}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be above 0 and finite, got {self.learning_rate}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be 0 to below 2^63, got {self.seed}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be from 0 to below 1, got {self.momentum}")
        if not (0 <= self.weight_decay < math.inf and 0 <= self.inner_weight < math.inf):
            raise InputError(
                "weight_decay and inner_weight must be 0 or more and finite, "
                f"got {self.weight_decay} and {self.inner_weight}"
            )
        if not 0 < self.decay <= 1:
            raise InputError(f"decay must be above 0 and at most 1, got {self.decay}")
        if self.schedule not in ("exponential", "step", "cosine", "constant"):
            raise InputError(f"schedule must be exponential, step, cosine or constant, got {self.schedule!r}")

    @property
    def steps_per_epoch(self) -> int:
        """Updates in an epoch; a last batch that is not full is left out."""
        return self.episodes_per_epoch // self.global_batch

    @property
    def episodes_per_part(self) -> int:
        """Episodes that go through the network together, over all workers: those that share batch statistics."""
        return self.statistics_batch or self.global_batch

    @property
    def parts_per_update(self) -> int:
        """Parts whose gradients are accumulated into one update."""
        return self.global_batch // self.episodes_per_part

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of an update, counted from 0: a pure function, so there is no state to resume."""
        epoch = step // self.steps_per_epoch
        if self.schedule == "exponential":
            return self.learning_rate * self.decay**epoch
        if self.schedule == "step":
            return self.learning_rate * self.decay ** (epoch // self.decay_epochs)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / (self.epochs * self.steps_per_epoch)))
        return self.learning_rate


def paper_training() -> TrainingConfig:
    """The paper's text (section 5.3.2).

    Fidelity: the paper says "exponential decay" without a factor and no number of epochs; the factor
    here falls as fast as the published code's, the epochs are its upper limit.
    """
    return TrainingConfig()


def published_training(dataset: str) -> TrainingConfig:
    """What the published code runs: `pascal` (batch 11, 750 images a class) or `coco` (batch 14, 7,500 episodes)."""
    recipe = TrainingConfig(
        learning_rate=0.025,
        weight_decay=0.00005,
        schedule="step",
        decay=0.9,
        decay_epochs=5,
        inner_weight=PUBLISHED_INNER_WEIGHT,
        global_batch=11,
    )
    return recipe if dataset != "coco" else replace(recipe, global_batch=14, episodes_per_epoch=7500)
