"""Which pictures are taken, and where their results go."""

from __future__ import annotations

from pathlib import Path

import pytest

from mshnet.commands.queries import Query, find_queries
from mshnet.errors import InputError


def pictures(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return folder


def test_folders_are_walked_and_files_taken_as_they_are(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", "b.JPG", "a.png", "sub dir/ü.tif", ".hidden.png", "notes.txt", "odd.raw")
    found = find_queries([str(folder), str(folder / "odd.raw"), str(folder / "a.png")], tmp_path / "out")
    assert [query.name for query in found] == ["a", "b", "sub dir/ü", "odd"]
    assert found[2].mask(tmp_path / "out") == tmp_path / "out/sub dir/ü.png"
    assert found[2].overlay(tmp_path / "out") == tmp_path / "out/sub dir/ü_overlay.png"


def test_names_that_differ_in_their_ending_keep_it(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", "a.jpg", "a.png", "b.v2.jpg")
    assert [query.name for query in find_queries([str(folder)], tmp_path)] == ["a.jpg", "a.png", "b.v2"]


def test_results_within_the_pictures_folder_are_no_queries(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", "a.jpg", "masks/a.png")
    found = find_queries([str(folder)], folder / "masks")
    assert found == [Query(folder / "a.jpg", "a")]


def test_what_cannot_go_well_is_refused_before_it_begins(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", "a.jpg", "a_overlay.jpg")
    other = pictures(tmp_path / "other", "a.jpg")
    empty = pictures(tmp_path / "empty", "notes.txt")
    out = tmp_path / "out"
    with pytest.raises(InputError, match="expected a picture or a folder of pictures"):
        find_queries([], out)
    with pytest.raises(InputError, match="no file or folder 'absent'"):
        find_queries(["absent"], out)
    with pytest.raises(InputError, match=r"no pictures under .*empty.*\.jpeg"):
        find_queries([str(empty)], out)
    with pytest.raises(InputError, match=r"pipelines/predict\.py"):
        find_queries(["s3://bucket/pictures"], out)
    with pytest.raises(InputError, match="another folder for results"):
        find_queries([str(folder)], folder)
    with pytest.raises(InputError, match="would both write"):
        find_queries([str(folder), str(other)], out)
    with pytest.raises(InputError, match=r"would both write '.*a_overlay\.png'"):
        find_queries([str(folder)], out, overlays=True)
    png = pictures(tmp_path / "png", "a.png")
    with pytest.raises(InputError, match="would replace a query"):
        find_queries([str(png / "a.png")], png)
