"""What a survey's numbers are taken to mean: each rule where it speaks and where it is silent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from mshnet.data.class_choice import ClassChoice
from mshnet.data.expectations import class_choice, expectations, words
from mshnet.data.survey import survey
from mshnet.data.survey_facts import Few, FoldFacts, Problem, Survey, SurveyedImage

NAMES = tuple(f"class {c}" for c in range(12))


def survey_of(
    per_class: Mapping[int, int], pixels: int = 50_000, size: tuple[int, int] = (400, 500), shot: int = 1
) -> Survey:
    """Each class alone in so many images."""
    images = [
        SurveyedImage(image_id=f"{c}-{n}", subset="train", height=size[0], width=size[1], pixels={c: pixels})
        for c, count in per_class.items()
        for n in range(count)
    ]
    found = survey("own", NAMES, images, [], shot=shot, min_object_px=2048, image_size_px=473)
    return replace(found, folds=(FOLD,))


FOLD = FoldFacts(
    fold=0, novel=NAMES[:2], training_classes=NAMES[2:], held_out=(), base_pairs=5000, removed_pairs=0, removed_by={},
    training_pairs=5000, training_images=4000, test_pairs=300, test_images=300, few=(), marked_all=0.2,
)  # fmt: skip
PLENTY = dict.fromkeys(range(12), 12)


def said(found: Survey, **settings: bool) -> dict[str, str]:
    """Title to text, of all that is more than good to know."""
    return {each.title: each.text for each in expectations(found, **settings) if each.weight != "note"}


def test_of_a_decent_data_set_there_is_nothing_to_look_at() -> None:
    found = survey_of(PLENTY)
    assert said(found) == {}
    assert [each.title for each in expectations(found)] == [
        "5,000 training pairs a fold", "What costs nothing: about 20 % mIoU"
    ]  # fmt: skip


def test_what_stops_the_job_comes_first() -> None:
    few = (Few(name="class 9", images=1, role="training"),)
    found = replace(
        survey_of({**PLENTY, 3: 1, 4: 0}),
        folds=(replace(FOLD, few=few), replace(FOLD, fold=1, few=few)),
        problems=(Problem(where="a", what="broken", stops=True), Problem(where="b", what="double", stops=False)),
    )
    weights = [each.weight for each in expectations(found)]
    assert weights == sorted(weights, key=("stops", "look", "note").index)
    texts = said(found)
    assert "class 3 (1), class 4 (0)" in texts["2 classes have too few images"]
    assert "class 9 (training, folds 0, 1)" in texts["1 class is too small within a fold"]
    assert "1 image or file cannot be used" in texts
    assert "1 more problem" in texts
    left_out = expectations(found, skip_small_classes=True)
    assert [each.title for each in left_out if each.weight == "stops"] == ["1 image or file cannot be used"]


def test_advice_is_such_as_can_be_followed() -> None:
    found = replace(
        survey_of({**PLENTY, 3: 1}), folds=(replace(FOLD, training_classes=NAMES[:4], held_out=NAMES[5:8]),)
    )
    assert "--fold-count" in said(found)["Few classes to learn from: 4 in fold 0"]
    assert "now 3: --held-out-classes 1, or --selection last" in said(found)["Few classes to learn from: 4 in fold 0"]
    published = " ".join(said(found, own=False).values())
    assert "--skip-small-classes" in published
    assert "--fold-count" not in published
    assert "--classes" not in published.replace("--held-out-classes", "")


@pytest.mark.parametrize(("removed", "speaks"), [(1500, False), (1600, True)])
def test_removal_is_named_from_three_tenths_on(removed: int, speaks: bool) -> None:
    fold = replace(FOLD, removed_pairs=removed, removed_by={"class 1": removed, "class 0": 7})
    texts = said(replace(survey_of(PLENTY), folds=(fold,)))
    assert ("Fold 0 loses 32 % of its training pairs" in texts) == speaks
    if speaks:
        assert "class 1 (1,600), class 0 (7)" in texts["Fold 0 loses 32 % of its training pairs"]


def test_sizes_that_do_not_fit_are_named_with_the_flag() -> None:
    small = survey_of(PLENTY, pixels=1000, size=(100, 125))
    (text,) = [text for title, text in said(small).items() if "count as too small" in title]
    assert "--min-object-px 137" in text  # the share of a 500×375 picture that 2048 px are
    notes = {each.title: each.text for each in expectations(small)}
    assert "--image-size-px 113" in notes["The pictures are smaller than the training size of 473 px"]
    assert "12 classes are tiny at the training size" in said(survey_of(PLENTY, pixels=200))
    assert "12 classes cover nearly the whole picture" in said(survey_of(PLENTY, pixels=195_000))
    assert any("twice as long as wide" in title for title in said(survey_of(PLENTY, size=(200, 1000))))


def test_a_few_test_images_are_said_to_be_few() -> None:
    texts = said(survey_of({**PLENTY, 7: 9}))
    assert "class 7 (9)" in texts["1 class has few pictures to be tested on"]


def test_the_proposal_can_be_given_to_the_job() -> None:
    found = survey_of({**PLENTY, 3: 2, 4: 1, 5: 0}, shot=2)
    left_out = class_choice(found)
    assert left_out == {"merge": {}, "leave_out": ["class 3", "class 4", "class 5"]}
    merged = class_choice(found, "merge")
    assert merged == {"merge": {"other": ["class 3", "class 4"]}, "leave_out": ["class 5"]}
    choice = ClassChoice(merge={k: tuple(v) for k, v in merged["merge"].items()}, leave_out=tuple(merged["leave_out"]))
    assert set(choice.apply(NAMES).names) == {*NAMES, "other"} - {"class 3", "class 4", "class 5"}
    assert words(merged) == "One class 'other' of class 3, class 4; without class 5"
    assert words(class_choice(survey_of(PLENTY))) == "All classes as they are"


def test_classes_too_small_even_together_are_left_out() -> None:
    assert class_choice(survey_of({**PLENTY, 3: 1, 4: 1}, shot=2), "merge")["merge"] == {}
