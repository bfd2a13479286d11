"""Weights in and out: model folders, the published layout, backbone files. Nothing here executes a pickle."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import posixpath
import re
import sys
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from mshnet import architectures
from mshnet.backbone import Backbone
from mshnet.config import ARCHITECTURES, ModelConfig
from mshnet.data.files import write_atomically
from mshnet.data.filesystem import filesystem
from mshnet.errors import InputError
from mshnet.model import FewShotModel, MSHNet

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

# Ours to published, first match wins. {n} is 5 - level, {t} torchvision's layer number (level - 1).
_RULES: tuple[tuple[str, str], ...] = (
    (r"gps\.(\d)\.linear", "query_sup_corrConv.{n}.conv2"),
    (r"merging\.(\d)\.cosine_block\.layers\.([01])", "sim_layer_corrConv.{n}.{p}0"),
    (r"merging\.(\d)\.cosine_block\.local\.([01])", "sim_layer_corrConv.{n}.{p}1"),
    (r"merging\.(\d)\.prototype_block\.layers\.([01])", "qs_layer_corrConv.{n}.{p}0"),
    (r"merging\.(\d)\.prototype_block\.local\.([01])", "qs_layer_corrConv.{n}.{p}1"),
    (r"merging\.(\d)\.cosine_shot\.([01])", "simShotConv{t}.{p}0"),
    (r"merging\.(\d)\.prototype_shot\.branches\.([012])\.([01])", "sqShotConv{t}.conv{g2}.{g3}"),
    (r"merging\.(\d)\.prototype_shot\.fuse\.([01])", "sqShotConv{t}.conv3.{g2}"),
    (r"merging\.(\d)\.cosine_project", "conv{t}.conv1"),
    (r"merging\.(\d)\.prototype_project", "conv{t}.conv2"),
    (r"merging\.(\d)\.merge\.([01])", "conv{t}.merge.{p}0"),
    (r"merging\.(\d)\.refine\.([01])", "conv{t}.merge2.{p}0"),
    (r"merging\.(\d)\.attention\.mlp\.0", "conv{t}.chATT.mlp.1"),
    (r"merging\.(\d)\.attention\.mlp\.2", "conv{t}.chATT.mlp.3"),
    (r"pyramid\.fuse_deepest\.deeper()", "conv43.conv1"),
    (r"pyramid\.fuse_deepest\.lateral()", "conv43.conv2"),
    (r"pyramid\.fuse_deepest\.join()\.([01])", "conv43.merge.{p}0"),
    (r"pyramid\.fuse_deepest\.refine()\.([01])", "conv43.merge2.{p}0"),
    (r"pyramid\.fuse_finest\.deeper()\.([01])", "conv432.conv1.{p}0"),
    (r"pyramid\.fuse_finest\.lateral()", "conv432.conv2"),
    (r"pyramid\.fuse_finest\.join()\.([01])", "conv432.merge.{p}0"),
    (r"pyramid\.fuse_finest\.refine()\.([01])", "conv432.convout.{p}0"),
    (r"pyramid\.decoder\.reduce()\.([01])", "decoder1.conv0.{g2}"),
    (r"pyramid\.decoder\.residual()\.([01])", "decoder1.conv1.{p}0"),
    (r"pyramid\.decoder\.output()\.([01])", "decoder1.conv2.{p}0"),
    (r"pyramid\.head()\.([02])", "decoderOut.{g2}"),
    (r"pyramid\.inner_heads\.0()\.([02])", "decoder4.{g2}"),
    (r"pyramid\.inner_heads\.1()\.([02])", "decoder3.{g2}"),
    (r"pyramid\.inner_heads\.2()\.([02])", "decoder2.{g2}"),
)


def published_name(name: str) -> str:
    """The published code's name of one of `MSHNet.relation`'s tensors, without its `merge.` prefix."""
    for pattern, template in _RULES:
        match = re.match(pattern + r"\.(\w+)$", name)
        if match:
            groups = [*match.groups(), ""]
            level = int(groups[0]) if groups[0] else 0
            stem = template.format(
                n=5 - level, t=level - 1, p="conv" if groups[1] == "0" else "bn", g2=groups[1], g3=groups[2]
            )
            return f"{stem}.{match.group(match.lastindex or 0)}"
    raise KeyError(name)


def published_state_dict(model: MSHNet, include_backbone: bool = False) -> dict[str, Tensor]:
    """The learnable part (or all) under the published names, as the published code saves it."""
    state = {f"merge.{published_name(name)}": value for name, value in model.relation.state_dict().items()}
    if include_backbone:
        state |= {f"backbone.{name}": value for name, value in model.backbone.state_dict().items()}
    return state


def load_published_state_dict(model: MSHNet, state_dict: Mapping[str, Tensor]) -> None:
    """Load a checkpoint in the published layout (`merge.*`, optionally `backbone.*`; `module.` is dropped).

    Raises InputError when it is of another backbone or another choice of similarities.
    """
    given = {name.removeprefix("module."): value for name, value in state_dict.items()}
    own = {name: f"merge.{published_name(name)}" for name in model.relation.state_dict()}
    backbone = {k.removeprefix("backbone."): v for k, v in given.items() if k.startswith("backbone.")}
    merge = {name: value for name, value in given.items() if not name.startswith("backbone.")}
    _check_names(
        expected={published: model.relation.state_dict()[name] for name, published in own.items()},
        found=merge,
        config=model.config,
    )
    model.relation.load_state_dict({name: merge[published] for name, published in own.items()})
    if backbone:
        model.backbone.load_torchvision_state_dict(backbone)


def _check_names(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], config: ModelConfig) -> None:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = sorted(k for k in expected.keys() & found.keys() if expected[k].shape != found[k].shape)
    if missing or unknown or wrong:
        first = (wrong + missing + unknown)[0]
        raise InputError(
            f"expected a checkpoint of {_described(config)}, found one of "
            f"another architecture ({len(missing)} names missing, {len(unknown)} unknown, {len(wrong)} of another "
            f"shape; first: {first}); build the model with the configuration that the checkpoint was made with"
        )


def _described(config: ModelConfig) -> str:
    if config.architecture != "mshnet":
        return f"architecture {config.architecture} on backbone {config.backbone}"
    return f"backbone {config.backbone} with similarity {config.similarity}"


def save_model(model: FewShotModel, folder: str, details: Mapping[str, Any]) -> None:
    """Write weights (safetensors, backbone included) and `config.json` into a folder (path or URI).

    `details` (image size, protocol, provenance) goes beside the model's configuration.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(posixpath.join(folder, WEIGHTS_FILE), safetensors.torch.save(weights))
    config = {"format": FORMAT_VERSION, "model": model.config.identity(), **details}
    # Last, so that a folder with a config has its weights.
    write_atomically(posixpath.join(folder, CONFIG_FILE), json.dumps(config, indent=2).encode())


def read_config(folder: str) -> dict[str, Any]:
    """The `config.json` of a model folder. Raises InputError where there is none or it is of another format."""
    fs, root = filesystem(folder)
    try:
        config: dict[str, Any] = json.loads(fs.cat_file(posixpath.join(root, CONFIG_FILE)))
    except FileNotFoundError as error:
        raise InputError(
            f"no model under {folder!r} (looked for {CONFIG_FILE}); give a folder that training wrote"
        ) from error
    except ValueError as error:
        raise InputError(f"expected JSON in {CONFIG_FILE} of {folder!r}: {error}; copy the folder anew") from error
    if config.get("format") != FORMAT_VERSION:
        raise InputError(
            f"expected a model folder of format {FORMAT_VERSION}, found {config.get('format')!r} in {folder!r}; "
            "use the version of mshnet that wrote it"
        )
    return config


def load_config(folder: str) -> ModelConfig:
    """The network that a model folder names.

    Raises InputError as `read_config` does, and where it names one that this version does not know.
    """
    described = read_config(folder)["model"]
    architecture = described.get("architecture", "mshnet")  # the only one, when folders did not name theirs
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"expected a model of one of the architectures {', '.join(ARCHITECTURES)} in {folder!r}, found "
            f"{architecture!r}; use a version of mshnet that knows it"
        )
    try:
        return ModelConfig(**described)
    except TypeError as error:
        raise InputError(
            f"expected a model that this version knows in {folder!r}, found {described}; use the version that wrote it"
        ) from error


def load_model(folder: str, expected: ModelConfig | None = None) -> FewShotModel:
    """A model in eval mode from a folder (path or URI) that `save_model` wrote, of the architecture that it names.

    Raises InputError when the folder holds none, or one of another architecture than `expected`.
    """
    config = load_config(folder)
    if expected is not None and _described(config) != _described(expected):
        raise InputError(f"expected a checkpoint of {_described(expected)}, found {_described(config)} in {folder!r}")
    model = architectures.build(config)
    weights = read_state_dict(posixpath.join(folder, WEIGHTS_FILE))
    _check_names(model.state_dict(), weights, config)
    model.load_state_dict(weights)
    return model.eval()


def read_state_dict(uri: str) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file or a torch state dict (path or URI), floats as float32.

    A torch file is read with `weights_only`, so nothing in it is executed. Raises InputError when the
    file is absent, damaged, or holds more than tensors.
    """
    fs, path = filesystem(uri)
    try:
        data = fs.cat_file(path)
    except FileNotFoundError as error:
        raise InputError(f"no weights at {uri!r}; give a safetensors file or a torch state dict") from error
    try:
        loaded = (
            safetensors.torch.load(data)
            if uri.endswith(".safetensors")
            else torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        )
    except Exception as error:
        raise InputError(
            f"expected a safetensors file or a torch state dict of tensors in {uri!r}, found something that cannot "
            f"be read safely ({type(error).__name__}); convert it to safetensors"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"expected tensors by name in {uri!r}, found {type(state).__name__}; give a state dict")
    return {name: v.float() if v.is_floating_point() else v for name, v in state.items()}


def load_backbone_weights(backbone: Backbone, source: str, seed: int = 0) -> None:
    """Fill the backbone: `imagenet` (torchvision's first ImageNet weights), `random`, or a path or URI.

    `random` draws PyTorch's default initialisation from `seed`; it is for demonstrations and tests.
    Raises InputError when the weights cannot be had or are of another architecture.
    """
    if source == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = Backbone(backbone.name)
        backbone.load_state_dict(drawn.state_dict())
    elif source == "imagenet":
        weights = torchvision.models.get_model_weights(backbone.name).IMAGENET1K_V1
        try:
            # torch announces the download on stdout, where results go.
            with contextlib.redirect_stdout(sys.stderr):
                state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # no network; damaged; not only tensors
            raise InputError(
                f"the ImageNet weights of {backbone.name} are neither sound in torch's cache nor downloadable "
                f"({error}); put the file there, or give --backbone-weights a local path or URI of a safetensors "
                "file or torch state dict with torchvision's names, or `random` for a trial"
            ) from error
        backbone.load_torchvision_state_dict(state)
    else:
        backbone.load_torchvision_state_dict(read_state_dict(source))
