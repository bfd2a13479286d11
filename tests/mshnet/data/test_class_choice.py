"""The class file: merging, leaving out, given folds, and what is said of a wrong one."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest

from mshnet.data.class_choice import ChosenClasses, ClassChoice, read_class_choice
from mshnet.errors import DatasetNotFoundError, InputError

NAMES = ("car", "person", "truck", "crack", "dog", "crack", "misc")


def test_ids_stay_contiguous() -> None:
    choice = ClassChoice(merge={"vehicle": ("truck", "car"), "crack": ("crack",)}, leave_out=("misc", "person"))
    assert choice.apply(NAMES) == ChosenClasses(names=("vehicle", "crack", "dog"), class_of=(0, None, 0, 1, 2, 1, None))


def test_no_choice_changes_nothing() -> None:
    names = ("b", "a", "c")
    assert ClassChoice().apply(names) == ChosenClasses(names=names, class_of=(0, 1, 2))
    assert read_class_choice("") == ClassChoice()


def test_several_of_one_name_may_all_be_left_out() -> None:
    assert ClassChoice(leave_out=("crack",)).apply(NAMES).names == ("car", "person", "truck", "dog", "misc")
    other = ClassChoice(merge={"damage": ("crack", "misc")}).apply(NAMES)
    assert other.class_of == (0, 1, 2, 3, 4, 3, 3)


def test_a_class_may_have_a_name_that_another_gives_up() -> None:
    swapped = ClassChoice(merge={"car": ("truck",), "truck": ("car",)}).apply(("car", "truck"))
    assert swapped == ChosenClasses(names=("truck", "car"), class_of=(0, 1))


def test_folds_are_of_the_remaining_classes() -> None:
    choice = ClassChoice(merge={"vehicle": ("truck", "car")}, folds=(("dog", "vehicle"), ("person",)))
    names = choice.apply(("car", "person", "truck", "dog")).names
    assert names == ("vehicle", "person", "dog")
    assert choice.fold_ids(names) == ((0, 2), (1,))
    assert ClassChoice().fold_ids(names) == ()
    with pytest.raises(InputError, match="expected 'folds' to name classes, found 'truk'; did you mean 'truck'"):
        ClassChoice(folds=(("truk",),)).fold_ids(("car", "truck"))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (ClassChoice(), r"""several named 'crack'; make them one .* \{"merge": \{"crack": \["crack"\]\}\}"""),
        (ClassChoice(merge={"x": ("crak",)}), "name classes of the data, found 'crak'; did you mean 'crack'?"),
        (ClassChoice(leave_out=("zzz",)), "found 'zzz'; there are car, person, truck"),
        (ClassChoice(merge={"dog": ("crack",)}), "found 'dog', which is a class of the data; add 'dog' to its parts"),
        (ClassChoice(leave_out=tuple(set(NAMES))), "all of them are left out; shorten 'leave_out'"),
    ],
)
def test_what_does_not_fit_the_data(choice: ClassChoice, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choice.apply(NAMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"expected JSON in '.*choice\.json', found none"),
        ("[]", "expected an object of merge, leave_out, folds in .*, found list"),
        ('{"merged": {}}', r"found \['merged'\]"),
        ('{"merge": []}', "expected in .* 'merge' to be an object"),
        ('{"folds": {}}', "'folds' a list of lists"),
        ('{"merge": {"a": "b"}}', """expected a list of class names in 'merge', found "b\""""),
        ('{"leave_out": [1]}', r"expected a list of class names in 'leave_out', found \[1\]"),
        ('{"folds": ["a"]}', """expected a list of class names in 'folds', found "a\""""),
        ('{"merge": {"a\\u001b": ["b"]}}', "class names of 1..100 characters that can be shown"),
        ('{"merge": {"a": []}}', "every class of 'merge' to name one class or more, found an empty one"),
        ('{"folds": [["a"], []]}', "every fold to name one class or more, found an empty one"),
        ('{"merge": {"a": ["b"]}, "leave_out": ["b"]}', "one place in 'merge' and 'leave_out', found 'b' in several"),
        ('{"folds": [["a"], ["a"]]}', "each class in one fold, found 'a' in several"),
    ],
)
def test_a_file_that_says_something_else(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "choice.json"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_class_choice(str(file))


def test_read_from_anywhere(tmp_path: Path) -> None:
    text = json.dumps({"merge": {"крыша": ["屋根"]}, "leave_out": ["b"], "folds": [["крыша"], ["c"]]})
    wanted = ClassChoice(merge={"крыша": ("屋根",)}, leave_out=("b",), folds=(("крыша",), ("c",)))
    (tmp_path / "c.json").write_text("\ufeff" + text)
    assert read_class_choice(str(tmp_path / "c.json")) == wanted
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/choice/c.json", text.encode())
    assert read_class_choice("memory://choice/c.json") == wanted
    memory.rm("/choice", recursive=True)
    with pytest.raises(DatasetNotFoundError, match=r"expected a class file at '.*none\.json', found none"):
        read_class_choice(str(tmp_path / "none.json"))
