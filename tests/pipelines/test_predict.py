"""Batch prediction: the masks are the segmenter's, what is done stays, what cannot be read is named."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from mshnet import ModelConfig, MSHNet
from mshnet.checkpoint import save_model
from mshnet.data.drawing import draw_scene
from mshnet.data.filesystem import filesystem
from mshnet.errors import InputError
from mshnet.predict import Segmenter, SupportSet
from pipelines.predict import Prediction, main, predict
from pipelines.predictions import MANIFEST, PARTS, SETTINGS, read_predictions, rle

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("a.jpg", "a.png", "sub/ä b.png", "sub/deeper/c.jpg")
BROKEN = "sub/broken.jpg"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two learnt classes, four pictures, a broken one, and a file that is none."""
    folder = tmp_path_factory.mktemp("predict")
    save_model(MSHNet(ModelConfig(backbone="resnet18")), str(folder / "model"), {"image_size_px": 65})
    segmenter = Segmenter.from_checkpoint(folder / "model", device="cpu")
    for number, name in enumerate(("disc", "star")):
        pixels, placed = draw_scene(np.random.default_rng(number), [number], 96)
        support = segmenter.learn(name, [pixels], [placed[0].visible])
        # An untrained network hardly ever gives 0.5.
        replace(support, threshold=0.45 + 0.02 * number).save(folder / f"{name}.safetensors")
    for number, name in enumerate(NAMES):
        pixels, _ = draw_scene(np.random.default_rng(10 + number), [number, 5], 90 + number)
        (folder / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "pictures" / name)
    (folder / "pictures" / BROKEN).write_bytes((folder / "pictures/a.jpg").read_bytes()[:700])
    (folder / "pictures/notes.txt").write_text("no picture")
    return folder


def settings(folder: Path, out: str | Path, queries: str | Path = "") -> Prediction:
    learned = (str(folder / "disc.safetensors"), str(folder / "star.safetensors"))
    return Prediction(
        model=str(folder / "model"),
        learned=learned,
        queries=str(queries or folder / "pictures"),
        out=str(out),
        images_per_part=2,
        overlay=True,
    )


def labels_of(folder: Path, *pictures: Path) -> list[np.ndarray]:
    """By the segmenter itself, on one thread as a task has it: sums are rounded in another order on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        segmenter = Segmenter.from_checkpoint(folder / "model", device="cpu")
        for name in ("disc", "star"):
            segmenter.add(SupportSet.load(folder / f"{name}.safetensors"))
        return [segmenter(picture).labels for picture in pictures]
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, np.ndarray]:
    """Labels of each picture."""
    return dict(zip(NAMES, labels_of(folder, *(folder / "pictures" / name for name in NAMES)), strict=True))


@pytest.fixture(scope="module")
def predicted(folder: Path) -> Path:
    out = folder / "out"
    summary = predict(settings(folder, out))
    assert summary == {"predictions": str(out / MANIFEST), "pictures": 5, "parts": 3, "unreadable": 1}
    return out


def check(table: pa.Table, expected: dict[str, np.ndarray]) -> None:
    """Every row is of the labels that are expected."""
    rows = table.to_pylist()
    readable = [row for row in rows if not row["error"]]
    assert sorted((row["query"], row["class"]) for row in readable) == sorted(
        (name, label) for name in expected for label in ("disc", "star")
    )
    for row in readable:
        mask = expected[row["query"]] == ("disc", "star").index(row["class"]) + 1
        counts = {"size": [row["height"], row["width"]], "counts": row["rle"]}
        np.testing.assert_array_equal(coco.decode(counts).astype(bool), mask)
        assert row["pixels"] == mask.sum()
        assert (row["mean_probability"] is None) == (not mask.any())
    (broken,) = (row for row in rows if row["error"])
    assert broken["query"] == BROKEN
    assert "cannot read 'sub/broken.jpg' as a picture" in broken["error"]
    assert broken["class"] is None


def test_masks_tables_and_overlays_are_the_segmenters(
    folder: Path, predicted: Path, expected: dict[str, np.ndarray]
) -> None:
    assert any(labels.any() for labels in expected.values())
    check(read_predictions(str(predicted)), expected)
    for name, labels in expected.items():
        np.testing.assert_array_equal(np.array(Image.open(predicted / "masks" / f"{name}.png")), labels)
        overlay = Image.open(predicted / "overlays" / f"{name}.png")
        assert overlay.width == labels.shape[1]
    manifest = json.loads((predicted / MANIFEST).read_text())
    assert manifest["classes"] == {"disc": 1, "star": 2}
    assert list(manifest["unreadable"]) == [BROKEN]


def test_only_what_is_missing_or_changed_is_done(
    folder: Path, predicted: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(folder / "pictures", pictures)  # copies keep the time of change
    shutil.copytree(predicted, out)
    again = settings(folder, out, pictures)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert predict(replace(again, dry_run=True)) == {"done": 5, "run": [], "unreadable": 0}
    assert predict(again)["parts"] == 3

    (lost,) = (path for path in (out / PARTS).glob("00000-*.json"))  # as if it had been stopped in this part
    redone = {query[0] for query in json.loads(lost.read_text())["queries"]}
    lost.unlink()
    Image.open(pictures / "sub/deeper/c.jpg").transpose(Image.Transpose.ROTATE_180).save(pictures / "sub/deeper/c.jpg")
    Image.open(pictures / "a.png").save(pictures / "new.png")
    assert predict(again)["unreadable"] == 1
    written = [path for path in (out / "masks").rglob("*.png") if before.get(path) != path.stat().st_mtime_ns]
    changed = {path.relative_to(out / "masks").as_posix().removesuffix(".png") for path in written}
    assert changed == redone | {"sub/deeper/c.jpg", "new.png"}
    table = read_predictions(str(out))
    (turned,) = labels_of(folder, pictures / "sub/deeper/c.jpg")
    check(table, {**expected, "new.png": expected["a.png"], "sub/deeper/c.jpg": turned})


def test_a_damaged_table_is_named(predicted: Path, tmp_path: Path) -> None:
    shutil.copytree(predicted, tmp_path / "out")
    part = next((tmp_path / "out" / PARTS).glob("*.arrow"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(InputError, match=part.name):
        read_predictions(str(tmp_path / "out"))
    with pytest.raises(InputError, match="expected a finished prediction"):
        read_predictions(str(tmp_path))


def test_results_of_other_settings_do_not_mix(folder: Path, predicted: Path) -> None:
    with pytest.raises(InputError, match=r"other threshold\); give another --out"):
        predict(replace(settings(folder, predicted), threshold=0.6))


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = predict(replace(settings(folder, tmp_path / "out"), dry_run=True))
    assert found == {"done": 0, "run": ["predict 1/3", "predict 2/3", "predict 3/3"], "unreadable": 0}
    assert "run   predict 3/3  (1 pictures)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_input_is_named_before_anything_starts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = settings(folder, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for wrong, message in (
        (replace(good, queries=str(tmp_path / "empty")), "no pictures under"),
        (replace(good, queries=good.out), "expected another place for results"),
        (replace(good, model=str(tmp_path / "nowhere")), "no model under"),
        (replace(good, learned=good.learned[:1] * 2), "a name of its own for each class, found 'disc' twice"),
    ):
        with pytest.raises(InputError, match=message):
            predict(wrong)
    save_model(MSHNet(ModelConfig(backbone="resnet18")), str(tmp_path / "larger"), {"image_size_px": 97})
    with pytest.raises(InputError, match="expected examples of 97 px"):
        predict(replace(good, model=str(tmp_path / "larger")))
    with pytest.raises(InputError, match="images_per_part and cpus_per_task must be 1 or more"):
        replace(good, images_per_part=0)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "m", "--learned", "x", "--queries", "q", "--out", "o", "--threshold", "2"])
    assert "threshold must be 0..1, got 2.0" in capsys.readouterr().err


def test_results_among_the_pictures_are_no_queries(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures/out/masks").mkdir(parents=True)
    shutil.copy(folder / "pictures/a.png", tmp_path / "pictures/out/masks/a.png.png")
    wanted = settings(folder, tmp_path / "pictures/out", tmp_path / "pictures")
    assert predict(replace(wanted, dry_run=True, images_per_part=1))["run"][-1] == "predict 5/5"


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_the_command_on_an_object_store(
    folder: Path, predicted: Path, expected: dict[str, np.ndarray], s3_folder: str
) -> None:
    fs, root = filesystem(s3_folder)
    fs.put(f"{folder}/pictures/", f"{root}/pictures/", recursive=True)
    flags = ["--model", str(folder / "model"), "--queries", f"{s3_folder}/pictures", "--out", f"{s3_folder}/out"]
    learned = [str(folder / f"{name}.safetensors") for name in ("disc", "star")]
    command = [sys.executable, str(REPOSITORY / "pipelines/predict.py"), *flags, "--images-per-part", "3"]
    done = subprocess.run([*command, "--learned", *learned], capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 1, done.stderr[-3000:]  # for the one that cannot be read
    summary = {"predictions": f"{s3_folder}/out/{MANIFEST}", "pictures": 5, "parts": 2, "unreadable": 1}
    assert json.loads(done.stdout) == summary, done.stderr[-3000:]
    assert f"{BROKEN}: cannot read" in done.stderr
    check(read_predictions(f"{s3_folder}/out"), expected)
    for name, labels in expected.items():
        data = fs.cat_file(f"{root}/out/masks/{name}.png")
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(data))), labels)
    assert fs.exists(f"{root}/out/{SETTINGS}")
    assert not fs.exists(f"{root}/out/overlays")
    again = predict(replace(settings(folder, f"{s3_folder}/out", f"{s3_folder}/pictures"), overlay=False))
    assert again == summary  # no part of it anew


def test_run_lengths_come_back() -> None:
    mask = np.random.default_rng(0).random((7, 5)) > 0.5
    np.testing.assert_array_equal(coco.decode({"size": [7, 5], "counts": rle(mask)}).astype(bool), mask)
