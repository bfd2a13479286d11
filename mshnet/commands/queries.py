"""Which pictures a command is to work on, and by which name their results go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mshnet.data.filesystem import is_local
from mshnet.data.picture_files import ENDINGS, is_picture
from mshnet.errors import InputError

OVERLAY = "_overlay"


@dataclass(frozen=True)
class Query:
    """A picture to be segmented."""

    path: Path
    name: str
    """Of its results, below the folder for them and without an ending: `sub/0001` for FOLDER/sub/0001.jpg."""

    def mask(self, out: Path) -> Path:
        """Where its mask goes."""
        return out / f"{self.name}.png"

    def overlay(self, out: Path) -> Path:
        """Where its overlay goes."""
        return out / f"{self.name}{OVERLAY}.png"


def find_queries(given: Sequence[str], out: Path, overlays: bool = False) -> list[Query]:
    """The files given, and the pictures in the folders given and below, in order of their names.

    Pictures in `out` are results and left out, where it lies in one of the folders. Two that differ only in their
    ending keep it in their results' names. Raises InputError where there is no picture, and for results that would
    fall on a query or on each other.
    """
    if not given:
        raise InputError("expected a picture or a folder of pictures after --query, got none")
    found = {path.resolve(): Query(path, name) for text in given for path, name in _below(text, out)}
    queries = list(found.values())
    twice = {name for name, count in Counter(query.name for query in queries).items() if count > 1}
    queries = [Query(q.path, f"{q.name}{q.path.suffix}") if q.name in twice else q for q in queries]
    _check_results(queries, out, overlays)
    return queries


def _below(text: str, out: Path) -> Iterator[tuple[Path, str]]:
    if not is_local(text):
        raise InputError(
            f"expected a file or folder of this machine, got {text!r}; for buckets use pipelines/predict.py"
        )
    start = Path(text)
    if start.is_file():
        yield start, start.stem
        return
    if not start.is_dir():
        raise InputError(f"no file or folder {text!r}; check the path")
    if start.resolve() == out.resolve():
        raise InputError(f"expected another folder for results than the pictures' own, {text!r}; give another --out")
    pictures = sorted(path for path in start.rglob("*") if is_picture(path) and path.is_file())
    if out.resolve().is_relative_to(start.resolve()):
        pictures = [path for path in pictures if not path.resolve().is_relative_to(out.resolve())]
    if not pictures:
        raise InputError(f"no pictures under {text!r} (looked for {', '.join(sorted(ENDINGS))})")
    for path in pictures:
        yield path, path.relative_to(start).with_suffix("").as_posix()


def _check_results(queries: Sequence[Query], out: Path, overlays: bool) -> None:
    taken: dict[Path, Query] = {}
    sources = {query.path.resolve() for query in queries}
    for query in queries:
        for result in [query.mask(out), query.overlay(out)] if overlays else [query.mask(out)]:
            other = taken.setdefault(result, query)
            if other is not query:
                raise InputError(
                    f"expected a result of its own for each query, but '{other.path}' and '{query.path}' would both "
                    f"write '{result}'; give the folder above them, or segment them one after the other"
                )
            if result.resolve() in sources:
                raise InputError(f"the result '{result}' would replace a query; give another --out")
