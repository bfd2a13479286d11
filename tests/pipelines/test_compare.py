"""The command on runs that lie on a store and in a tracker, with outcomes made up so that the truth is known."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mshnet.command_line import run
from mshnet.metrics import Counts, miou, sum_by_class
from mshnet.outcomes import Judged, Outcomes, write_outcomes
from mshnet.protocols import Protocol
from pipelines.compare import PROG, Comparison, compare
from pipelines.results import CrossValidation, FoldResult, Score
from pipelines.tracking import Tracker
from tests.pipelines import cross_validation_example

EPISODES, QUERY_PX = 200, 473 * 473
PROTOCOL = dataclasses.replace(cross_validation_example.PROTOCOL, episodes=EPISODES)


def judged(
    fold: int, better: float = 0.0, predictor: str = "trained", shot: int = 1, seed: int = 0, noise: int = 1
) -> Judged:
    """Pascal's fold, classes in turn; IoU around 0.6 + `better`, hard episodes hard for everyone, `noise` its own."""
    rng = np.random.default_rng([fold, shot, seed])
    class_ids = 5 * fold + np.arange(EPISODES) % 5
    object_px = rng.integers(2_000, 100_000, EPISODES)
    iou = rng.uniform(0.4, 0.8, EPISODES) + better + np.random.default_rng(noise).normal(0, 0.02, EPISODES)
    inside = np.rint(object_px * np.clip(iou, 0, 1)).astype(np.int64)
    counts = Counts(np.stack([QUERY_PX - object_px, inside], axis=1), np.stack([QUERY_PX - inside, object_px], axis=1))
    queries = tuple(f"2007_{x:06d}" for x in rng.integers(0, 400, EPISODES))
    outcomes = Outcomes(counts, class_ids, object_px, np.full(EPISODES, QUERY_PX))
    return Judged(predictor, shot, seed, queries, outcomes)


def few(rows: Sequence[int] | np.ndarray, table: Judged) -> Judged:
    """Some of a table's episodes."""
    place = np.array(rows)
    counts = Counts(table.outcomes.counts.intersection[place], table.outcomes.counts.union[place])
    outcomes = Outcomes(counts, *(getattr(table.outcomes, x)[place] for x in ("class_ids", "object_px", "counted_px")))
    return Judged(table.predictor, table.shot, table.seed, tuple(table.queries[i] for i in rows), outcomes)


def fold_result(fold: int, tables: Sequence[Judged], store: Path, protocol: Protocol) -> FoldResult:
    place = f"evaluations/pascal-fold{fold}/outcomes.arrow"
    score = Score(miou=0.6, fb_iou=0.7, class_iou={}, episodes=EPISODES)
    return FoldResult(
        fold=fold,
        novel_classes=[],
        score=score,
        baselines={},
        history=[],
        panels=[],
        curve_picture="",
        bars_picture="",
        protocol=protocol,
        best_epoch=1,
        train_episodes=8,
        train_s=1.0,
        evaluate_s=1.0,
        run_id="",
        model_version=None,
        checkpoint="",
        outcomes=place,
        outcomes_sha256=write_outcomes(str(store / place), tables),
        episodes_hash="ab" * 32,
    )


def result_of(store: Path, folds: list[FoldResult]) -> CrossValidation:
    return CrossValidation(
        name=f"pascal 1-shot {store.name}",
        dataset="pascal",
        backbone="resnet50",
        similarity="both",
        shot=1,
        image_size_px=473,
        folds=folds,
        mean_miou=0.6,
        mean_fb_iou=0.7,
        parent_run_id="",
        config={},
        fingerprints={},
        git_commit="unknown",
        versions={},
        learnable_parameters=1,
        artifacts={"store": str(store)},
    )


def written(store: Path, tables: Mapping[int, Sequence[Judged]], protocol: Protocol = PROTOCOL, **more: Any) -> str:
    """The URI of a report below a store; `more` changes fields of every fold's result."""
    folds = [dataclasses.replace(fold_result(f, t, store, protocol), **more) for f, t in tables.items()]
    return reported(store, result_of(store, folds))


def reported(store: Path, result: CrossValidation) -> str:
    report = store / "reports" / "pascal-1shot-0123" / "cross_validation.json"
    report.parent.mkdir(parents=True)
    report.write_text(result.to_text())
    return str(report)


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Comparison | None, str]]:
    """Runs it as typed: exit code, what it found, and stderr."""

    def called(*arguments: str) -> tuple[int, Comparison | None, str]:
        monkeypatch.setattr("sys.argv", [PROG, *arguments, "--samples", "500"])
        try:
            run(compare, PROG)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, Comparison.from_json(json.loads(out.splitlines()[-1])) if out else None, err

    return called


Command = Callable[..., tuple[int, Comparison | None, str]]


@pytest.fixture
def a(tmp_path: Path) -> str:
    return written(tmp_path / "a", {fold: [judged(fold, better=0.03)] for fold in (0, 1)})


def test_a_better_run_is_found(a: str, tmp_path: Path, command: Command) -> None:
    b = written(tmp_path / "b", {fold: [judged(fold, noise=2)] for fold in (0, 1)})
    code, found, err = command(a, b)
    assert code == 0
    assert found is not None
    assert found.miou.low < 0.03 < found.miou.high
    assert found.verdict == (
        f"A is better than B by {100 * found.miou.difference:.1f} ± "
        f"{50 * (found.miou.high - found.miou.low):.1f} mIoU points "
        f"(95 %, paired bootstrap over 400 episodes, p = {2 / 501:.3f})"
    )
    assert err.splitlines()[-1] == f"{found.verdict}."
    assert found.protocol == "published draw, 200 episodes, 1-shot, square 473 px"
    assert found.notes == []
    assert [row.fold for row in found.folds] == [0, 1]
    assert list(found.folds[0].class_iou) == ["aeroplane", "bicycle", "bird", "boat", "bottle"]
    outcomes = judged(1, better=0.03).outcomes
    by_hand = miou(sum_by_class(outcomes.counts, outcomes.class_ids.tolist(), range(5, 10)))
    assert found.folds[1].miou.a == by_hand
    row = next(line for line in err.splitlines() if line.startswith("fold 1"))
    assert row.split()[2] == f"{100 * by_hand:.1f}"
    _, back, _ = command(b, a)
    assert back is not None
    assert back.verdict == found.verdict.replace("better", "worse")


def test_a_run_and_itself(a: str, command: Command) -> None:
    code, found, err = command(a, str(Path(a).parent))
    assert code == 0
    assert found is not None
    assert (found.miou.difference, found.miou.low, found.miou.high, found.miou.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert found.verdict.startswith("no difference that these episodes could show: A less B is 0.0 ± 0.0 mIoU points")
    assert "p = 1.000" in err.splitlines()[-1]


def test_a_difference_that_is_too_small_for_so_few_episodes(a: str, tmp_path: Path, command: Command) -> None:
    b = written(tmp_path / "b", {fold: [judged(fold, better=0.0299, noise=2)] for fold in (0, 1)})
    code, found, _ = command(a, b)
    assert code == 0
    assert found is not None
    assert found.miou.low < 0 < found.miou.high
    assert found.verdict.startswith("no difference that these episodes could show")


def test_other_images_would_vary_more(tmp_path: Path, command: Command) -> None:
    """Every query four times, all that makes A and B differ the same in each of them."""

    def repeated(better: float, noise: int) -> Judged:
        return few(np.tile(np.arange(50), 4), judged(0, better, noise=noise))

    a = written(tmp_path / "a", {0: [repeated(0.01, 1)]})
    b = written(tmp_path / "b", {0: [repeated(0.0, 2)]})
    found = {unit: command(a, b, "--resample", unit)[1] for unit in ("episodes", "queries")}
    episodes, queries = found["episodes"], found["queries"]
    assert episodes is not None
    assert queries is not None
    assert "paired bootstrap over the queries of 200 episodes" in queries.verdict
    assert (queries.miou.a, queries.miou.b, queries.episodes) == (episodes.miou.a, episodes.miou.b, 200)
    widths = [x.miou.high - x.miou.low for x in (queries, episodes)]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.2)  # four times as few to draw from


def test_against_a_baseline_of_the_same_run(tmp_path: Path, command: Command) -> None:
    tables = [judged(0, predictor="trained"), judged(0, predictor="prototype", better=-0.2, noise=3)]
    a = written(tmp_path / "a", {0: tables})
    _, found, err = command(a, "--baseline", "prototype")
    assert found is not None
    assert found.miou.low < 0.2 < found.miou.high
    assert "B: prototype, pascal 1-shot a" in err
    code, _, err = command(a)
    assert (code, "expected a second run" in err) == (1, True)
    code, _, err = command(a, "--baseline", "foreground")
    assert code == 1
    assert "found prototype (1-shot), trained (1-shot)" in err


def test_all_seeds_and_other_shots(tmp_path: Path, command: Command) -> None:
    def tables(better: float, noise: int) -> list[Judged]:
        lists = [(1, 0), (1, 4), (5, 0), (5, 4)]
        return [judged(2, better * shot, shot=shot, seed=seed, noise=noise) for shot, seed in lists]

    protocol = dataclasses.replace(PROTOCOL, seeds=(0, 4))
    a = written(tmp_path / "a", {2: tables(0.01, 1)}, protocol)
    b = written(tmp_path / "b", {2: tables(0.0, 2)}, protocol)
    for shot, difference in ((1, 0.01), (5, 0.05)):
        _, found, _ = command(a, b, "--shot", str(shot))
        assert found is not None
        assert found.episodes == 2 * EPISODES
        assert found.miou.low < difference < found.miou.high
        assert found.miou.low > 0
        assert f"{shot}-shot" in found.protocol
    code, _, err = command(a, b, "--shot", "3")
    assert (code, "'trained' at 3-shot, found trained (1-shot), trained (5-shot)" in err) == (1, True)


def changed(fold: int, **fields: Any) -> Judged:
    table = judged(fold, noise=2)
    outcomes = {name: fields.pop(name) for name in ("class_ids", "object_px") if name in fields}
    return dataclasses.replace(table, outcomes=dataclasses.replace(table.outcomes, **outcomes), **fields)


@pytest.mark.parametrize(
    ("table", "protocol", "message"),
    [
        (judged(1), {"resize": "original"}, "fold 1: resize is 'square' in A, 'original' in B"),
        (judged(1), {"ignore": "background"}, "ignore is 'excluded' in A, 'background' in B"),
        (judged(1), {"split_lists": "pairs by rule"}, "split_lists is 'lists:4f2c1a9be07d' in A"),
        (judged(1), {"mask_mode": "first polygon"}, "mask_mode is"),
        (judged(1), {"side_px": 241}, "side_px is 473 in A, 241 in B"),
        (judged(1, seed=1), {}, r"the seeds are \[0\] in A, \[1\] in B"),
        (
            changed(1, queries=("2011_000001", *judged(1).queries[1:])),
            {},
            f"1 of 200 queries differ, first episode 0: {judged(1).queries[0]} in A, 2011_000001 in B",
        ),
        (changed(1, class_ids=np.full(EPISODES, 5)), {}, "160 of 200 episodes are of another class"),
        (changed(1, object_px=np.full(EPISODES, 7)), {}, "the true masks differ for the same queries"),
    ],
)
def test_other_episodes_are_refused(
    a: str, tmp_path: Path, command: Command, table: Judged, protocol: dict[str, Any], message: str
) -> None:
    b = written(tmp_path / "b", {1: [table]}, dataclasses.replace(PROTOCOL, **protocol))
    code, found, err = command(a, b)
    assert (code, found) == (1, None)
    assert "expected two runs that were judged on the same episodes, found that" in err
    assert re.search(message, err), err


def test_other_supports_are_refused(a: str, tmp_path: Path, command: Command) -> None:
    b = written(tmp_path / "b", {1: [judged(1)]}, episodes_hash="cd" * 32)
    code, _, err = command(a, b)
    assert (code, "fold 1: the supports differ (episodes abababababab in A, cdcdcdcdcdcd in B)" in err) == (1, True)


def test_at_original_size_the_network_may_see_another(tmp_path: Path, command: Command) -> None:
    runs = [
        written(tmp_path / name, {0: [judged(0)]}, dataclasses.replace(PROTOCOL, resize="original", side_px=side))
        for name, side in (("a", 473), ("b", 241))
    ]
    assert command(*runs)[0] == 0


def test_what_is_not_the_episodes_is_noted(a: str, tmp_path: Path, command: Command) -> None:
    protocol = dataclasses.replace(PROTOCOL, selection="last epoch")
    b = written(tmp_path / "b", {fold: [judged(fold)] for fold in (1, 2)}, protocol)
    code, found, err = command(a, b)
    assert code == 0
    assert found is not None
    assert found.notes == [
        "folds 0, 2 are left out",
        "trained under different rules: selection is 'best mIoU on 3 held-out base classes' in A, 'last epoch' in B",
    ]
    assert f"note: {found.notes[1]}" in err
    code, _, err = command(a, b, "--folds", "0")
    assert (code, "expected the folds [0] in both runs, found [0, 1] in A and [1, 2] in B" in err) == (1, True)


def test_too_few_episodes(tmp_path: Path, command: Command) -> None:
    one_each = written(tmp_path / "a", {0: [few(range(5), judged(0))]})
    code, _, err = command(one_each, one_each)
    assert (code, "expected a class with two episodes or more" in err) == (1, True)
    some = written(tmp_path / "b", {0: [few(range(47), judged(0))]})  # two classes have 10, three 9
    code, found, _ = command(some, some)
    assert code == 0
    assert found is not None
    assert found.notes == ["classes with fewer than 10 episodes: 3; the intervals are too narrow for that"]


def test_a_store_that_was_moved(a: str, tmp_path: Path, command: Command) -> None:
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    moved = a.replace(str(tmp_path / "a"), str(tmp_path / "elsewhere"))
    assert command(moved, moved)[0] == 0
    (tmp_path / "elsewhere" / "evaluations").rename(tmp_path / "gone")
    code, _, err = command(moved, moved)
    assert (code, "fold 0: expected its table of outcomes at one of" in err) == (1, True)


def test_an_altered_table_is_refused(a: str, tmp_path: Path, command: Command) -> None:
    write_outcomes(str(tmp_path / "a/evaluations/pascal-fold1/outcomes.arrow"), [judged(1, better=0.2)])
    code, _, err = command(a, a)
    assert (code, "sha256" in err) == (1, True)


def test_what_is_no_run(a: str, tmp_path: Path, command: Command) -> None:
    code, _, err = command(a, str(tmp_path / "nothing"))
    assert (code, "found nothing at" in err) == (1, True)
    old = written(tmp_path / "old", {0: [judged(0)]}, outcomes="", outcomes_sha256="")
    code, _, err = command(a, old)
    assert (code, "evaluated by an older version" in err) == (1, True)
    assert command(a, a, "--folds", "x")[0] == 2
    assert command()[0] == 2


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return Tracker(f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}", "pascal")


def tracked(tracker: Tracker, name: str, folds: Sequence[FoldResult], store: Path) -> str:
    """Parent run id of a cross-validation whose folds were registered."""
    parent = tracker.start_parent(name, {"dataset": "pascal", "shot": 1}, {}, name)
    for fold in folds:
        child = tracker.start_child(parent, f"fold {fold.fold}", {}, {"fold": str(fold.fold)}, f"{name}-{fold.fold}")
        tracker.log_bytes(child, (store / fold.outcomes).read_bytes(), "outcomes.arrow")
        tracker.log_bytes(child, fold.to_text().encode(), "fold.json")
    return parent


def test_runs_by_their_ids(a: str, tmp_path: Path, command: Command, tracker: Tracker) -> None:
    here = CrossValidation.from_json(Path(a).read_text())
    parent = tracked(tracker, "first", here.folds, tmp_path / "a")
    b = written(tmp_path / "b", {fold: [judged(fold, noise=2)] for fold in (0, 1)})
    where = ("--tracking-uri", tracker.tracking_uri)
    _, by_files, _ = command(a, b)
    code, found, err = command(parent, b, *where)
    assert code == 0, err
    assert found is not None
    assert by_files is not None
    assert (found.miou, found.folds) == (by_files.miou, by_files.folds)
    assert f"A: trained, first ({parent})" in err
    code, _, err = command("0" * 32, b, *where)
    assert (code, f"expected a run {'0' * 32} at" in err) == (1, True)
    empty = tracker.start_parent("empty", {"dataset": "pascal", "shot": 1}, {}, "empty")
    code, _, err = command(empty, b, *where)
    assert (code, "with judged folds below it" in err) == (1, True)
