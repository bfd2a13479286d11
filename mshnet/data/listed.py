"""Pictures and their mask files in folders, matched by name: what the readers of mask files share."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Iterator

from mshnet.errors import InputError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Endings of pictures, in either case."""


def paired(
    pictures: Iterable[str], masks: Iterable[str], place: str, problem: Callable[[str], None]
) -> Iterator[tuple[str, str]]:
    """(picture, mask) of one name up to the ending, sorted by picture; pictures without a mask are left out.

    Masks without a picture, two pictures of one name and names that cannot be written down are told to `problem`.
    """
    by_stem: dict[str, str] = {}
    for path in sorted(pictures):
        other = by_stem.setdefault(_stem(path), path)
        if other != path:
            problem(f"expected one picture of each name under '{place}', found '{other}' and '{path}'; remove one")
    found = {_stem(path): path for path in masks}
    alone = sorted(found[stem] for stem in found.keys() - by_stem.keys())
    if alone:
        problem(
            f"every mask needs its picture ({', '.join(PICTURES)}) under '{place}': {len(alone)} missing, first of "
            f"{alone[0]!r}; add them or remove the masks"
        )
    for stem, path in sorted(by_stem.items(), key=lambda item: item[1]):
        if stem in found and _can_be_written(path, place, problem):
            yield path, found[stem]


def unlabelled(count: int, lacking: str) -> tuple[str, ...]:
    """A remark on pictures that take no part; none where there are none."""
    return (f"without a {lacking}, {count:,} picture(s) take no part",) if count > 0 else ()


def is_picture(path: str) -> bool:
    """By its ending."""
    return path.lower().endswith(PICTURES)


def _stem(path: str) -> str:
    return posixpath.splitext(path)[0]


def _can_be_written(path: str, place: str, problem: Callable[[str], None]) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        problem(f"expected file names in UTF-8 under '{place}', found {path!r}; rename it")
        return False
    return True


def read_class_list(text: bytes, where: str) -> tuple[str, ...]:
    """Class names, one a line, the first that of label 1. InputError where they cannot be told apart from labels."""
    try:
        lines = [line.strip() for line in text.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8 text in '{where}', found other bytes ({error}); save it as UTF-8") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise InputError(f"expected a class name a line in '{where}', found none")
    for number, line in enumerate(lines, 1):
        if not 1 <= len(line) <= 100 or not line.isprintable():
            raise InputError(
                f"expected a class name of 1..100 characters in line {number} of '{where}', found {line[:100]!r}: "
                "line n names label n"
            )
    if lines[0].strip("_").lower() in ("background", "ignore"):
        raise InputError(
            f"expected the name of label 1 in line 1 of '{where}', found {lines[0]!r}: 0 is background and 255 is "
            "ignored, neither is listed; remove the line"
        )
    if len(lines) > 254:
        raise InputError(
            f"expected 254 class names at most in '{where}', found {len(lines)}: a label PNG has values to 255, which "
            "is ignored; use --dataset coco-json"
        )
    return tuple(lines)
