"""docs/episode_store.md: its example runs as it is printed, its columns are those of the files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa

from mshnet.data.episodes import Episode
from mshnet.data.store.manifest import SCHEMA_VERSION
from mshnet.data.store.rows import SCHEMA
from mshnet.data.store.shards import BATCH_ROWS
from mshnet.data.tables import write_episodes
from tests.mshnet.data.stored import noise_image, write_store

PAGE = (Path(__file__).parents[4] / "docs" / "episode_store.md").read_text()
TYPES = {"string": pa.string(), "binary": pa.binary(), "int32": pa.int32(), "int64": pa.int64(), "uint32": pa.uint32()}


def test_the_example_reads_a_store_without_this_project(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert "mshnet" not in example
    images = {name: noise_image(seed) for seed, name in enumerate("abcde")}
    store = write_store(str(tmp_path / "images"), images)
    episodes = {"validation": [Episode("a", ("b",), 0)], "test": [Episode("e", ("b",), 2)]}
    write_episodes(str(tmp_path / "fold" / "episodes.arrow"), store, fold=0, splits=episodes)
    command = [sys.executable, "-c", example, str(tmp_path / "images"), str(tmp_path / "fold")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == f"e ring (65, 65, 3) (50, 70) {images['e'].masks[2].sum()}\n"


def test_the_columns_are_those_of_a_shard() -> None:
    section = PAGE.split("## `images-*.arrow`")[1].split("## ")[0]
    described = {}
    for names, kind in re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", section, re.MULTILINE):
        words = kind.removesuffix(", may be null").split(" of ")
        for name in re.findall(r"`(\w+)`", names):
            described[name] = pa.list_(TYPES[words[1]]) if words[0] == "list" else TYPES[words[0]]
    assert described == {field.name: field.type for field in SCHEMA}
    assert list(described) == SCHEMA.names
    assert f"schema version {SCHEMA_VERSION}." in PAGE
    assert f"Record batches of {BATCH_ROWS} rows" in PAGE
