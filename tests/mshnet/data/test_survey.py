"""What a survey counts, by hand, and on a source with files that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from mshnet.data.folds import Partition, published_partition
from mshnet.data.own import OwnData
from mshnet.data.shapes_own import write_coco_json
from mshnet.data.source import Source, open_source
from mshnet.data.splits import derive_split_lists, own_split_lists, without_novel
from mshnet.data.survey import fold_pairs, survey
from mshnet.data.survey_facts import FoldPairs, Problem, Survey, SurveyedImage
from mshnet.data.survey_walk import twice, walk
from mshnet.errors import InputError

NAMES = ("ant", "bee", "cow")


def image(image_id: str, pixels: Mapping[int, int], height: int = 10, width: int = 20, **more: object) -> SurveyedImage:
    return SurveyedImage(image_id=image_id, subset="train", height=height, width=width, pixels=pixels, **more)  # type: ignore[arg-type]


IMAGES = (
    image("a", {0: 100}),
    image("b", {0: 20, 1: 100}),
    image("c", {1: 60, 2: 4}),
    image("d", {1: 10}),
    image("e", {}, height=50, width=10),
    image("f", {2: 200}, notes=("turned",)),
    image("g", {0: 50}, notes=("turned",)),
)
PARTITION = Partition(novel=((0,), (1,)), names=NAMES, origin="by hand")


def pairs(fold: int, held_out: tuple[int, ...] = ()) -> FoldPairs:
    lists = own_split_lists(PARTITION, fold, [(i.image_id, i.subset, dict(i.pixels)) for i in IMAGES], 10)
    kept = without_novel(lists.train, {i.image_id: set(i.pixels) for i in IMAGES}, PARTITION.tested(fold))
    return fold_pairs(PARTITION, lists, kept, IMAGES, held_out)


def surveyed(**changes: object) -> Survey:
    settings = {"shot": 1, "min_object_px": 10, "image_size_px": 40, **changes}
    return survey("own", NAMES, IMAGES, [pairs(0), pairs(1, held_out=(2,))], **settings)  # type: ignore[arg-type]


def test_classes_are_counted_with_their_sizes() -> None:
    found = surveyed()
    ant, bee, cow = found.classes
    assert (ant.images, ant.large_enough, ant.alone, ant.pixels) == (3, 3, 2, 170)
    assert (bee.images, bee.large_enough, bee.alone, bee.pixels) == (3, 3, 1, 170)
    assert (cow.images, cow.large_enough, cow.alone, cow.pixels) == (2, 1, 1, 204)
    assert ant.share is not None
    assert ant.share.median == pytest.approx(0.25)
    # At 40 px a pixel of these 200 stands for 8: 20 are 160, fewer than the 256 of 16×16.
    assert (ant.tiny, bee.tiny, cow.tiny) == (1, 1, 1)
    assert ant.marked_all == pytest.approx((0.5 + 0.1 + 0.25) / 3)
    assert cow.marked_all == 1.0
    assert [c.name for c in found.small] == ["cow"]
    assert (found.images, found.without_objects, found.elongated) == (7, 1, 1)
    assert (found.smallest, found.largest) == ((10, 20), (50, 10))
    assert found.sizes == ((10, 20, 6), (50, 10, 1))
    assert found.together == ((3, 1, 0), (1, 3, 1), (0, 1, 2))
    assert [(r.what, r.images, r.first) for r in found.remarks] == [("turned", 2, "f")]


def test_a_class_that_no_fold_needs_is_not_small() -> None:
    found = survey("own", (*NAMES, "dodo"), IMAGES, [], shot=1, min_object_px=1, image_size_px=40, idle=(3,))
    assert found.idle == ("dodo",)
    assert [c.name for c in found.small] == []
    assert [c.name for c in survey("own", (*NAMES, "dodo"), IMAGES, [], shot=1, min_object_px=1,
                                   image_size_px=40).small] == ["dodo"]  # fmt: skip


def test_folds_say_what_remains_to_train_on() -> None:
    first, second = surveyed().folds
    assert (first.novel, first.training_classes, first.held_out) == (("ant",), ("bee", "cow"), ())
    # Of b, c, d (bee) and f (cow), b shows an ant.
    assert (first.base_pairs, first.removed_pairs, first.training_pairs) == (4, 1, 3)
    assert first.removed_by == {"ant": 1}
    assert (first.test_pairs, first.test_images) == (3, 3)
    assert first.marked_all == pytest.approx((0.5 + 0.1 + 0.25) / 3)
    assert [(few.name, few.images, few.role) for few in first.few] == [("cow", 1, "training")]
    assert (second.training_classes, second.held_out) == (("ant",), ("cow",))
    assert (second.training_pairs, second.training_images) == (2, 2)
    assert [(few.name, few.role) for few in second.few] == [("cow", "choosing the epoch")]


def test_lists_of_other_images_are_refused() -> None:
    lists = own_split_lists(PARTITION, 0, [("z", "train", {0: 50})], 10)
    with pytest.raises(InputError, match=r"found 1 missing \(first: z\)"):
        fold_pairs(PARTITION, lists, lists.train, IMAGES)


def test_nothing_to_count_is_an_error_that_names_the_first_problem() -> None:
    problem = Problem(where="a", what="cannot decode 'a'", stops=True)
    with pytest.raises(InputError, match="found none; the first problem: cannot decode 'a'"):
        survey("own", NAMES, [], [], [problem], shot=1, min_object_px=1, image_size_px=40)


def test_the_same_picture_under_several_names() -> None:
    images = [image(name, {0: 9}, digest=digest) for name, digest in (("a", "x"), ("b", "y"), ("c", "x"), ("d", ""))]
    (found,) = twice([*images, image("e", {}, digest="")])
    assert (found.where, found.stops) == ("a", False)
    assert found.what.startswith("the same picture as 'c'")


def split(source: Source) -> tuple[list[SurveyedImage], list[Problem]]:
    found = list(walk(source))
    return (
        [each for each in found if isinstance(each, SurveyedImage)],
        [each for each in found if isinstance(each, Problem)],
    )


def test_a_walk_measures_what_the_source_gives(voc_root: Path) -> None:
    source = open_source("shapes", str(voc_root))
    images, problems = split(source)
    records = list(source.records())
    assert not problems
    assert [i.image_id for i in images] == [r.image_id for r in records]
    labelled = source.load(records[4])
    assert images[4].pixels == {c: int(mask.sum()) for c, mask in labelled.masks.items()}
    assert (images[4].height, images[4].width) == labelled.image.shape[:2]
    assert len({i.digest for i in images}) == len(images)
    partition = published_partition("shapes")
    lists = derive_split_lists("shapes", 2, [(i.image_id, i.subset, dict(i.pixels)) for i in images], 40)
    kept = without_novel(lists.train, {i.image_id: set(i.pixels) for i in images}, partition.tested(2))
    found = survey(
        "shapes", source.class_names, images, [fold_pairs(partition, lists, kept, images)],
        shot=1, min_object_px=40, image_size_px=65,
    )  # fmt: skip
    assert found.folds[0].training_pairs == len(kept)
    assert found.folds[0].test_pairs == len(lists.val)


def test_all_problems_are_named_and_the_rest_is_counted(tmp_path: Path) -> None:
    write_coco_json(tmp_path, images=16, size_px=48, classes=4)
    labels = tmp_path / "annotations.json"
    content = json.loads(labels.read_text())
    files = sorted((tmp_path / "images").iterdir())
    files[2].write_bytes(files[2].read_bytes()[:200])
    files[3].unlink()
    first, second = [i["file_name"] for i in content["images"][4:] if i["height"] == i["width"] == 48][:2]
    (tmp_path / "images" / second).write_bytes((tmp_path / "images" / first).read_bytes())
    content["annotations"].append({**content["annotations"][0], "id": 10**6, "category_id": 999})
    content["annotations"].append({**content["annotations"][0], "id": 10**6 + 1, "segmentation": [[1, 2]]})
    labels.write_text(json.dumps(content))
    own = OwnData(images=str(tmp_path / "images"), annotations=str(labels))
    images, problems = split(open_source("coco-json", "", own))
    told = "\n".join(problem.what for problem in problems)
    assert files[2].name in {problem.where for problem in problems}
    for part in ("category 999", "annotation 1000001 has a polygon", f"'{files[3].name}'", "cannot decode"):
        assert part in told
    assert all(problem.stops for problem in problems)
    assert len(images) == 14
    assert [problem.where for problem in twice(images)] == [first]
