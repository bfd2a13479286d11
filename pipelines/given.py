"""Weights that are given instead of trained: a fold's training is replaced by checking and taking over a model folder.

How they were trained is not known here, and every number that they give says so.

    python pipelines/cross_validate.py --dataset pascal --source data/VOC2012 --trained DIR0 DIR1 DIR2 DIR3
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from mshnet.config import ModelConfig
from mshnet.errors import InputError
from pipelines import storage
from pipelines.config import CrossValidationConfig, fingerprint
from pipelines.dag import Stage
from pipelines.train import CONFIG_FILE, MODEL, WEIGHTS_FILE, TrainedFold

CODE_VERSION = 1
"""Raise it when the same folder would be taken over in another way."""


def resolved(config: CrossValidationConfig) -> CrossValidationConfig:
    """With the folders' places made absolute, and with their network and image size, whatever was configured.

    Raises InputError where a folder holds no model, or they hold models that differ.
    """
    if not config.trained:
        return config
    folders = tuple(storage.absolute(folder) for folder in config.trained)
    found = {folder: _network(folder) for folder in folders}
    first = found[folders[0]]
    for folder, network in found.items():
        if network != first:
            raise InputError(
                f"expected the same network and image size in every folder of --trained, found {_described(*first)} "
                f"in {folders[0]!r} and {_described(*network)} in {folder!r}; evaluate them one by one"
            )
    model, side = first
    return replace(config, trained=folders, model=model, images=replace(config.images, image_size_px=side))


def check(config: CrossValidationConfig) -> None:
    """Load every given model once. Raises InputError for one that is damaged, or that was trained on a fold's tests."""
    from mshnet.checkpoint import load_model

    for fold in config.folds if config.trained else ():
        _check_fold(config, fold)
    for folder in dict.fromkeys(config.trained):
        load_model(folder, config.model)


def weights_id(config: CrossValidationConfig) -> str:
    """What identifies all of them, and the backbones in them."""
    return f"given {fingerprint(*(_sha256(config.given_model(fold)) for fold in config.folds))}"


def stage(config: CrossValidationConfig, fold: int) -> Stage:
    """Take over a fold's weights."""
    given = config.given_model(fold)
    # What makes another number of the same weights and episodes: the precision, and the untrained network beside it.
    settings = [config.model.identity(), config.precision, config.training.seed]
    key = fingerprint("given", CODE_VERSION, _sha256(given), *settings)
    folder = storage.join(config.store, "folds", f"{config.dataset}-fold{fold}-given-{key}")
    return Stage(
        name=f"take over the weights of fold {fold}",
        result=storage.join(folder, "result.json"),
        run=take_over,
        arguments=(config, fold, folder),
        parts=(storage.join(MODEL, WEIGHTS_FILE), storage.join(MODEL, CONFIG_FILE)),
    )


def take_over(config: CrossValidationConfig, fold: int, folder: str) -> Mapping[str, Any]:
    """A copy of the model on the store, where every node finds it and nobody else changes it."""
    from mshnet.checkpoint import load_model, read_config

    given, model = config.given_model(fold), storage.join(folder, MODEL)
    for name in (WEIGHTS_FILE, CONFIG_FILE):  # the one that makes it a model last
        storage.write_bytes(storage.join(model, name), storage.read_bytes(storage.join(given, name)))
    load_model(model, config.model)
    sha256, known = _sha256(given), read_config(model).get("git_commit")
    return TrainedFold(
        fold=fold,
        model=storage.below(config.store, model),
        history=[],
        best_epoch=0,
        train_episodes=0,
        train_s=0.0,
        run_id="",
        git_commit=str(known) if known else f"unknown, weights given (sha256 {sha256[:12]})",
    ).to_json()


def _network(folder: str) -> tuple[ModelConfig, int]:
    from mshnet.checkpoint import load_config, read_config

    side = read_config(folder).get("image_size_px")
    if not isinstance(side, int):
        raise InputError(f"expected image_size_px in {CONFIG_FILE} of {folder!r}, found {side!r}; write it there")
    return load_config(folder), side


def _described(model: ModelConfig, side: int) -> str:
    return f"{model.label} at {side} px"


def _check_fold(config: CrossValidationConfig, fold: int) -> None:
    """A folder that our training wrote says of which fold it is: another fold's has seen this one's classes."""
    from mshnet.checkpoint import read_config

    folder = config.given_model(fold)
    details = read_config(folder)
    made = details.get("config") or {}
    here = json.loads(config.to_text())
    same = made.get("dataset") == config.dataset and made.get("own", here.get("own")) == here.get("own")
    if same and details.get("fold", fold) != fold:
        raise InputError(
            f"expected weights that never saw the classes of fold {fold}, found in {folder!r} those of fold "
            f"{details['fold']} of {config.dataset}, which were trained on them; give the folders in the order of "
            "--folds"
        )


@cache
def _sha256(folder: str) -> str:
    found = storage.sha256(storage.join(folder, WEIGHTS_FILE))
    if found is None:
        raise InputError(f"no weights under {folder!r} (looked for {WEIGHTS_FILE}); give a model folder")
    return found
