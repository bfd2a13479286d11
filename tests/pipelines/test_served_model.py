from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from pycocotools import mask as coco

from mshnet import ModelConfig, MSHNet, checkpoint
from mshnet.data.transforms import normalise
from mshnet.encoded import encode, run_lengths
from mshnet.errors import InputError
from pipelines.served_model import FewShotSegmenter, input_example
from pipelines.tracking import Tracker
from pipelines.tracking_registry import NewVersion, Registry
from tests.mshnet.data.test_hostile_data import bomb
from tests.pipelines.test_tracking_registry import CONDITIONS

SIDE = 65


@pytest.fixture(scope="module")
def model() -> MSHNet:
    return undecided()


def undecided() -> MSHNet:
    """Random weights, the head's bias set so that about half of `episode()`'s query is object."""
    torch.manual_seed(0)
    model = MSHNet(ModelConfig(backbone="resnet18")).eval()
    with torch.no_grad():
        logits = low_logits(model, *episode())[0]
        bias = model.relation.pyramid.head[-1].bias
        assert isinstance(bias, torch.Tensor)
        bias[1] -= (logits[1] - logits[0]).median()
    return model


@pytest.fixture(scope="module")
def folder(model: MSHNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    checkpoint.save_model(model, str(folder), {"image_size_px": SIDE})
    return folder


@pytest.fixture(scope="module")
def segmenter(folder: Path) -> FewShotSegmenter:
    return loaded(folder)


def decoded(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def episode(shots: int = 2) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    supports = [noise(70 + 10 * i, 50, 10 + i) for i in range(shots)]
    masks = [np.zeros(support.shape[:2], dtype=np.uint8) for support in supports]
    for mask in masks:
        mask[20:50, 10:30] = 255
    return noise(48, 80, 1), supports, masks


def frame(query: np.ndarray, supports: list[np.ndarray], masks: list[np.ndarray]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "query": [encode(query)],
            "supports": [json.dumps([encode(support) for support in supports])],
            "masks": [json.dumps([encode(mask) for mask in masks])],
        }
    )


def low_logits(model: MSHNet, query: np.ndarray, supports: list[np.ndarray], masks: list[np.ndarray]) -> torch.Tensor:
    """The network by hand: everything resized as in training."""

    def small(pixels: np.ndarray) -> torch.Tensor:
        resized = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        return normalise(torch.from_numpy(np.array(resized)).permute(2, 0, 1))

    def small_mask(mask: np.ndarray) -> torch.Tensor:
        rows = np.arange(SIDE) * mask.shape[0] // SIDE
        columns = np.arange(SIDE) * mask.shape[1] // SIDE
        return torch.from_numpy((mask[rows][:, columns] > 0).astype(np.float32))

    with torch.no_grad():
        prediction = model(
            small(query)[None],
            torch.stack([small(support) for support in supports])[None],
            torch.stack([small_mask(mask) for mask in masks])[None],
        )
    low: torch.Tensor = prediction.logits_low
    return low


def expected_mask(model: MSHNet, query: np.ndarray, supports: list[np.ndarray], masks: list[np.ndarray]) -> np.ndarray:
    """The argmax of the low logits resized to the query's own size."""
    low = low_logits(model, query, supports, masks)
    logits = torch.nn.functional.interpolate(low, size=query.shape[:2], mode="bilinear", align_corners=True)
    return np.asarray(logits[0].argmax(0).numpy() * 255)


def test_a_prediction_is_the_network_s_mask_at_the_query_s_own_size(segmenter: FewShotSegmenter, model: MSHNet) -> None:
    query, supports, masks = episode()
    out = segmenter.predict(None, frame(query, supports, masks))
    found = decoded(out["mask"][0])
    assert (found.shape, found.dtype, out.columns.tolist()) == ((48, 80), np.uint8, ["mask"])
    wanted = expected_mask(model, query, supports, masks)
    assert 0.2 < (wanted > 0).mean() < 0.8, "a mask worth comparing"
    np.testing.assert_array_equal(found, wanted)


def test_rows_are_independent_and_may_have_other_shots(segmenter: FewShotSegmenter) -> None:
    one, two = frame(*episode(1)), frame(*episode(3))
    both = segmenter.predict(None, pd.concat([one, two], ignore_index=True))["mask"].tolist()
    assert both == [segmenter.predict(None, each)["mask"][0] for each in (one, two)]


def test_the_registered_model_is_loaded_by_its_alias_and_predicts(
    folder: Path, model: MSHNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc
    from mlflow.tracking import _tracking_service

    monkeypatch.setattr(sys, "path", [*sys.path])  # MLflow prepends the model's code folder
    tracker = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "e")
    run = tracker.start_parent("cv", {}, {}, "key")
    registry, weights = Registry(tracker, "mshnet"), folder / checkpoint.WEIGHTS_FILE
    described = NewVersion(fold=0, miou=0.5, conditions=CONDITIONS, description="fold 0", tags={})
    version = registry.register(run, weights, checkpoint.read_config(str(folder)), described)
    assert registry.promote(version, alias="fold0")
    source = tracker._client().get_model_version_by_alias("mshnet", "fold0").source
    loaded: Any = mlflow.pyfunc.load_model(source)
    query, supports, masks = episode()
    found = decoded(loaded.predict(frame(query, supports, masks))["mask"][0])
    np.testing.assert_array_equal(found, expected_mask(model, query, supports, masks))
    answer = loaded.predict(frame(query, supports, masks), params={"output": "rle"})["mask"][0]
    np.testing.assert_array_equal(255 * coco.decode(json.loads(answer)), found)
    shown = decoded(loaded.predict(loaded.input_example)["mask"][0])
    assert shown.shape == decoded(input_example()["query"][0]).shape[:2]
    assert _tracking_service.utils._tracking_uri is None, "no process-wide tracking URI was set"
    with pytest.raises(Exception, match="supports"):  # the signature's own check
        loaded.predict(frame(query, supports, masks).drop(columns="supports"))


def changed(**columns: Any) -> pd.DataFrame:
    data = frame(*episode())
    for name, value in columns.items():
        data[name] = [value]
    return data


GOOD_MASK = encode(np.ones((70, 50), dtype=np.uint8))
EMPTY_MASK = encode(np.zeros((70, 50), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed().drop(columns=["masks", "query"]), "missing query, masks"),
        (changed().iloc[:0], "expected 1 to 16 rows, got 0"),
        (pd.concat([changed()] * 17), "expected 1 to 16 rows, got 17; send several requests"),
        (changed(query="%%%"), "row 0, query: expected base64 text"),
        (changed(query=None), "row 0, query: expected base64 text"),
        (changed(query=base64.b64encode(b"GIF89a").decode()), "row 0, query: expected a whole PNG or JPEG"),
        (changed(query=base64.b64encode(bomb(20_000, 20_000)).decode()), "row 0, query: expected a whole .* pixels"),
        (changed(query=base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0").decode()), "row 0, query: expected a whole PNG"),
        (changed(query="é"), "row 0, query: expected base64 text"),
        (changed(query=encode(noise(40, 40, 0))[:2000]), "row 0, query: expected a whole PNG or JPEG"),
        (changed(supports="not json"), r"row 0, supports: expected a JSON list"),
        (changed(supports="[]", masks="[]"), r"row 0, supports: expected a JSON list of one or more"),
        (changed(supports="[1, 2]"), r"row 0, supports\[0\]: expected base64 text, got int"),
        (changed(supports="[" * 100_000), r"row 0, supports: expected a JSON list"),
        (
            changed(query="A" * 30_000_000),
            "row 0, query: expected 20,000,000 bytes at most, got 22,500,000; send it sm",
        ),
        (changed(query=encode(np.zeros((5000, 5001), np.uint8))), "row 0, query: expected 25,000,000 pixels at most"),
        (
            changed(supports=json.dumps(["AA=="] * 51), masks=json.dumps(["AA=="] * 51)),
            "row 0: expected 50 supports at",
        ),
        (changed(masks=json.dumps([GOOD_MASK])), "one mask per support, got 2 supports and 1 masks"),
        (changed(masks=json.dumps([GOOD_MASK] * 2)), r"row 0, masks\[1\]: .* 50×70 px, its image 50×80 px"),
        (changed(masks=json.dumps([GOOD_MASK, encode(noise(80, 50, 0))])), r"row 0, masks\[1\]: .*colours"),
        (changed(masks=json.dumps([EMPTY_MASK] * 2)), r"row 0, masks\[0\]: expected an object in the mask, found none"),
        (changed(masks=json.dumps([{"size": [70, 50], "counts": "1"}] * 2)), r"row 0, masks\[0\]: "),
        (changed(masks=json.dumps([{"size": [70_000, 50_000], "counts": [1, 3_499_999_999]}] * 2)), r"row 0, masks\[0"),
        (changed(masks=json.dumps([{"size": "x"}, {}])), r"row 0, masks\[0\]: "),
    ],
)
def test_bad_input_is_named_by_row_and_column(segmenter: FewShotSegmenter, data: pd.DataFrame, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmenter.predict(None, data)


def test_a_jpeg_is_a_query_but_not_a_mask(segmenter: FewShotSegmenter) -> None:
    def jpeg(pixels: np.ndarray) -> str:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG")
        return base64.b64encode(file.getvalue()).decode()

    query, _, masks = episode()
    out = segmenter.predict(None, changed(query=jpeg(query)))
    assert decoded(out["mask"][0]).shape == (48, 80)
    with pytest.raises(ValueError, match=r"row 0, masks\[0\]: expected a PNG, got JPEG"):
        segmenter.predict(None, changed(masks=json.dumps([jpeg(mask) for mask in masks])))


def test_masks_may_be_run_lengths_and_so_may_the_answer(segmenter: FewShotSegmenter) -> None:
    query, supports, masks = episode()
    as_png = segmenter.predict(None, frame(query, supports, masks))["mask"][0]
    lengths = json.dumps([json.loads(run_lengths(mask > 0)) for mask in masks])
    assert segmenter.predict(None, changed(masks=lengths))["mask"][0] == as_png
    answer = segmenter.predict(None, changed(masks=lengths), {"output": "rle"})["mask"][0]
    np.testing.assert_array_equal(255 * coco.decode(json.loads(answer)), decoded(as_png))


def test_a_higher_threshold_gives_less(segmenter: FewShotSegmenter) -> None:
    def pixels(**params: Any) -> int:
        return int((decoded(segmenter.predict(None, changed(), params)["mask"][0]) > 0).sum())

    assert pixels(threshold=0.5) == pixels()
    assert pixels(threshold=0.0) == 48 * 80
    found = segmenter.segmenter(episode()[0], classes=(next(reversed(segmenter._kept)),)).probabilities[0]
    limit = float(np.quantile(found, 0.9))
    assert 0 < pixels(threshold=limit) == (found >= limit).sum() < pixels()
    for params, message in (({"output": "jpeg"}, "one of png, rle, got 'jpeg'"), ({"threshold": 1.5}, "0..1, got 1.5")):
        with pytest.raises(ValueError, match=message):
            segmenter.predict(None, changed(), params)


def test_examples_that_were_sent_before_are_not_computed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = frame(*episode(1)), frame(*episode(2))
    fresh = loaded(folder)
    first = fresh.predict(None, one)["mask"][0]
    assert len(fresh.segmenter.classes) == 1
    learned = []
    learn = fresh.segmenter.learn
    monkeypatch.setattr(fresh.segmenter, "learn", lambda name, *rest: (learned.append(name), learn(name, *rest)))
    assert fresh.predict(None, pd.concat([one, one]))["mask"].tolist() == [first, first]
    assert learned == []
    second = fresh.predict(None, other)["mask"][0]
    assert len(learned) == 1
    kept = sum(fresh.segmenter.memory_bytes(name) for name in fresh.segmenter.classes)

    monkeypatch.setenv("MSHNET_SERVE_KEPT_BYTES", str(kept - 1))
    small = loaded(folder)
    answers = [small.predict(None, each)["mask"][0] for each in (one, other, one, other)]
    assert answers == [first, second, first, second]
    assert len(small.segmenter.classes) == 1, "the other was forgotten"


def loaded(folder: Path) -> FewShotSegmenter:
    class Context:
        artifacts = {"model": str(folder)}  # noqa: RUF012

    segmenter = FewShotSegmenter()
    segmenter.load_context(Context())  # type: ignore[arg-type]
    return segmenter


def test_limits_are_set_by_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSHNET_SERVE_MAX_ROW_PIXELS", "10_000")
    with pytest.raises(ValueError, match="row 0: expected 10,000 pixels at most in all its pictures"):
        loaded(folder).predict(None, changed())
    monkeypatch.setenv("MSHNET_SERVE_MAX_ROWS", "0")
    with pytest.raises(InputError, match="1 or more in MSHNET_SERVE_MAX_ROWS, got '0'"):
        loaded(folder)


def test_a_picture_is_turned_upright_and_so_is_its_mask(segmenter: FewShotSegmenter) -> None:
    query, supports, masks = episode(1)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise shows it upright
    Image.fromarray(np.rot90(query)).save(file, format="PNG", exif=exif)
    turned = base64.b64encode(file.getvalue()).decode()
    expected = segmenter.predict(None, frame(query, supports, masks))["mask"][0]
    assert segmenter.predict(None, frame(query, supports, masks).assign(query=turned))["mask"][0] == expected


def test_a_failure_of_the_server_is_not_the_sender_s(
    segmenter: FewShotSegmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory at 0x7f")

    monkeypatch.setattr(segmenter, "segmenter", fails)
    with pytest.raises(MlflowException, match="the server failed") as caught:
        segmenter.predict(None, changed())
    assert caught.value.get_http_status_code() == 500
    assert "0x7f" not in str(caught.value), "what happened inside is for the log"
