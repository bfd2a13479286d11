"""The episodes command, as a user runs it."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mshnet.protocols import EPISODES
from pipelines.config import fingerprint
from tests.conftest import needs_shared


def _run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipelines.episodes", *flags], capture_output=True, text=True)


@needs_shared
@pytest.mark.parametrize(("dataset", "fold", "shot"), [("pascal", 2, 5), ("coco", 1, 1)])
def test_prints_the_published_episodes(dataset: str, fold: int, shot: int, shared: Path) -> None:
    flags = ("--dataset", dataset, "--fold", str(fold), "--shot", str(shot), "--protocol", "published")
    done = _run("--split-lists", str(shared / "reference/splits"), *flags)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    official = json.loads(gzip.decompress((shared / "reference/episodes/official_test_episodes.json.gz").read_bytes()))
    assert len(printed) == 1000
    assert printed[:250] == official[f"{dataset}_fold{fold}_{shot}shot"]


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """Three images of each class in each list, in the field's layout."""
    for part in ("trn", "val"):
        (tmp_path / part).mkdir()
        for fold in range(4):
            lines = [f"image{c}_{i}__{c:02d}\n" for i in range(3) for c in range(5 * fold + 1, 5 * fold + 6)]
            (tmp_path / part / f"fold{fold}.txt").write_text("".join(lines))
    return tmp_path


def test_count_seeds_and_our_protocol(lists: Path) -> None:
    flags = ("--dataset", "pascal", "--split-lists", str(lists), "--fold", "3", "--shot", "2")
    ours = ("--protocol", "balanced", "--count", "20", "--seeds")
    done = _run(*flags, *ours, "5")
    printed = json.loads(done.stdout)
    assert done.stderr == f"seed 5: 20 episodes, hash {fingerprint(printed)}\n"
    assert sorted(c for _, _, c in printed) == [c for c in range(15, 20) for _ in range(4)]
    assert all(len({q, *supports}) == 3 for q, supports, _ in printed)
    both = _run(*flags, *ours, "5", "6")
    drawn = json.loads(both.stdout)
    assert drawn[:20] == printed != drawn[20:]
    assert both.stderr.splitlines() == [
        f"seed 5: 20 episodes, hash {fingerprint(printed)}",
        f"seed 6: 20 episodes, hash {fingerprint(drawn[20:])}",
        f"all seeds: 40 episodes, hash {fingerprint(drawn)}",
    ]
    published = json.loads(_run(*flags, "--count", "17").stdout)
    assert [e[0] for e in published[:2] + published[15:]] == ["image16_0", "image17_0"] * 2


def test_the_named_protocols_as_a_table() -> None:
    done = _run("--list-protocols")
    assert (done.returncode, done.stderr) == (0, "")
    heading, *rows = [[cell.strip() for cell in line.split("  ") if cell] for line in done.stdout.splitlines()]
    assert heading == ["protocol", "draw", "episodes per seed", "seeds", "episodes per fold"]
    assert rows == [
        ["published", "published", "1,000", "0", "1,000"],
        ["published-5x1000", "published", "1,000", "0, 1, 2, 3, 4", "5,000"],
        ["published-10000", "published", "10,000", "0", "10,000"],
        ["balanced", "balanced", "1,000", "0", "1,000"],
    ]
    assert [row[0] for row in rows] == list(EPISODES)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"--fold": "7"}, 1, "python -m pipelines.episodes: fold must be 0..3, got 7"),
        ({"--shot": "0"}, 1, "python -m pipelines.episodes: shot must be 1 or more, got 0"),
        (
            {"--shot": "3"},
            1,
            "every class needs 4 images or more for 3-shot episodes; too few: aeroplane (3)",
        ),
        ({"--seeds": "-3"}, 1, "evaluation_seeds must be distinct and 0..2^32 - 1, got (-3,)"),
        ({"--split-lists": ""}, 1, "expected --split-lists DIR, the folder of the field's list files, got none"),
        ({"--split-lists": "nowhere"}, 1, "no split lists under 'nowhere'"),
        ({"--dataset": "ade"}, 2, "ade"),
        ({"--fold": "one"}, 2, "one"),
        ({"--folds": "1"}, 2, "--folds"),
    ],
)
def test_bad_input(change: dict[str, str], code: int, message: str, lists: Path) -> None:
    flags = {"--dataset": "pascal", "--split-lists": str(lists), "--fold": "0", "--shot": "1", **change}
    done = _run(*[word for pair in flags.items() for word in pair])
    assert done.returncode == code
    assert message in done.stderr
    assert done.stdout == ""
    if code == 1:
        assert len(done.stderr.strip().splitlines()) == 1


def test_help_names_every_flag_and_loads_nothing_heavy() -> None:
    done = _run("--help")
    assert done.returncode == 0
    for flag in ("--dataset", "--split-lists", "--fold", "--shot", "--protocol", "--count", "--seeds"):
        assert flag in done.stdout
    heavy = "('torch', 'ray', 'mlflow', 'numpy')"
    code = f"import sys, pipelines.episodes; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]"
