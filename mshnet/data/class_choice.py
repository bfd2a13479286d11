"""Which of a data set's classes take part and under which name: one's own choice, from a small JSON file.

    {"merge": {"vehicle": ["car", "truck"]}, "leave_out": ["misc"], "folds": [["vehicle", "person"], ["dog"]]}

Every part may be absent. Loads neither torch nor numpy.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mshnet.data.filesystem import filesystem
from mshnet.errors import DatasetNotFoundError, InputError

PARTS = ("merge", "leave_out", "folds")


@dataclass(frozen=True, kw_only=True)
class ChosenClasses:
    """The classes that remain, ids 0..n-1, and what becomes of those that the data set has."""

    names: tuple[str, ...]
    """By class id."""
    class_of: tuple[int | None, ...]
    """By position in the data set's own list: the class id, None for one left out."""


@dataclass(frozen=True, kw_only=True)
class ClassChoice:
    """What a class file says; without any part: all classes as they are, folds by rule.

    Raises InputError where a class is named in two places.
    """

    merge: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """New name to the data set's names that become one class. Several classes of one name are named once."""
    leave_out: tuple[str, ...] = ()
    """Their objects are taken for background."""
    folds: tuple[tuple[str, ...], ...] = ()
    """Per fold the classes that it tests, by their names after merging; a class in no fold is trained on in all."""

    def __post_init__(self) -> None:
        used = [*(name for names in self.merge.values() for name in names), *self.leave_out]
        _refuse_repeated(used, "one place in 'merge' and 'leave_out'")
        _refuse_repeated([name for names in self.folds for name in names], "one fold")
        for what, parts in (("class of 'merge'", self.merge.values()), ("fold", self.folds)):
            if not all(parts):
                raise InputError(f"expected every {what} to name one class or more, found an empty one; remove it")

    def apply(self, names: Sequence[str]) -> ChosenClasses:
        """What becomes of a data set's classes, given their names in its own order.

        A merged class stands where its first part stood. Raises InputError for two classes of one name that are not
        merged, for names that the data set does not have, and where nothing remains.
        """
        self._check_known(names)
        new = {old: name for name, parts in self.merge.items() for old in parts}
        self._check_distinct(names, new)
        ids: dict[str, int] = {}
        class_of: list[int | None] = []
        for name in names:
            final = new.get(name, name)
            class_of.append(None if name in self.leave_out else ids.setdefault(final, len(ids)))
        if not ids:
            raise InputError("expected classes to remain, found none: all of them are left out; shorten 'leave_out'")
        return ChosenClasses(names=tuple(ids), class_of=tuple(class_of))

    def fold_ids(self, names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The given folds as class ids, ascending; `names` are those that `apply` gave. None given: no fold."""
        ids = {name: i for i, name in enumerate(names)}
        unknown = [name for fold in self.folds for name in fold if name not in ids]
        if unknown:
            raise InputError(f"expected 'folds' to name classes, found {_unknown(unknown, names)}")
        return tuple(tuple(sorted(ids[name] for name in fold)) for fold in self.folds)

    def _check_known(self, names: Sequence[str]) -> None:
        used = [*(old for parts in self.merge.values() for old in parts), *self.leave_out]
        if unknown := [name for name in used if name not in names]:
            raise InputError(
                f"expected 'merge' and 'leave_out' to name classes of the data, found {_unknown(unknown, names)}"
            )

    def _check_distinct(self, names: Sequence[str], new: Mapping[str, str]) -> None:
        twice = sorted(n for n, times in Counter(names).items() if times > 1 and n not in {*new, *self.leave_out})
        if twice:
            example = json.dumps({"merge": {twice[0]: [twice[0]]}}, ensure_ascii=False)
            raise InputError(
                f"expected one class of each name, found several named {', '.join(map(repr, twice))}; "
                f"make them one with --classes FILE, in it {example}, or rename them"
            )
        stays = {name for name in names if name not in new and name not in self.leave_out}
        if both := sorted(stays & set(self.merge)):
            raise InputError(
                f"expected a new name for merged classes, found {both[0]!r}, which is a class of the data; "
                f"add {both[0]!r} to its parts or give another name"
            )


def read_class_choice(uri: str) -> ClassChoice:
    """The choice in a JSON file at a path or URI; for an empty one the choice that changes nothing.

    Raises DatasetNotFoundError where there is none, InputError where it says something else than a choice.
    """
    if not uri:
        return ClassChoice()
    fs, path = filesystem(uri)
    try:
        content = json.loads(bytes(fs.cat_file(path)).decode("utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DatasetNotFoundError(f"expected a class file at {uri!r}, found none") from error
    except ValueError as error:
        raise InputError(f"expected JSON in {uri!r}, found none ({error})") from error
    if not isinstance(content, dict) or set(content) - set(PARTS):
        found = sorted(set(content) - set(PARTS)) if isinstance(content, dict) else type(content).__name__
        raise InputError(f"expected an object of {', '.join(PARTS)} in {uri!r}, found {found}")
    merge, folds = content.get("merge", {}), content.get("folds", [])
    if not isinstance(merge, dict) or not isinstance(folds, list):
        raise InputError(f"expected in {uri!r} 'merge' to be an object and 'folds' a list of lists of class names")
    try:
        return ClassChoice(
            merge={_name(new, "merge"): _names(old, "merge") for new, old in merge.items()},
            leave_out=_names(content.get("leave_out", []), "leave_out"),
            folds=tuple(_names(fold, "folds") for fold in folds),
        )
    except InputError as error:
        raise InputError(f"'{uri}': {error}") from error


def _names(found: Any, part: str) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise InputError(f"expected a list of class names in {part!r}, found {json.dumps(found, ensure_ascii=False)}")
    return tuple(_name(name, part) for name in found)


def _name(name: str, part: str) -> str:
    if not 1 <= len(name) <= 100 or not name.isprintable():
        raise InputError(f"expected class names of 1..100 characters that can be shown in {part!r}, found {name!r}")
    return name


def _refuse_repeated(names: Iterable[str], place: str) -> None:
    repeated = sorted(name for name, times in Counter(names).items() if times > 1)
    if repeated:
        raise InputError(f"expected each class in {place}, found {repeated[0]!r} in several; keep one")


def _unknown(unknown: Sequence[str], names: Sequence[str]) -> str:
    near = difflib.get_close_matches(unknown[0], names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names[:8])}{' ...' * (len(names) > 8)}"
    return f"{', '.join(map(repr, unknown[:5]))}{hint}"
