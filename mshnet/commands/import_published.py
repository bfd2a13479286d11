"""`python -m mshnet import-published`: a checkpoint of the published code becomes a model folder."""

from __future__ import annotations

import hashlib
import json
import posixpath
import sys
from typing import Annotated, Any

import tyro

from mshnet.config import BackboneName, ModelConfig, Similarity
from mshnet.errors import InputError

ORIGIN = "imported from the published layout"
"""In the folder's `config.json`, under `origin`: how the weights were trained is not known here."""


def command(
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")],
    out: str,
    backbone: BackboneName | None = None,
    similarity: Similarity | None = None,
    backbone_weights: str = "",
    image_size_px: int = 473,
    overwrite: bool = False,
    register: str = "",
    tracking_uri: str = "",
) -> None:
    """Turn a checkpoint of the published code into a model folder of ours, and register it if asked to.

    Nothing in the file is executed. The network is recognised from the tensors' names and shapes. The last line on
    stdout says as JSON what was made.

    Args:
        checkpoint: The file (path or URI), a torch state dict with the published names.
        out: Folder (path or URI) of the model to write.
        backbone: Of the network; recognised where it is not given.
        similarity: Which similarities it merges; recognised where it is not given.
        backbone_weights: imagenet (torchvision's, downloaded once), or a path or URI; over those in the file. Empty:
            the file's own, else imagenet.
        image_size_px: Side of the square that it was trained on (published: 473).
        overwrite: Write over a model that is in the folder already.
        register: Also as a version of this registered model in MLflow.
        tracking_uri: MLflow's; empty: what MLFLOW_TRACKING_URI names, else sqlite:///outputs/mlflow.db.
    """
    from mshnet import published, registries
    from mshnet.checkpoint import CONFIG_FILE, load_backbone_weights, read_state_dict, save_model
    from mshnet.data.filesystem import filesystem

    if image_size_px < 33:
        raise InputError(f"image_size_px must be 33 or more (the backbone divides by 32), got {image_size_px}")
    fs, folder = filesystem(out)
    if not overwrite and fs.exists(posixpath.join(folder, CONFIG_FILE)):
        raise InputError(f"expected no model in {out!r} yet, found one; give another folder, or --overwrite")
    registry = registries.keeper("models") if register else None  # before the work
    state = read_state_dict(checkpoint)
    if strange := sorted(name for name, value in state.items() if not value.isfinite().all()):
        raise InputError(
            f"expected finite weights in {checkpoint!r}, found {len(strange)} tensors with others (first: "
            f"{strange[0]}): its training diverged; give another checkpoint"
        )
    config = published.recognised(state, backbone, similarity)
    learnable, own_backbone = published.parts(state)
    model = published.build(config, learnable if backbone_weights else state)
    weights = "the checkpoint's own" if own_backbone and not backbone_weights else backbone_weights or "imagenet"
    if backbone_weights or not own_backbone:
        load_backbone_weights(model.backbone, weights)
    details = _details(checkpoint, image_size_px, weights)
    save_model(model, out, details)
    made = _made(out, config, weights, details["source"]["sha256"], sum(p.numel() for p in model.relation.parameters()))
    print(f"{config.label}, backbone weights: {weights}; written to {out}", file=sys.stderr)
    if registry is not None:
        version = registry.register(out, register, tracking_uri, _description(made, details))
        made |= {"registered_model": register, "version": str(version)}
    print(json.dumps(made), flush=True)


def _details(checkpoint: str, image_size_px: int, weights: str) -> dict[str, Any]:
    from mshnet.data.filesystem import filesystem

    fs, path = filesystem(checkpoint)
    sha256 = hashlib.sha256(fs.cat_file(path)).hexdigest()
    return {
        "image_size_px": image_size_px,
        "origin": ORIGIN,
        "source": {"file": posixpath.basename(checkpoint), "sha256": sha256},
        "backbone_weights": weights,
    }


def _made(out: str, config: ModelConfig, weights: str, sha256: str, learnable: int) -> dict[str, Any]:
    return {
        "model": out,
        "backbone": config.backbone,
        "similarity": config.similarity,
        "learnable_parameters": learnable,
        "backbone_weights": weights,
        "source_sha256": sha256,
    }


def _description(made: dict[str, Any], details: dict[str, Any]) -> str:
    source = details["source"]
    return (
        f"MSHNet, {made['backbone']}, similarity {made['similarity']}, {ORIGIN}.\n\n"
        f"File `{source['file']}`, sha256 `{source['sha256']}`; backbone weights: {made['backbone_weights']}; pictures "
        f"of {details['image_size_px']} px. How it was trained, and on which classes, is not known here: no number "
        "stands beside this version until it is evaluated (`pipelines/cross_validate.py --trained`).\n"
    )
