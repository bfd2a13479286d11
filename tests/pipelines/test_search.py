"""What a search tries, how trials compare, what comes out: no cluster needed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from mshnet.config import ImageFormat, ModelConfig, TrainingConfig, published_training
from mshnet.errors import InputError
from pipelines import storage
from pipelines.config import (
    ComputeConfig,
    CrossValidationConfig,
    EvaluationConfig,
    JobArguments,
    ValidationConfig,
    parse,
)
from pipelines.journal import Journal
from pipelines.recipes import named
from pipelines.search import (
    SearchConfig,
    TrialEpoch,
    TrialRecord,
    Values,
    applied,
    best,
    check,
    left_to_the_taker,
    recipe,
    table,
    values_of,
)

START = TrainingConfig(learning_rate=0.02, weight_decay=0.0, inner_weight=0.25, global_batch=5, schedule="step")


def record(number: int, *mious: float, status: str = "complete", fold: int = 0) -> TrialRecord:
    epochs = [
        TrialEpoch(fold=fold, epoch=epoch, loss=1.0, validation_miou=miou) for epoch, miou in enumerate(mious, start=1)
    ]
    values = values_of(SearchConfig(), START, number)
    return TrialRecord(number=number, values=values, status=status, epochs=epochs)  # type: ignore[arg-type]


def test_the_first_trial_is_the_start_whatever_the_ranges() -> None:
    assert values_of(SearchConfig(), START, 0) == Values(
        learning_rate=0.02, weight_decay=0.0, inner_weight=0.25, global_batch=5, schedule="step"
    )


def test_more_trials_do_not_move_the_earlier_ones_and_another_seed_does() -> None:
    few, many, other = SearchConfig(trials=3), SearchConfig(trials=50), SearchConfig(search_seed=1)
    assert [values_of(few, START, n) for n in range(3)] == [values_of(many, START, n) for n in range(3)]
    assert values_of(few, START, 1) != values_of(other, START, 1)


def test_the_values_of_a_trial_stay_what_they_are() -> None:
    """Recorded trials are continued by later versions of this program, so this may change with CODE_VERSION only."""
    assert values_of(SearchConfig(), START, 7) == Values(
        learning_rate=0.0574, weight_decay=0.000231, inner_weight=0.294, global_batch=4, schedule="cosine"
    )


def test_values_lie_evenly_in_their_ranges() -> None:
    search = SearchConfig(batch_choices=(4, 8), schedule_choices=("cosine", "step", "constant"))
    tried = [values_of(search, START, number) for number in range(1, 65)]
    low, high = search.learning_rate_range
    # The points 0..63 of a scrambled sequence in base 2 hit each 64th once; without the first, 63 of them.
    cells = {int(64 * math.log(values.learning_rate / low) / math.log(high / low) + 1e-9) for values in tried}
    assert len(cells) >= 60
    assert all(low <= values.learning_rate <= high for values in tried)
    assert all(1e-5 <= values.weight_decay <= 1e-3 and 0.1 <= values.inner_weight <= 0.6 for values in tried)
    assert 24 <= sum(values.global_batch == 4 for values in tried) <= 40
    for schedule in search.schedule_choices:
        assert 14 <= sum(values.schedule == schedule for values in tried) <= 29
    # No two of the five move together, as unscrambled digits in large bases do.
    both = [sum(v.global_batch == 4 and v.schedule == s for v in tried[:20]) for s in search.schedule_choices]
    assert max(both) <= 7


def test_equal_ends_of_a_range_fix_a_value() -> None:
    search = SearchConfig(learning_rate_range=(0.0123456, 0.0123456), inner_weight_range=(0.0, 0.0))
    values = values_of(search, START, 3)
    assert (values.learning_rate, values.inner_weight) == (0.0123456, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "trials must be 1 or more, got 0"),
        ({"grace_epochs": 0}, "grace_epochs must be 1 or more, got 0"),
        ({"concurrency": -1}, "concurrency and search_seed must be 0 or more, got -1 and 0"),
        ({"reduction_factor": 1.0}, "reduction_factor must be above 1 and finite, got 1.0"),
        ({"learning_rate_range": (0.1, 0.01)}, "learning_rate_range must be two finite numbers above 0, the lower"),
        ({"learning_rate_range": (0.0, 0.01)}, "learning_rate_range must be two finite numbers above 0"),
        ({"weight_decay_range": (1e-5, math.inf)}, "weight_decay_range must be two finite numbers above 0"),
        ({"weight_decay_range": (math.nan, 1.0)}, "weight_decay_range must be two finite numbers above 0"),
        ({"inner_weight_range": (-0.1, 1.0)}, "inner_weight_range must be two finite numbers 0 or more"),
        ({"batch_choices": ()}, "batch_choices must be distinct and at least one"),
        ({"schedule_choices": ("step", "step")}, "schedule_choices must be distinct and at least one"),
    ],
)
def test_a_search_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SearchConfig(**changes)  # type: ignore[arg-type]


def test_trials_that_could_not_be_trained_are_refused_before_the_first() -> None:
    config = replace(named("demo", ""), validation=ValidationConfig(selection="base"))
    check(config, SearchConfig())
    for changed, search, message in (
        (named("demo", ""), SearchConfig(), "selection must be base for a search, got 'last'"),
        (named("paper", ""), SearchConfig(), "selection must be base for a search, got 'novel'"),
        (config, SearchConfig(grace_epochs=3), "grace_epochs must be at most epochs .2., got 3"),
        (config, SearchConfig(batch_choices=(8, 241)), "batch_choices: 241 does not fit: episodes_per_epoch must be"),
        (
            replace(config, compute=replace(config.compute, workers=3)),
            SearchConfig(batch_choices=(4, 2)),
            "batch_choices: 2 does not fit: every worker needs an episode",
        ),
        (
            replace(config, training=replace(config.training, statistics_batch=4)),
            SearchConfig(batch_choices=(8, 6)),
            "batch_choices: 6 does not fit: statistics_batch must be 0 or divide",
        ),
    ):
        with pytest.raises(InputError, match=message):
            check(changed, search)


def test_a_schedule_keeps_the_speed_at_which_the_rate_falls() -> None:
    config = CrossValidationConfig(training=published_training("pascal"))
    values = values_of(SearchConfig(), config.training, 0)
    assert applied(config, values) == config
    smooth = applied(config, replace(values, schedule="exponential")).training
    steps = config.training.steps_per_epoch
    assert smooth.learning_rate_at(50 * steps) == pytest.approx(config.training.learning_rate_at(50 * steps))
    back = applied(replace(config, training=smooth), values).training
    assert back.decay == pytest.approx(config.training.decay)
    assert applied(config, replace(values, schedule="cosine")).training.decay == pytest.approx(0.9**0.2)


def test_a_trial_scores_the_mean_over_folds_of_the_best_epoch() -> None:
    trial = record(1, 0.2, 0.4, 0.3)
    assert trial.score == 0.4
    for epoch in record(1, 0.1, math.nan, fold=2).epochs:
        trial = trial.with_epoch(epoch)
    assert trial.score == pytest.approx((0.4 + 0.1) / 2)
    assert record(1).score is None
    assert record(1, math.nan).score == 0.0
    assert [prefix.score for prefix in record(1, 0.2, 0.4, 0.3).prefixes()] == [0.2, 0.4, 0.4]
    assert TrialRecord.from_json(trial.to_text()).score == trial.score


def test_only_complete_trials_can_win_and_the_start_wins_ties() -> None:
    trials = [record(0, 0.3), record(1, 0.3), record(2, 0.9, status="stopped"), record(3, 0.9, status="diverged")]
    winner = best(trials)
    assert winner is not None
    assert winner.number == 0
    assert best(trials[2:]) is None


def test_the_table_ranks_the_trials() -> None:
    lines = table([record(0, 0.3), record(1, 0.1, status="stopped"), record(2, 0.425), record(3, status="failed")], 9)
    numbers = [line.split()[0] for line in lines.splitlines()[1:]]
    assert numbers == ["2", "0", "1", "3"]
    assert "1/9   42.5  complete" in lines.splitlines()[1]
    assert lines.splitlines()[2].endswith("complete (start)")


def test_a_recipe_is_the_method_and_all_else_is_the_takers(tmp_path: Path) -> None:
    """Every field is one or the other, so that a new one has to be thought about."""
    searched = CrossValidationConfig(
        dataset="pascal",
        source="s3://searcher/VOC2012",
        store="s3://searcher/store",
        tracking_uri="http://searcher:5000",
        experiment="search",
        registered_model="searched",
        split_lists="/searcher/lists",
        folds=(2,),
        shot=5,
        remove_novel="no",
        min_object_px=100,
        skip_small_classes=True,
        images_per_shard=7,
        backbone_weights="random",
        precision="bfloat16",
        images=ImageFormat(image_size_px=65),
        model=ModelConfig(backbone="resnet18"),
        training=TrainingConfig(epochs=7, statistics_batch=4),
        validation=ValidationConfig(held_out_classes=2),
        evaluation=EvaluationConfig(protocol="balanced"),
        compute=ComputeConfig(workers=2, ray_address="searcher:6379", use_gpu=True),
    )
    values = values_of(SearchConfig(), searched.training, 5)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe(searched, values)))

    taken = parse(JobArguments, ["--config", str(file), "--store", "own"], "cross_validate.py", "").cross_validation
    expected, theirs = applied(searched, values), replace(named("default", "pascal"), store="own")
    places = {"source", "store", "tracking_uri", "experiment", "registered_model", "split_lists", "trained", "own"}
    for name in CrossValidationConfig.__dataclass_fields__:
        source = theirs if name in {*places, "folds", "images_per_shard", "evaluation", "compute"} else expected
        assert getattr(taken, name) == getattr(source, name), name
        # pascal is whose defaults the taker starts from; it is not one's own data, and given weights are not searched.
        if name not in ("dataset", "trained", "own"):
            assert getattr(expected, name) != getattr(theirs, name), f"{name}: the test cannot tell whose it is"


def test_a_file_of_weights_and_split_lists_are_left_to_the_taker_by_name() -> None:
    config = replace(named("demo", ""), backbone_weights="/searcher/w.pth", split_lists="/searcher/lists")
    values = values_of(SearchConfig(), config.training, 0)
    assert not {"backbone_weights", "split_lists"} & recipe(config, values).keys()
    assert left_to_the_taker(config) == ["--backbone-weights /searcher/w.pth", "--split-lists /searcher/lists"]
    assert left_to_the_taker(named("demo", "")) == []


def test_a_journal_goes_on_from_what_it_wrote(tmp_path: Path) -> None:
    config, search = replace(named("demo", ""), folds=(2, 0)), SearchConfig(trials=3)
    journal = Journal(config, search, str(tmp_path))
    assert (journal.pending(), journal.longest) == ([0, 1, 2], 4)
    first = TrialEpoch(fold=2, epoch=1, loss=0.5, validation_miou=0.25)
    assert journal.observe(0, first)
    assert not journal.observe(0, first)
    assert journal.position(first) == 1
    assert journal.position(replace(first, fold=0, epoch=2)) == 4
    journal.save(0)
    journal.end(1, "stopped")
    journal.end(2, "failed", "no room")

    assert [record.number for record in journal.untold()] == [1], "a failed one is run again"
    journal.told(1)
    assert journal.untold() == []

    again = Journal(config, search, str(tmp_path))
    assert again.records == journal.records
    assert again.untold() == []
    assert again.pending() == [0, 2]
    assert again.records[2].error == "no room"
    assert (again.begin(2).status, again.begin(2).error) == ("running", "")
    assert Journal(config, SearchConfig(trials=5), str(tmp_path)).pending() == [0, 2, 3, 4]


def test_checkpoints_go_after_the_next_trial_has_ended_and_a_failed_ones_stay(tmp_path: Path) -> None:
    journal = Journal(named("demo", ""), SearchConfig(trials=4), str(tmp_path))
    folders = [Path(journal.training_folder(number, 0)) for number in range(4)]
    for folder in folders:
        folder.mkdir(parents=True)
    journal.end(0, "complete")
    journal.end(1, "failed", "x")
    assert [folder.exists() for folder in folders] == [False, True, True, True]
    journal.end(2, "stopped")
    assert folders[2].exists()
    killed = Journal(named("demo", ""), SearchConfig(trials=4), str(tmp_path))
    killed.remove_unused()
    assert [folder.exists() for folder in folders] == [False, True, False, True]


@pytest.mark.parametrize("error", [OSError(39, "Directory not empty"), FileNotFoundError("gone meanwhile")])
def test_what_a_worker_still_writes_to_is_removed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: OSError
) -> None:
    journal = Journal(named("demo", ""), SearchConfig(trials=4), str(tmp_path))
    folders = [Path(journal.training_folder(number, 0)) for number in range(4)]
    for folder in (*folders, Path(journal.scratch)):
        folder.mkdir(parents=True)
    remove, tries = storage.remove, {str(folders[0].parent): 3}

    def interrupted(uri: str) -> None:
        tries[uri] = tries.get(uri, 0) - 1
        if tries[uri] >= 0:
            raise error
        remove(uri)

    monkeypatch.setattr(storage, "remove", interrupted)
    for number in range(3):
        journal.end(number, "stopped")
    assert [folder.exists() for folder in folders] == [True, False, True, True], "the others go"
    journal.clean_up(patience_s=60)
    assert [folder.exists() for folder in folders] == [False, False, False, True]
    assert not Path(journal.scratch).exists()
    assert caplog.text == ""

    journal.end(3, "complete")
    tries[str(folders[3].parent)] = 1000
    journal.clean_up(patience_s=0)
    assert f"could not remove '{folders[3].parent}'" in caplog.text
    tries[str(folders[3].parent)] = 0
    journal.clean_up(patience_s=0)
    assert not folders[3].exists()


def test_a_record_of_other_values_is_refused(tmp_path: Path) -> None:
    journal = Journal(named("demo", ""), SearchConfig(trials=2), str(tmp_path))
    journal.end(1, "complete")
    with pytest.raises(InputError, match=r"expected .*001.json' to be a trial of .*; another version"):
        Journal(named("demo", ""), SearchConfig(trials=2, search_seed=5), str(tmp_path))
