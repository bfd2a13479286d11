"""Model folders and backbone weights: the same bits come back, nothing is executed, messages say what to do."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import URLError

import fsspec
import pytest
import safetensors.torch
import torch
from torch import Tensor

from mshnet import ModelConfig, MSHNet
from mshnet.backbone import Backbone
from mshnet.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_backbone_weights,
    load_model,
    load_published_state_dict,
    read_config,
    read_state_dict,
    save_model,
)
from mshnet.errors import InputError

CONFIG = ModelConfig(backbone="resnet18", similarity="cosine", dropout=0.1)


class Evil:
    """Pickles as a call that makes a folder: the sign that something was executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        import os

        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def model() -> MSHNet:
    torch.manual_seed(0)
    model = MSHNet(CONFIG)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))  # as training leaves them
    return model


@pytest.fixture(scope="module")
def folder(model: MSHNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model. Read only."""
    folder = tmp_path_factory.mktemp("model") / "fold0"
    save_model(model, str(folder), {"image_size_px": 65, "protocol": "published"})
    return folder


@pytest.fixture
def linked(folder: Path, tmp_path: Path) -> Path:
    """Another folder with the same weights (not copied) and its own config.json."""
    (tmp_path / WEIGHTS_FILE).hardlink_to(folder / WEIGHTS_FILE)
    (tmp_path / CONFIG_FILE).write_bytes((folder / CONFIG_FILE).read_bytes())
    return tmp_path


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    change(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def test_a_model_folder_holds_the_same_bits(model: MSHNet, folder: Path) -> None:
    loaded = load_model(str(folder))
    assert loaded.config == CONFIG
    assert not any(module.training for module in loaded.modules())
    assert_same_bits(loaded.state_dict(), model.state_dict())
    assert read_config(str(folder)) == {
        "format": 1,
        "model": {"backbone": "resnet18", "similarity": "cosine", "dropout": 0.1},
        "image_size_px": 65,
        "protocol": "published",
    }
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_a_model_folder_at_a_uri(model: MSHNet) -> None:
    uri = "memory://checkpoint-test/fold0"
    save_model(model, uri, {})
    try:
        assert_same_bits(load_model(uri, expected=CONFIG).state_dict(), model.state_dict())
    finally:
        fsspec.filesystem("memory").rm("/checkpoint-test", recursive=True)


def test_another_architecture_is_refused(folder: Path) -> None:
    assert load_model(str(folder), expected=ModelConfig(backbone="resnet18", similarity="cosine")).config == CONFIG
    message = "expected a checkpoint of backbone resnet50 with similarity both, found backbone resnet18 with similarity"
    with pytest.raises(InputError, match=message):
        load_model(str(folder), expected=ModelConfig())
    with pytest.raises(InputError, match=r"of backbone resnet18 with similarity prototype, found .* similarity cosine"):
        load_model(str(folder), expected=ModelConfig(backbone="resnet18", similarity="prototype"))


def test_weights_that_do_not_fit_their_configuration_are_refused(linked: Path) -> None:
    change_config(linked, lambda config: config["model"].update(similarity="both"))
    with pytest.raises(
        InputError,
        match=r"expected a checkpoint of backbone resnet18 with similarity both, found one of another architecture "
        r"\(\d+ names missing, 0 unknown, 0 of another shape; first: .*; build the model with the configuration",
    ):
        load_model(str(linked))


def test_a_published_checkpoint_of_another_architecture_is_refused(model: MSHNet) -> None:
    with pytest.raises(
        InputError, match="expected a checkpoint of backbone resnet18 with similarity cosine, found one of another"
    ):
        load_published_state_dict(model, {"merge.conv4.conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize("found", [0, 2, None])
def test_another_format_is_refused(linked: Path, found: object) -> None:
    change_config(linked, lambda config: config.update(format=found))
    with pytest.raises(InputError, match=f"expected a model folder of format 1, found {found!r} in .* that wrote it"):
        load_model(str(linked))


def test_damaged_and_unknown_configurations_are_refused(linked: Path) -> None:
    change_config(linked, lambda config: config["model"].update(colour="blue"))
    with pytest.raises(InputError, match="expected a model that this version knows"):
        load_model(str(linked))
    text = (linked / "config.json").read_text()
    (linked / "config.json").unlink()
    (linked / "config.json").write_text(text[:-9])
    with pytest.raises(InputError, match=r"expected JSON in config\.json"):
        load_model(str(linked))


def test_folders_that_hold_no_model(linked: Path) -> None:
    (linked / WEIGHTS_FILE).unlink()
    with pytest.raises(InputError, match=f"no weights at '.*{WEIGHTS_FILE}'; give a safetensors file"):
        load_model(str(linked))
    (linked / CONFIG_FILE).unlink()
    with pytest.raises(
        InputError, match=r"no model under '.*' \(looked for config\.json\); give a folder that training"
    ):
        load_model(str(linked))


def test_truncated_weights_are_refused(linked: Path) -> None:
    data = (linked / WEIGHTS_FILE).read_bytes()
    (linked / WEIGHTS_FILE).unlink()  # the other name of the same file stays whole
    (linked / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"found something that cannot be read safely \(SafetensorError\)"):
        load_model(str(linked))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_state_dicts_come_back_as_float32(suffix: str, tmp_path: Path) -> None:
    state = {"w": torch.tensor([[0.1, -3.0]]).half(), "b": torch.tensor([1e-3]).bfloat16(), "n": torch.tensor(7)}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    found = read_state_dict(str(path))
    assert found["w"].tolist() == [[0.0999755859375, -3.0]]  # the nearest half to 0.1
    assert (found["w"].dtype, found["b"].dtype, found["n"].dtype) == (torch.float32, torch.float32, torch.int64)
    assert found["n"] == 7
    remote = f"memory://state-test/weights.{suffix}"
    fsspec.filesystem("memory").pipe_file(f"/state-test/weights.{suffix}", path.read_bytes())
    assert_same_bits(read_state_dict(remote), found)


def test_a_training_checkpoint_around_the_weights(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"w": torch.ones(2)}}, tmp_path / "best.pth")
    assert_same_bits(read_state_dict(str(tmp_path / "best.pth")), {"w": torch.ones(2)})
    torch.save({"epoch": 3, "w": torch.ones(2)}, tmp_path / "mixed.pth")
    with pytest.raises(InputError, match=r"expected tensors by name in '.*mixed\.pth', found dict; give a state dict"):
        read_state_dict(str(tmp_path / "mixed.pth"))
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(InputError, match=r"expected tensors by name in .*; give a state dict"):
        read_state_dict(str(tmp_path / "list.pth"))


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path) -> None:
    sign = tmp_path / "executed"
    torch.save({"conv1.weight": torch.ones(1), "x": Evil(sign)}, tmp_path / "evil.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"x": Evil(sign)}, protocol=2))
    for name in ("evil.pth", "plain.pkl"):
        with pytest.raises(InputError, match=rf"{name}', found something that cannot be read safely .*safetensors"):
            read_state_dict(str(tmp_path / name))
        with pytest.raises(InputError, match="cannot be read safely"):
            load_backbone_weights(Backbone("resnet18"), str(tmp_path / name))
    assert not sign.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # what a careless reader would have done
    assert sign.is_dir()


def test_random_backbone_weights_follow_from_the_seed() -> None:
    torch.manual_seed(5)
    first, again, other = (Backbone("resnet18") for _ in range(3))
    before = torch.random.get_rng_state()
    load_backbone_weights(first, "random", seed=3)
    torch.rand(7)
    load_backbone_weights(again, "random", seed=3)
    load_backbone_weights(other, "random", seed=4)
    assert_same_bits(again.state_dict(), first.state_dict())
    assert not torch.equal(other.conv1.weight, first.conv1.weight)
    assert not any(parameter.requires_grad for parameter in first.parameters())
    torch.random.set_rng_state(before)
    load_backbone_weights(other, "random", seed=9)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's own draws are not disturbed


@pytest.fixture(scope="module")
def published_weights() -> dict[str, Tensor]:
    """A state dict under torchvision's names, with the classifier and without batch counters, as old files are."""
    backbone = Backbone("resnet18")
    load_backbone_weights(backbone, "random", seed=11)
    state = {name: x for name, x in backbone.state_dict().items() if not name.endswith("num_batches_tracked")}
    return {**state, "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


def test_backbone_weights_from_a_torch_file(published_weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(published_weights, tmp_path / "resnet18.pth")
    backbone = Backbone("resnet18")
    load_backbone_weights(backbone, str(tmp_path / "resnet18.pth"))
    for name, value in backbone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, published_weights[name]), name


def test_backbone_weights_from_half_precision_safetensors(published_weights: dict[str, Tensor], tmp_path: Path) -> None:
    half = {name: value.half() for name, value in published_weights.items()}
    safetensors.torch.save_file(half, tmp_path / "resnet18.safetensors")
    backbone = Backbone("resnet18")
    load_backbone_weights(backbone, str(tmp_path / "resnet18.safetensors"))
    assert backbone.conv1.weight.dtype == torch.float32
    for name, value in backbone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, half[name].float()), name
    assert not torch.equal(backbone.conv1.weight, published_weights["conv1.weight"])  # halves they are


def test_backbone_weights_of_another_architecture(published_weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(published_weights, tmp_path / "resnet18.pth")
    backbone = Backbone("resnet34")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(
        InputError,
        match=r"expected the weights of a torchvision resnet34, found a state dict with \d+ names missing, 0 unknown "
        r"and 0 of another shape \(first: layer1\.2\..*\); give a file of the same architecture",
    ):
        load_backbone_weights(backbone, str(tmp_path / "resnet18.pth"))
    assert_same_bits(backbone.state_dict(), before)
    with pytest.raises(InputError, match=r"no weights at '.*absent\.pth'"):
        load_backbone_weights(backbone, str(tmp_path / "absent.pth"))


@pytest.fixture
def empty_cache(tmp_path: Path) -> Iterator[Path]:
    """torch's cache, empty for a test."""
    hub = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(hub)


def offline(*arguments: object, **options: object) -> None:
    raise URLError("[Errno -3] Temporary failure in name resolution")


def test_imagenet_weights_offline(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(
        InputError,
        match=r"the ImageNet weights of resnet18 are neither sound in torch's cache nor downloadable .*Temporary "
        r"failure.*; put the file there, or give --backbone-weights a local path or URI .* or `random` for a trial",
    ):
        load_backbone_weights(Backbone("resnet18"), "imagenet")
    assert list(empty_cache.iterdir()) == []


class Answer(io.BytesIO):
    """What `urlopen` gives: a body and no headers."""

    def info(self) -> Message:
        return Message()


def test_imagenet_weights_that_arrive_damaged(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchvision's own way, its server replaced: the hash in the file's name is checked."""
    monkeypatch.setattr("torch.hub.urlopen", lambda request: Answer(b"<html>log in to the network</html>"))
    with pytest.raises(InputError, match=r"neither sound in torch's cache nor downloadable \(invalid hash value"):
        load_backbone_weights(Backbone("resnet18"), "imagenet")
    assert list(empty_cache.iterdir()) == []
    printed = capsys.readouterr()
    assert printed.out == ""  # stdout is for results
    assert "Downloading" in printed.err


def test_imagenet_weights_from_the_cache(
    published_weights: dict[str, Tensor], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.urlopen", offline)
    empty_cache.mkdir(parents=True)
    torch.save(published_weights, empty_cache / "resnet18-f37072fd.pth")
    backbone = Backbone("resnet18")
    load_backbone_weights(backbone, "imagenet")
    for name, value in backbone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, published_weights[name]), name


def test_imagenet_weights_in_the_cache_are_not_executed_either(empty_cache: Path, tmp_path: Path) -> None:
    empty_cache.mkdir(parents=True)
    torch.save({"conv1.weight": Evil(tmp_path / "executed")}, empty_cache / "resnet18-f37072fd.pth")
    with pytest.raises(InputError, match="neither sound in torch's cache nor downloadable"):
        load_backbone_weights(Backbone("resnet18"), "imagenet")
    assert not (tmp_path / "executed").exists()
    (empty_cache / "resnet18-f37072fd.pth").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(InputError, match="neither sound in torch's cache"):
        load_backbone_weights(Backbone("resnet18"), "imagenet")
