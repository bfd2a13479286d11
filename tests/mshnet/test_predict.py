"""Segmenting without ground truth: the evaluation's masks, whatever the form of the input, the number of supports."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from mshnet import checkpoint, memory
from mshnet.backbone import Features, InferenceBackbone
from mshnet.config import Architecture
from mshnet.data.batches import EpisodeLoader
from mshnet.data.episodes import Episode
from mshnet.data.source import LabelledImage
from mshnet.engine import network_predictor
from mshnet.errors import InputError
from mshnet.features import FeatureCache
from mshnet.predict import Segmenter, SupportSet
from mshnet.segmented import Segmented
from tests.mshnet.data.stored import write_store
from tests.mshnet.segmenters import SIDE_PX, picture, segmenter, undecided_model
from tests.tolerances import BFLOAT16_PREDICTION, SAME_PREDICTION

PICTURES = [picture(seed, 50 + 3 * seed, 70 + seed) for seed in range(5)]
IMAGES = [image for image, _ in PICTURES]
MASKS = [mask for _, mask in PICTURES]
QUERY = picture(11, 61, 47)[0]


@pytest.fixture(scope="module")
def learnt() -> Segmenter:
    """Knows `two` and `one`. Read only."""
    made = segmenter()
    made.learn("two", IMAGES[:2], MASKS[:2])
    made.learn("one", IMAGES[2:3], MASKS[2:3])
    return made


@pytest.mark.parametrize("architecture", ["mshnet", "panet"])
@pytest.mark.parametrize("shots", [1, 3])
def test_masks_are_those_of_the_evaluation(architecture: Architecture, shots: int, tmp_path: Path) -> None:
    """Through a store with lossless pictures, its loader, the feature cache and the evaluation's predictor."""
    model = undecided_model(architecture)
    labelled = {f"{i}": LabelledImage(image=x, masks={0: y}, ignore=None) for i, (x, y) in enumerate(PICTURES)}
    store = write_store(str(tmp_path), labelled)
    features = FeatureCache(InferenceBackbone(model.backbone), 0, image_by_image=True)
    (batch,) = EpisodeLoader(store).batches([Episode(4, tuple(range(shots)), 0)], [[0]])
    with torch.no_grad():
        judged = network_predictor(model.relation)(*features.of(batch), batch).masks(store.size_px(4))[0].numpy()
    user = Segmenter(model, SIDE_PX, device="cpu")
    user.learn("it", IMAGES[:shots], MASKS[:shots])
    assert 0.02 < judged.mean() < 0.98  # else it would show little
    np.testing.assert_array_equal(user(IMAGES[4]).mask, judged)


@pytest.mark.parametrize("architecture", ["mshnet", "panet"])
def test_copies_of_a_support_are_as_one(architecture: Architecture) -> None:
    user = segmenter(architecture)
    user.learn("1", IMAGES[:1], MASKS[:1])
    alone = user(QUERY, classes=["1"])
    for copies in (2, 9, 50):  # 9 and 50 do not fit one batch of shots
        user.learn("many", IMAGES[:1] * copies, MASKS[:1] * copies)
        many = user(QUERY, classes=["many"])
        assert np.abs(many.probabilities - alone.probabilities).max() < SAME_PREDICTION.bound
        np.testing.assert_array_equal(many.mask, alone.mask)


def test_shots_in_several_batches_are_their_mean(learnt: Segmenter) -> None:
    """Eleven different supports by the relation in one call, with the shots together, and as they are kept."""
    pictures = [picture(seed) for seed in range(11)]
    support = learnt.learn("eleven", [x for x, _ in pictures], [y for _, y in pictures])
    network = learnt.network
    with torch.inference_mode():
        query, kept = network.features(network.square(QUERY)[None]), network.features(support.images)
        expected = network.relation(query, kept, support.masks[None].float()).logits_low
        found = network.logits(query, learnt._learned["eleven"].supports)
    learnt.forget("eleven")
    assert (found - expected).abs().max() < SAME_PREDICTION.bound * expected.abs().max()


def test_a_relation_that_remembers_nothing_is_given_whole_features() -> None:
    """As a third architecture would be, which has only `forward`."""
    model = undecided_model()
    remembering = Segmenter(model, SIDE_PX, device="cpu")
    whole = Segmenter(model, SIDE_PX, device="cpu")
    whole.network.relation = _Forward(model.relation)
    assert isinstance(model.relation, memory.Remembering)
    assert not isinstance(whole.network.relation, memory.Remembering)
    for user in (remembering, whole):
        user.learn("it", IMAGES[:3], MASKS[:3])
    assert np.abs(remembering(QUERY).probabilities - whole(QUERY).probabilities).max() < SAME_PREDICTION.bound
    assert remembering.memory_bytes("it") < 0.6 * whole.memory_bytes("it")


class _Forward(torch.nn.Module):
    def __init__(self, relation: torch.nn.Module) -> None:
        super().__init__()
        self.relation = relation

    def forward(self, query: Features, support: Features, masks: torch.Tensor) -> object:
        return self.relation(query, support, masks)


def test_what_is_kept_follows_the_object_not_the_picture(learnt: Segmenter) -> None:
    small, large = np.zeros((65, 65), bool), np.zeros((65, 65), bool)
    small[20:30, 20:30] = True
    large[5:60, 5:60] = True
    image = picture(0, 65, 65)[0]
    user = segmenter()
    user.learn("small", [image], [small])
    user.learn("large", [image], [large])
    assert 8 * user.memory_bytes("small") < user.memory_bytes("large")
    one = segmenter("panet")
    one.learn("large", [image], [large])
    assert one.memory_bytes("large") == 2 * 256 * 4


def test_forms_of_pictures_and_masks(learnt: Segmenter, tmp_path: Path) -> None:
    """Files, PIL, arrays, tensors; PNG, run lengths, polygons: the same pixels give the same examples."""
    image, mask = IMAGES[0], np.zeros(MASKS[0].shape, bool)
    mask[10:31, 20:51] = True
    Image.fromarray(image).save(tmp_path / "ä b.png")
    Image.fromarray((mask * 7).astype(np.uint8)).save(tmp_path / "mask.png")
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    images = [tmp_path / "ä b.png", str(tmp_path / "ä b.png"), Image.fromarray(image), image]
    images.append(torch.from_numpy(image).permute(2, 0, 1))
    masks = [tmp_path / "mask.png", Image.fromarray(mask), torch.from_numpy(mask), mask.astype(np.int64), rle]
    user = segmenter()
    learned = user.learn("it", images, masks)
    for i in range(1, len(images)):
        assert torch.equal(learned.images[i], learned.images[0])
        assert torch.equal(learned.masks[i], learned.masks[0])
    polygon = user.learn("it", [image], [[[20, 10, 51, 10, 51, 31, 20, 31]]])
    assert (polygon.masks[0] != learned.masks[0]).float().mean() < 0.02
    results = [user(form).probabilities for form in images]
    assert all(np.array_equal(result, results[0]) for result in results)
    grey = image[..., 0]
    np.testing.assert_array_equal(user(grey).probabilities, user(np.repeat(grey[..., None], 3, 2)).probabilities)


def test_a_file_is_turned_upright(learnt: Segmenter, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(QUERY).save(tmp_path / "turned.png", exif=exif)
    found = learnt(tmp_path / "turned.png")
    assert found.mask.shape == QUERY.shape[1::-1]
    np.testing.assert_array_equal(found.mask, learnt(np.ascontiguousarray(np.rot90(QUERY, -1))).mask)


def test_several_classes_and_batches(learnt: Segmenter) -> None:
    assert learnt.classes == ("two", "one")
    both = learnt(QUERY)
    assert both.classes == ("two", "one")
    for i, name in enumerate(both.classes):
        np.testing.assert_array_equal(both.probabilities[i], learnt(QUERY, classes=[name]).probabilities[0])
    queries = [QUERY, *IMAGES]
    together = list(learnt.batch(iter(queries), batch_size=4, classes=["one"]))
    assert len(together) == len(queries)
    for query, found in zip(queries, together, strict=True):
        np.testing.assert_array_equal(found.probabilities, learnt(query, classes=["one"]).probabilities)
    assert list(learnt.batch([])) == []


def test_the_background_rule() -> None:
    """The most probable of the classes at or above their thresholds; of equal ones the first; else background."""
    a = np.array([[0.9, 0.6, 0.4, 0.7, 0.69, 0.8]], np.float32)
    b = np.array([[0.8, 0.7, 0.3, 0.7, 0.50, 0.9]], np.float32)
    found = Segmented(("a", "b"), np.stack([a, b]), (0.7, 0.65))
    np.testing.assert_array_equal(found.labels, np.array([[1, 2, 0, 1, 0, 2]], np.uint16))
    np.testing.assert_array_equal(found.mask, [[True, True, False, True, False, True]])
    np.testing.assert_array_equal(found.mask_of("b"), [[False, True, False, False, False, True]])
    with pytest.raises(InputError, match="a, b"):
        found.mask_of("c")


def test_another_model_folder_and_precision(learnt: Segmenter, tmp_path: Path) -> None:
    model = undecided_model()
    checkpoint.save_model(model, str(tmp_path), {"image_size_px": SIDE_PX})
    again = Segmenter.open(tmp_path, device="cpu")
    assert again.fingerprint == learnt.fingerprint
    again.learn("one", IMAGES[2:3], MASKS[2:3])
    exact = again(QUERY).probabilities
    np.testing.assert_array_equal(exact, learnt(QUERY, classes=["one"]).probabilities)
    rough = Segmenter.from_checkpoint(tmp_path, device="cpu", precision="bfloat16")
    rough.learn("one", IMAGES[2:3], MASKS[2:3])
    assert 0 < np.abs(rough(QUERY).probabilities - exact).mean() < BFLOAT16_PREDICTION.bound
    checkpoint.save_model(model, str(tmp_path), {})
    with pytest.raises(InputError, match="image_size_px"):
        Segmenter.from_checkpoint(tmp_path)


def test_calibration_is_the_best_threshold_by_the_others(learnt: Segmenter) -> None:
    user = segmenter()
    support = user.learn("it", IMAGES[:3], MASKS[:3], calibrate=True)
    counts = np.zeros((2, 99))
    for i in range(3):
        others = [j for j in range(3) if j != i]
        alone = segmenter()
        alone.learn("it", [IMAGES[j] for j in others], [MASKS[j] for j in others])
        square = support.images[i].permute(1, 2, 0).numpy()  # judged as the network sees it
        found, truth = alone(square).probabilities[0], support.masks[i].numpy() == 1
        for t in range(99):
            mask = found >= np.float32((t + 1) / 100)
            counts[:, t] += (mask & truth).sum(), (mask | truth).sum()
    iou = counts[0] / counts[1]
    assert iou[round(100 * support.threshold) - 1] == iou.max()
    assert user(QUERY).thresholds == (support.threshold,)
    with pytest.raises(InputError, match="2 examples"):
        user.learn("it", IMAGES[:1], MASKS[:1], calibrate=True)


def test_a_support_set_is_a_file(learnt: Segmenter, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    user = segmenter()
    support = user.learn("Kratzer ü", IMAGES[:2], MASKS[:2], calibrate=True)
    support.save(tmp_path / "it.safetensors")
    loaded = SupportSet.load(tmp_path / "it.safetensors")
    assert (loaded.name, loaded.threshold, loaded.model) == (support.name, support.threshold, user.fingerprint)
    assert torch.equal(loaded.images, support.images)
    assert torch.equal(loaded.masks, support.masks)
    assert loaded.object_shares == pytest.approx((MASKS[0].mean(), MASKS[1].mean()), abs=0.02)
    same, other = segmenter(), segmenter("panet")
    same.add(loaded)
    np.testing.assert_array_equal(same(QUERY).probabilities, user(QUERY).probabilities)
    assert same(QUERY).thresholds == (support.threshold,)
    moved = SupportSet(loaded.name, loaded.images, loaded.masks, 0.31, loaded.model)
    with caplog.at_level(logging.WARNING):
        other.add(moved)
    assert other(QUERY).thresholds == (0.5,)
    assert "another model" in caplog.text
    with pytest.raises(InputError, match="64 px"):
        user.add(
            SupportSet("it", torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.ones(1, 64, 64, dtype=torch.uint8))
        )


@pytest.mark.parametrize("damage", ["cut", "text", "weights", "sizes"])
def test_other_files_are_no_support_sets(damage: str, learnt: Segmenter, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    SupportSet("it", torch.zeros(1, 3, 40, 40, dtype=torch.uint8), torch.ones(1, 40, 40, dtype=torch.uint8)).save(path)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-100])
    elif damage == "text":
        path.write_text("no tensors")
    elif damage == "sizes":
        path.write_bytes(data.replace(b'\\"image_size_px\\": 40', b'\\"image_size_px\\": 41'))
        assert path.read_bytes() != data
    else:
        checkpoint.save_model(undecided_model("panet"), str(tmp_path), {})
        path = tmp_path / checkpoint.WEIGHTS_FILE
    with pytest.raises(InputError, match=path.name):
        SupportSet.load(path)


def test_what_cannot_be_used_is_named(learnt: Segmenter) -> None:
    image, mask = PICTURES[0]
    tiny = np.zeros((2000, 40), bool)
    tiny[3, 3] = True
    for images, masks, named in [
        ([], [], "one or more images"),
        ([image], [mask, mask], "1 images and 2 masks"),
        ([image, image], [mask, mask[1:]], "example 2"),
        ([image], [np.zeros_like(mask)], "example 1"),
        ([image.astype(np.float32)], [mask], "float32"),
        ([image], [mask.astype(np.float32)], "float32"),
        (["absent.png"], [mask], "absent.png"),
        ([np.zeros((2000, 40, 3), np.uint8)], [tiny], "vanishes"),
    ]:
        with pytest.raises(InputError, match=named):
            learnt.learn("it", images, masks)
    assert learnt.classes == ("two", "one")
    for call, named in [
        (lambda: learnt(QUERY, classes=["three"]), "two, one.*three"),
        (lambda: learnt(QUERY, classes="two"), "sequence"),
        (lambda: learnt(QUERY, tile_px=8), "tile_px"),
        (lambda: learnt(QUERY, tile_px=40, overlap=0.9), "overlap"),
        (lambda: learnt.batch([QUERY], batch_size=0), "batch_size"),
        (lambda: segmenter()(QUERY), "learn"),
        (lambda: segmenter(device="cuda:99"), "cuda:99"),
        (lambda: segmenter(device="gpu"), "device must be"),
        (lambda: Segmenter.from_registry("model"), "models:/NAME"),
    ]:
        with pytest.raises(InputError, match=named):
            call()


def test_a_class_is_replaced_and_forgotten() -> None:
    user = segmenter("panet")
    user.learn("a", IMAGES[:1], MASKS[:1])
    before = user(QUERY).probabilities
    user.learn("a", IMAGES[3:4], MASKS[3:4])
    assert user.classes == ("a",)
    assert not np.array_equal(user(QUERY).probabilities, before)
    user.forget("a")
    assert user.classes == ()
    with pytest.raises(InputError):
        user.forget("a")


def test_models_come_from_whichever_registry_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with an entry point, as an installed one has."""
    checkpoint.save_model(undecided_model("panet"), str(tmp_path / "kept"), {"image_size_px": SIDE_PX})
    info = tmp_path / "site" / "shelf-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shelf\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[mshnet.registries]\nshelf = shelf_registry\nbroken = absent_module\n")
    (tmp_path / "site" / "shelf_registry.py").write_text(
        "import shutil\n"
        "def download(address, folder, tracking_uri):\n"
        "    assert (address, tracking_uri) == ('shelf:/a@champion', 'sqlite:///x')\n"
        f"    return shutil.copytree({str(tmp_path / 'kept')!r}, folder / 'model')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    try:
        found = Segmenter.open("shelf:/a@champion", tracking_uri="sqlite:///x", device="cpu")
    finally:
        sys.modules.pop("shelf_registry", None)
    assert found.image_size_px == SIDE_PX
    for address in ("broken:/a", "nobody:/a"):
        with pytest.raises(InputError, match=r"pip install 'mshnet\[pipelines\]'"):
            Segmenter.open(address)
