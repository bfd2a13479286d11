"""The commands `segment` and `learn` from files to files, with a network of random weights."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mshnet import ModelConfig, MSHNet, checkpoint
from mshnet.__main__ import main
from mshnet.predict import Segmenter, SupportSet
from mshnet.visualize.labels import class_colour

SIDE = 65


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The head's bias is set so that a good part of the pictures is object."""
    torch.manual_seed(0)
    network = MSHNet(ModelConfig(backbone="resnet18")).eval()
    folder = tmp_path_factory.mktemp("model")
    checkpoint.save_model(network, str(folder), {"image_size_px": SIDE})
    segmenter = Segmenter.from_checkpoint(folder, device="cpu")
    image, mask = example(0)
    segmenter.learn("x", [image], [mask])
    probability = torch.from_numpy(segmenter(image).probabilities[0])
    bias = network.relation.pyramid.head[-1].bias
    assert isinstance(bias, torch.Tensor)
    with torch.no_grad():
        bias[1] -= torch.logit(probability).median()
    checkpoint.save_model(network, str(folder), {"image_size_px": SIDE})
    return str(folder)


def example(seed: int, height: int = 50, width: int = 70) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a brighter box, and where that is."""
    image = np.random.default_rng(seed).integers(0, 160, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), dtype=bool)
    mask[10:40, 5 + seed : 35 + seed] = True
    image[mask] += 90
    return image, mask


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two examples, a label picture, and a folder of three queries of different sizes."""
    for number in (1, 2):
        image, mask = example(number)
        Image.fromarray(image).save(tmp_path / f"s{number}.png")
        Image.fromarray(mask).save(tmp_path / f"s{number}_mask.png")
    Image.fromarray(example(2)[1].astype(np.uint8) * 7).save(tmp_path / "labels.png")
    (tmp_path / "queries/sub").mkdir(parents=True)
    for name, (height, width) in {"a.png": (40, 60), "b.jpg": (90, 30), "sub/c.png": (65, 65)}.items():
        Image.fromarray(example(9, height, width)[0]).save(tmp_path / "queries" / name)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[dict[str, Any], str]:
    """The line on stdout, where there is one, and what went to stderr."""
    capsys.readouterr()
    if code:
        with pytest.raises(SystemExit) as end:
            main(list(map(str, arguments)))
        assert end.value.code == code
    else:
        main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return (json.loads(out) if out else {}), err


def segment(files: Path, model: str, *more: object) -> list[object]:
    support = ["--support", files / "s1.png", files / "s1_mask.png", "--support", files / "s2.png"]
    given = ["segment", "--model", model, *support, f"{files}/labels.png#7", "--query", files / "queries"]
    return [*given, "--out", files / "out", "--device", "cpu", *more]


def contents(folder: Path) -> Mapping[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_masks_are_those_of_the_segmenter(files: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    said, err = run(capsys, *segment(files, model, "--overlay"))
    assert said["segmented"] == 3
    assert (said["skipped"], said["failed"], said["classes"]) == (0, [], ["object"])
    assert "pictures: 3/3" in err
    segmenter = Segmenter.from_checkpoint(model, device="cpu")
    images, masks = zip(*(example(number) for number in (1, 2)), strict=True)
    segmenter.learn("object", images, masks)
    found = 0
    for name in ("a.png", "b.jpg", "sub/c.png"):
        query = files / "queries" / name
        mask = Image.open((files / "out" / name).with_suffix(".png"))
        expected = segmenter(str(query)).mask
        assert mask.mode == "L"
        assert np.array_equal(np.asarray(mask), expected * 255), name
        found += int(expected.sum())
        overlay = Image.open((files / "out" / name).with_name(f"{query.stem}_overlay.png"))
        assert overlay.width == mask.width
        before, after = np.asarray(Image.open(query).convert("RGB")), np.asarray(overlay)[: mask.height]
        assert np.array_equal((after != before).any(2) & ~expected, np.zeros_like(expected))
    assert found > 100, "the network finds something"


def test_submitted_again_it_does_what_is_missing(files: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, *segment(files, model))
    first = contents(files / "out")
    (files / "out/sub/c.png").unlink()
    said, _ = run(capsys, *segment(files, model))
    assert (said["segmented"], said["skipped"]) == (1, 2)
    assert contents(files / "out") == first
    said, _ = run(capsys, *segment(files, model, "--overwrite"))
    assert (said["segmented"], said["skipped"]) == (3, 0)
    assert contents(files / "out") == first


def test_nothing_of_others_is_written_over(files: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, *segment(files, model))
    before = contents(files / "out")
    _, err = run(capsys, *segment(files, model, "--threshold", 0.4), code=1)
    assert "exists and was made otherwise; give another --out, or --overwrite" in err
    (files / "out/a.png").write_bytes(b"of somebody")
    _, err = run(capsys, *segment(files, model), code=1)
    assert "a.png' exists and was made otherwise" in err
    assert contents(files / "out") == {**before, "a.png": b"of somebody"}


def test_another_picture_of_the_same_name_is_noticed(
    files: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, *segment(files, model))
    Image.fromarray(example(3)[0]).save(files / "queries/a.png")
    said, err = run(capsys, *segment(files, model), code=1)
    assert said["skipped"] == 2
    assert "was made from another picture of this name" in err


def test_bad_pictures_are_named_and_the_others_done(
    files: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "queries/broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    (files / "queries/empty.png").touch()
    said, err = run(capsys, *segment(files, model), code=1)
    assert said["segmented"] == 3
    assert [Path(failed["query"]).name for failed in said["failed"]] == ["broken.jpg", "empty.png"]
    assert "broken.jpg' as a picture" in err
    assert err.splitlines()[-1] == "mshnet segment: 2 of 5 pictures could not be segmented (named above)"
    assert len(contents(files / "out")) == 3


def test_several_learnt_classes_give_numbers(files: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in ((1, "scratch"), (2, "Kratzer ü")):
        out = files / f"{number}.safetensors"
        arguments = ["learn", "--model", model, "--name", name, "--out", out, "--device", "cpu"]
        said, _ = run(capsys, *arguments, "--support", files / f"s{number}.png", files / f"s{number}_mask.png")
        assert (said["name"], said["examples"], said["threshold"]) == (name, 1, 0.5)
        assert SupportSet.load(out).name == name
        _, err = run(capsys, *arguments, "--support", files / "s1.png", files / "s1_mask.png", code=1)
        assert "expected no file at" in err
    learned = ["--learned", files / "1.safetensors", files / "2.safetensors"]
    base = ["segment", "--model", model, *learned, "--query", files / "queries", "--out", files / "out"]
    said, _ = run(capsys, *base, "--overlay", "--device", "cpu")
    assert json.loads((files / "out/classes.json").read_text()) == {"scratch": 1, "Kratzer ü": 2}
    segmenter = Segmenter.from_checkpoint(model, device="cpu")
    for number in (1, 2):
        segmenter.add(SupportSet.load(files / f"{number}.safetensors"))
    labels = Image.open(files / "out/a.png")
    assert labels.mode == "P"
    assert np.array_equal(np.asarray(labels), segmenter(str(files / "queries/a.png")).labels)
    palette = labels.getpalette()
    assert palette is not None
    assert tuple(palette[3:9]) == (*class_colour(0), *class_colour(1))
    _, err = run(capsys, *base, "--support", files / "s1.png", files / "s1_mask.png", "--name", "scratch", code=1)
    assert "a name of its own for each class, found scratch twice" in err


def test_the_threshold_given_counts(files: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    all_of_it, _ = run(capsys, *segment(files, model, "--threshold", 0.0))
    assert (np.asarray(Image.open(files / "out/a.png")) == 255).all()
    none_of_it, _ = run(capsys, *segment(files, model, "--threshold", 1.0, "--overwrite"))
    assert (all_of_it["without_object"], none_of_it["without_object"]) == (0, 3)


def test_windows_are_looked_through(files: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, *segment(files, model, "--tile-px", 40, "--calibrate"))
    segmenter = Segmenter.from_checkpoint(model, device="cpu")
    images, masks = zip(*(example(number) for number in (1, 2)), strict=True)
    segmenter.learn("object", images, masks, calibrate=True)
    expected = segmenter(str(files / "queries/a.png"), tile_px=40).mask
    assert np.array_equal(np.asarray(Image.open(files / "out/a.png")) == 255, expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold", 1.5], "threshold must be 0..1"),
        (["--tile-px", 7], "tile_px must be 33 or more"),
        (["--support", "absent.jpg", "absent.png"], "no file 'absent.jpg'"),
        (["--model", "absent"], "no model under 'absent'"),
        (["--query", "absent"], "no file or folder 'absent'"),
        (["--learned", "absent.safetensors"], "absent.safetensors"),
        (["--out", "s3://bucket/masks"], "expected a folder of this machine"),
    ],
)
def test_bad_input_ends_with_one_line(
    files: Path, model: str, flags: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said, err = run(capsys, *segment(files, model, *flags), code=1)
    assert not said
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (files / "out").exists()


def test_a_mask_of_another_size_is_named(files: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.ones((9, 9), dtype=np.uint8)).save(files / "small.png")
    _, err = run(capsys, *segment(files, model, "--support", files / "s1.png", files / "small.png"), code=1)
    assert "the mask of" in err
    assert "s1.png' is 9×9 px, its image 70×50 px" in err


def test_as_a_process_stdout_is_one_line(files: Path, model: str) -> None:
    command = [sys.executable, "-m", "mshnet", *map(str, segment(files, model))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["segmented"] == 3
    picture = Image.open(io.BytesIO((files / "out/a.png").read_bytes()))
    assert json.loads(picture.info["mshnet"]).keys() == {"settings", "query"}
