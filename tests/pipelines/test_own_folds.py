"""One's own data from files to drawn episodes: folds by rule and by file, and what is refused before training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mshnet.config import ImageFormat
from mshnet.data.own import OwnData
from mshnet.data.shapes_own import write_fss, write_label_png
from mshnet.data.splits import is_for_test
from mshnet.data.store.images import ImageStore
from mshnet.data.tables import read_pairs
from mshnet.errors import InputError
from pipelines import draw, own_folds, preprocess, scan, storage
from pipelines.config import CrossValidationConfig, EvaluationConfig, ValidationConfig
from pipelines.dag import Stage
from pipelines.drawn import PAIRS, DrawnTest, DrawnTraining
from pipelines.job import resolved
from tests.pipelines.drawn_fold import done

SHOWN = 100
"""Pixels of an object in these pictures."""
CLASSES = ("bolt", "nut", "screw", "washer", "spring", "pin", "gear")


def write_pictures(root: Path, pictures: Sequence[Sequence[str]], classes: Sequence[str] = CLASSES) -> None:
    """Grey pictures of 40 px in COCO's format; each shows a square of 10 px for each class that is named."""
    (root / "pictures").mkdir(parents=True)
    content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 10 * n + 3, "name": name} for n, name in enumerate(classes)]
    for number, names in enumerate(pictures):
        name = f"{number:03d}.png"
        Image.new("L", (40, 40), 5 * number % 256).save(root / "pictures" / name)
        content["images"].append({"id": number, "file_name": name, "height": 40, "width": 40})
        for place, shown in enumerate(names):
            x, y = 10 * (place % 4), 10 * (place // 4)
            corners = [x, y, x + 10, y, x + 10, y + 10, x, y + 10]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]), "image_id": number, "category_id": 10 * classes.index(shown) + 3,
                    "segmentation": [corners], "iscrowd": 0, "area": 100, "bbox": [x, y, 10, 10],
                }
            )  # fmt: skip
    (root / "annotations.json").write_text(json.dumps(content))


def config_of(root: Path, **own: Any) -> CrossValidationConfig:
    files = {"images": str(root / "pictures"), "annotations": str(root / "annotations.json"), "fold_count": 3, **own}
    return resolved(
        CrossValidationConfig(
            dataset="coco-json",
            source="",
            store=str(root / "store"),
            folds=tuple(range(files["fold_count"])),
            own=OwnData(**files),
            images=ImageFormat(image_size_px=33),
            min_object_px=SHOWN,
            validation=ValidationConfig(held_out_classes=0, validation_episodes=4),
            evaluation=EvaluationConfig(protocol="balanced", evaluation_episodes=12, threshold_episodes=6),
        )
    )


def stages(config: CrossValidationConfig, fold: int) -> tuple[Stage, Stage]:
    scan.check(config)
    scanned = scan.scan_source(config)
    sealed = preprocess.stages(config, scanned)
    return draw.training_stage(config, scanned, sealed, fold), draw.test_stage(config, scanned, sealed, fold)


def drawn(config: CrossValidationConfig, fold: int) -> tuple[DrawnTraining, DrawnTest]:
    training, test = stages(config, fold)
    return DrawnTraining.from_json(done(training)), DrawnTest.from_json(done(test))


def store_of(config: CrossValidationConfig, training: DrawnTraining) -> ImageStore:
    return ImageStore(storage.join(config.store, training.store))


def trained_images(config: CrossValidationConfig, training: DrawnTraining) -> set[str]:
    read = read_pairs(storage.join(config.store, training.folder, PAIRS), training.pairs_sha256)
    return {store_of(config, training).image_id(row) for row in read.images.tolist()}


def by_count(counts: Mapping[str, int]) -> list[list[str]]:
    return [[name] for name, count in counts.items() for _ in range(count)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven classes, some together in a picture, one category in none."""
    root = tmp_path_factory.mktemp("parts")
    pictures = [[CLASSES[n % 7], CLASSES[(n + 1) % 7]] if n % 3 == 0 else [CLASSES[n % 7]] for n in range(63)]
    write_pictures(root, pictures, (*CLASSES, "nothing"))
    return root


def test_every_class_is_tested_once_and_no_image_is_trained_and_tested_on(parts: Path) -> None:
    config = config_of(parts)
    novel: list[int] = []
    for fold in config.folds:
        training, test = drawn(config, fold)
        images = store_of(config, training)
        contents = {image_id: set(pixels) for image_id, _, pixels in images.contents()}
        tested = set(test.novel_classes)
        of_test = {image_id for image_id, shown in contents.items() if shown & tested}
        used = trained_images(config, training)
        assert used.isdisjoint(of_test)
        assert test.test_pairs == sum(len(shown & tested) for shown in contents.values())
        # All classes but the tested one take part: trained on, or held out for choosing the epoch.
        held_out = [name for name in CLASSES if f"({name})" in training.selection]
        assert len(held_out) == 1
        assert {*training.base_classes, *tested, CLASSES.index(held_out[0])} == set(range(7))
        assert test.protocol.split_lists == "rule: at least 100 px; 3 folds by frequency, seed 0"
        assert test.protocol.novel_removed
        novel += test.novel_classes
    assert sorted(novel) == list(range(7))


def test_all_layouts_reach_the_draw(tmp_path: Path) -> None:
    write_label_png(tmp_path / "labels", images=42, size_px=48)
    write_fss(tmp_path / "fss", images=28, size_px=48)
    base = replace(config_of(tmp_path), min_object_px=40)
    labels = replace(
        base,
        dataset="voc",
        own=OwnData(
            images=str(tmp_path / "labels/images"),
            masks=str(tmp_path / "labels/masks"),
            class_list=str(tmp_path / "labels/classes.txt"),
            fold_count=3,
        ),
    )
    fss = replace(base, dataset="fss", own=OwnData(images=str(tmp_path / "fss"), fold_count=3))
    for config in (resolved(labels), resolved(fss)):
        training, test = drawn(config, 1)
        assert len(test.novel_classes) == 2
        assert len(training.base_classes) == 4
        assert training.training_pairs > 8


def test_training_on_images_with_novel_classes_divides_the_images(parts: Path) -> None:
    config = replace(config_of(parts), remove_novel="no")
    training, test = drawn(config, 0)
    used = trained_images(config, training)
    assert not any(is_for_test(image_id) for image_id in used)
    contents = store_of(config, training).contents()
    tested = set(test.novel_classes)
    assert test.test_pairs == sum(len(tested & set(px)) for image_id, _, px in contents if is_for_test(image_id))
    shown = {image_id: set(px) for image_id, _, px in contents}
    assert any(shown[image_id] & tested for image_id in used)
    assert training.removed_pairs == 0
    assert "a third of the images for the test" in test.protocol.split_lists


def test_folds_by_file_and_merged_classes(parts: Path, tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    choice = {"merge": {"fastener": ["bolt", "screw"]}, "leave_out": ["pin"], "folds": [["gear", "nut"], ["fastener"]]}
    file.write_text(json.dumps(choice))
    config = config_of(parts, classes=str(file), fold_count=2)
    training, test = drawn(config, 1)
    names = store_of(config, training).manifest.class_names
    assert set(names) == {"fastener", "nut", "washer", "spring", "gear", "nothing"}
    assert [names[c] for c in test.novel_classes] == ["fastener"]
    assert test.protocol.split_lists.startswith("rule: at least 100 px; 2 folds given, ")
    # Neither washer nor spring is in a fold: every fold trains on them.
    others = {names[c] for c in training.base_classes} | {n for n in names if f"({n})" in training.selection}
    assert others == {"gear", "nut", "washer", "spring"}
    with pytest.raises(InputError, match=r"expected the 2 folds that '.*classes.json' gives, found --fold-count 4"):
        scan.check(replace(config, own=replace(config.own, fold_count=4), folds=(0,)))


def test_a_file_that_names_no_class_of_the_data(parts: Path, tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"folds": [["bolt"], ["nutt"]]}))
    with pytest.raises(InputError, match="'nutt'"):
        drawn(config_of(parts, classes=str(file), fold_count=2), 0)
    with pytest.raises(InputError, match="found 8 folds and 7 classes with an image; change --fold-count"):
        drawn(config_of(parts, fold_count=8), 0)


def test_folds_that_cannot_be_are_refused_before_a_picture_is_read(parts: Path, tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"folds": [["bolt"], ["nutt"]]}))
    with pytest.raises(InputError, match="'nutt'"):
        own_folds.check_classes(config_of(parts, classes=str(file), fold_count=2), CLASSES)
    with pytest.raises(InputError, match="found 8 folds and 7 classes"):
        own_folds.check_classes(config_of(parts, fold_count=8), CLASSES)
    own_folds.check_classes(config_of(parts), CLASSES)


def test_the_folds_are_part_of_the_key_of_what_is_drawn(parts: Path, tmp_path: Path) -> None:
    def keys(config: CrossValidationConfig) -> tuple[str, str]:
        training, test = stages(config, 0)
        return training.key, test.key

    first = keys(config_of(parts))
    assert keys(config_of(parts, data_name="parts")) == first
    others = [keys(config_of(parts, fold_seed=1)), keys(config_of(parts, fold_count=2))]
    for number, folds in enumerate(([["bolt"], ["nut"]], [["bolt"], ["gear"]], [["gear"], ["bolt"]])):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps({"folds": folds}))
        others.append(keys(config_of(parts, classes=str(file), fold_count=2)))
    assert len({first, *others}) == 6
    assert own_folds.key(CrossValidationConfig(dataset="pascal")) == []


FEW = {"bolt": 6, "nut": 6, "screw": 6, "washer": 1, "spring": 5, "pin": 2, "gear": 5}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("few")
    write_pictures(root, by_count(FEW))
    return root


def test_small_classes_are_named_all_at_once_with_the_ways_out(few: Path, tmp_path: Path) -> None:
    config = replace(config_of(few), shot=2)
    for fold in config.folds:
        with pytest.raises(
            InputError,
            match=r"expected 3 images or more .* fewer of washer \(1\), pin \(2\); .*--skip-small-classes.*--classes",
        ):
            drawn(config, fold)
    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"merge": {"small": ["washer", "pin"]}}))
    merged = replace(config_of(few, classes=str(file)), shot=2)
    assert sorted(c for fold in merged.folds for c in drawn(merged, fold)[1].novel_classes) == list(range(6))


def test_small_classes_are_left_out_by_name_and_never_held_out(few: Path) -> None:
    config = replace(config_of(few), shot=2, skip_small_classes=True)
    left_out: list[str] = []
    tested: list[int] = []
    for fold in config.folds:
        training, test = drawn(config, fold)
        left_out += test.left_out
        tested += test.novel_classes
        small = {"washer", "pin"}
        assert set(training.left_out) == small - set(test.left_out)
        assert not any(name in training.selection for name in small)
        if test.left_out:
            assert " classes" in test.protocol.label
    assert sorted(left_out) == ["pin", "washer"]
    assert sorted(tested) == [0, 1, 2, 4, 6]


def test_a_class_that_only_occurs_beside_a_novel_one_cannot_be_trained_on(tmp_path: Path) -> None:
    pictures = [["bolt", "nut"]] * 4 + [["screw"]] * 4 + [["gear"]] * 4 + [["pin"]] * 4
    write_pictures(tmp_path, pictures, ("bolt", "nut", "screw", "gear", "pin"))
    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"folds": [["bolt"], ["screw"]]}))
    config = config_of(tmp_path, classes=str(file), fold_count=2)
    with pytest.raises(
        InputError, match=r"fold 0: 4 of 16 training pairs are left out.*too few: nut \(0\).*--remove-nov"
    ):
        drawn(config, 0)
    assert drawn(config, 1)[0].training_pairs > 0
    together = tmp_path / "together.json"
    together.write_text(json.dumps({"folds": [["bolt", "nut"], ["screw"]]}))
    assert drawn(config_of(tmp_path, classes=str(together), fold_count=2), 0)[1].novel_classes == (0, 1)


def test_what_is_missing_is_said_before_anything_is_read(parts: Path) -> None:
    with pytest.raises(InputError, match="--images"):
        scan.check(resolved(CrossValidationConfig(
            dataset="coco-json", source="", evaluation=EvaluationConfig(protocol="balanced")
        )))  # fmt: skip
    config, nowhere = config_of(parts), str(parts / "nowhere")
    for own in (
        replace(config.own, annotations=nowhere),
        replace(config.own, classes=nowhere),
        replace(config.own, images=nowhere),
    ):
        with pytest.raises(InputError, match="nowhere"):
            scan.check(resolved(replace(config, own=own)))
