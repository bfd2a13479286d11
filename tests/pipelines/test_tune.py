"""The search's command line: what is refused before anything runs, and what makes two searches the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mshnet.data.shapes import write_voc
from pipelines import tune
from pipelines.config import CrossValidationConfig
from pipelines.graph import build
from pipelines.recipes import named
from pipelines.scan import Scan
from pipelines.search import SearchConfig

SCANNED = Scan(fingerprint="f" * 12, images=10, class_names=("a", "b"), mask_mode="classes")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trials", "0"], "trials must be 1 or more, got 0"),
        (["--selection", "novel"], "selection must be base for a search, got 'novel'"),
        (["--selection=last"], "selection must be base for a search, got 'last'"),
        (["--learning-rate-range", "0.1", "0.01"], "learning_rate_range must be two finite numbers above 0"),
        (["--batch-choices", "8", "500"], "batch_choices: 500 does not fit: episodes_per_epoch must be at least"),
        (["--batch-choices", "6", "--statistics-batch", "4"], "batch_choices: 6 does not fit: statistics_batch"),
        (["--batch-choices", "2", "4", "--workers", "4"], "batch_choices: 2 does not fit: every worker needs"),
        (["--grace-epochs", "9"], "grace_epochs must be at most epochs (2), got 9"),
        (["--schedule-choices", "linear"], "linear"),
        (["--folds", "4"], "fold must be 0..3, got 4"),
    ],
)
def test_wrong_usage_exits_with_2_and_one_clear_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = tune.main(flags)
    except SystemExit as caught:
        code = int(str(caught.code))
    captured = capsys.readouterr()
    assert code == 2
    assert message in " ".join(captured.err.replace("│", " ").split())
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_selects_otherwise_is_not_overruled_in_silence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"validation": {"selection": "novel"}}))
    assert tune.main(["--config", str(path)]) == 2
    assert "give --selection base" in capsys.readouterr().err


def test_an_absent_source_is_named_and_nothing_is_left(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tune.main(["--dataset", "pascal", "--source", "nowhere", "--epochs", "2"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_as_out_is_noticed_at_the_start(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, out = tmp_path / "source", tmp_path / "results"
    write_voc(source, images=4, size_px=40, seed=0)
    out.mkdir()
    assert (
        tune.main(["--dataset", "pascal", "--source", str(source), "--backbone-weights", "random", "--out", "results"])
        == 1
    )
    assert f"found the folder '{out}'; give {out}/recipe.json" in capsys.readouterr().err


def test_ctrl_c_ends_with_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: tune.TuneArguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "run", interrupted)
    assert tune.main([]) == 130
    assert capsys.readouterr().err == "tune.py: stopped; the same command goes on\n"


def test_sigterm_ends_with_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "run", lambda _: signal.raise_signal(signal.SIGTERM))
    assert tune.main([]) == 143
    assert capsys.readouterr().err == "tune.py: stopped; the same command goes on\n"


@pytest.mark.parametrize("recipe", ["default", "published", "demo"])
def test_the_help_shows_the_selection_that_a_search_has(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--recipe", recipe, "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    shown = words.split("--selection {base,novel,last}")[1].split("(default: ")[1]
    assert shown.startswith("base)")


def test_the_help_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys\nfrom pipelines import tune\ntry: tune.main(['--help'])\nexcept SystemExit: pass\n"
        "print(*(name for name in ('torch', 'ray', 'mlflow') if name in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == []
    for flag in ("--trials", "--learning-rate-range", "--reduction-factor", "--dataset", "--out"):
        assert flag in done.stdout


def key(config: CrossValidationConfig, search: SearchConfig) -> str:
    return tune.search_key(search, build(config, SCANNED, "random"))


def test_a_search_is_known_by_all_that_its_trials_depend_on() -> None:
    base = named("demo", "")
    config = replace(base, folds=(0,), validation=replace(base.validation, selection="base"))
    same = key(config, SearchConfig())
    assert key(replace(config, store="s3://elsewhere/store"), SearchConfig()) == same
    assert key(replace(config, compute=replace(config.compute, workers=2)), SearchConfig(concurrency=3)) == same
    assert key(config, SearchConfig(trials=40)) == same, "a longer search goes on with the shorter one"
    others = [
        key(replace(config, folds=(1,)), SearchConfig()),
        key(replace(config, folds=(0, 1)), SearchConfig()),
        key(replace(config, precision="bfloat16"), SearchConfig()),
        key(replace(config, training=replace(config.training, seed=1)), SearchConfig()),
        key(replace(config, training=replace(config.training, learning_rate=0.02)), SearchConfig()),
        key(config, SearchConfig(search_seed=1)),
        key(config, SearchConfig(batch_choices=(4, 8))),
        key(config, SearchConfig(grace_epochs=2)),
    ]
    assert len({same, *others}) == len(others) + 1
