"""Judging one fold on its stored test episodes beside the baselines, as a stage.

python -m pipelines.evaluate --dataset pascal --source data/VOC2012 --folds 0
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines import storage
from pipelines.config import CrossValidationConfig, fingerprint
from pipelines.crew import Call, Crew
from pipelines.dag import Stage
from pipelines.drawn import EPISODES, DrawnTest, DrawnTraining, TestList, read_test
from pipelines.evaluation_worker import TRAINED, EvaluationJob, EvaluationWorker, Unit, rows_needed_again
from pipelines.results import EpisodeOutcome, FeatureUse, FoldResult, Score
from pipelines.train import TrainedFold

if TYPE_CHECKING:
    from mshnet.data.episodes import Episode
    from mshnet.features import CacheUse
    from mshnet.outcomes import Judged, Outcomes

CODE_VERSION = 3
"""Raise it when the same weights would give other numbers or pictures."""
CURVES, BARS, OUTCOMES = "curves.png", "classes.png", "outcomes.arrow"
GPU_BATCHES = 8
"""That a worker with a GPU takes at a time, so that the next is decoded while it computes; others take one."""


def stage(config: CrossValidationConfig, drawn: tuple[Stage, Stage], trained: Stage, fold: int) -> Stage:
    """Evaluate a fold; `drawn` is what it trains and what it is tested on."""
    evaluation = config.evaluation
    settings = [
        evaluation.panels_each,
        evaluation.resize,
        evaluation.ignored,
        evaluation.evaluation_batch,
        evaluation.bootstrap_samples,
    ]
    key = fingerprint("evaluate", CODE_VERSION, drawn[1].key, trained.key, *settings)
    folder = storage.join(config.store, "evaluations", f"{config.dataset}-fold{fold}-{key}")
    return Stage(
        name=f"evaluate fold {fold}",
        result=storage.join(folder, "result.json"),
        run=evaluate_fold,
        arguments=(config, folder),
        needs=(*drawn, trained),
        cpus=0,  # waits for its workers, which hold the cores
        parts=(CURVES, BARS, OUTCOMES),
    )


def evaluate_fold(
    config: CrossValidationConfig,
    folder: str,
    training_result: Mapping[str, Any],
    test_result: Mapping[str, Any],
    trained_result: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Scores of the trained network, the untrained one and two training-free baselines, with pictures.

    Done by Ray actors (`evaluation_worker`); any of them may be killed.
    """
    from mshnet.data.store.images import ImageStore
    from mshnet.outcomes import write_outcomes
    from pipelines.scoring import score

    training, drawn = DrawnTraining.from_json(training_result), DrawnTest.from_json(test_result)
    trained = TrainedFold.from_json(trained_result)
    store = ImageStore(storage.join(config.store, drawn.store))
    tests = read_test(config, drawn, store)
    judged, use, panels, seconds = _judged(config, folder, training, drawn, trained, tests, store.image_id)
    uri = storage.join(folder, OUTCOMES)
    sha256 = write_outcomes(uri, judged)
    names, samples = store.manifest.class_names, config.evaluation.bootstrap_samples
    scores = {
        (predictor, shot): score(by_seed, _classes(drawn, shot, by_seed), names, samples)
        for (predictor, shot), by_seed in _by_seed(judged).items()
    }
    main = {predictor: each for (predictor, shot), each in scores.items() if shot == drawn.protocol.shot}
    pictures = _pictures(folder, drawn.fold, trained, main)
    return FoldResult(
        fold=drawn.fold,
        novel_classes=[names[c] for c in drawn.novel_classes],
        class_names=names if config.is_own else (),
        score=main.pop(TRAINED),
        baselines=main,
        history=trained.history,
        panels=panels,
        curve_picture=pictures[0],
        bars_picture=pictures[1],
        protocol=drawn.protocol,
        best_epoch=trained.best_epoch,
        train_episodes=trained.train_episodes,
        train_s=trained.train_s,
        evaluate_s=seconds,
        run_id=trained.run_id,
        model_version=None,
        checkpoint=trained.model,
        git_commit=trained.git_commit,
        other_shots={str(shot): each for (_, shot), each in scores.items() if shot != drawn.protocol.shot},
        outcomes=storage.below(config.store, uri),
        outcomes_sha256=sha256,
        episodes_hash=drawn.episodes_hash,
        features=FeatureUse(
            images=len({row for _, episodes in tests for episode in episodes for row in episode.images}),
            asked=use.asked,
            computed=use.computed,
            from_memory=use.from_memory,
            from_disk=use.from_disk,
        ),
    ).to_json()


def _judged(
    config: CrossValidationConfig,
    folder: str,
    training: DrawnTraining,
    drawn: DrawnTest,
    trained: TrainedFold,
    tests: Sequence[tuple[TestList, list[Episode[int]]]],
    image_id: Callable[[int], str],
) -> tuple[list[Judged], CacheUse, list[EpisodeOutcome], float]:
    """All lists judged, where the features came from, the pictured episodes, and how long it took."""
    from mshnet.data.tables import read_episodes
    from mshnet.outcomes import Judged

    table = storage.join(config.store, drawn.folder, EPISODES)
    base = tuple(read_episodes(table, drawn.episodes_sha256, "threshold"))
    lists = tuple(tuple(episodes) for _, episodes in tests)
    workers = config.compute.evaluation_workers or config.compute.workers
    job = EvaluationJob(
        config=config,
        store=storage.join(config.store, drawn.store),
        model=storage.join(config.store, trained.model),
        lists=lists,
        base=base,
        again=rows_needed_again([*lists, base]),
        share=workers > 1,
    )
    with _crew(job, workers, drawn.fold) as crew:
        test_parts = sum(len(_parts(config, len(episodes))) for episodes in lists)
        threshold = _threshold(crew, job, training.base_classes, drawn.fold, test_parts)
        with_baselines = [test.shot == drawn.protocol.shot for test, _ in tests]
        units = _units(config, lists, with_baselines, threshold)
        outcomes, use = _outcomes(crew, units, drawn.fold)
        ((_, panels),) = crew.results([("draw_pictures", (folder, outcomes[0][TRAINED]))])
        seconds = time.monotonic() - (crew.ready_at or time.monotonic())
    judged = [
        Judged(predictor, test.shot, test.seed, tuple(image_id(e.query) for e in episodes), found[predictor])
        for (test, episodes), found in zip(tests, outcomes, strict=True)
        for predictor in found
    ]
    return judged, use, panels, seconds


def _crew(job: EvaluationJob, workers: int, fold: int) -> Crew:
    import ray

    compute = job.config.compute
    options = {"num_cpus": compute.cpus_per_worker, "num_gpus": 1 if compute.use_gpu else 0}
    return Crew(EvaluationWorker, (ray.put(job),), workers, options, compute.max_failures, f"evaluate fold {fold}")


def _threshold(crew: Crew, job: EvaluationJob, classes: Sequence[int], fold: int, upcoming: int) -> float:
    """Of the prototype baseline, with the highest mIoU on episodes of base classes."""
    from mshnet.baselines import ThresholdCounts

    parts = _parts(job.config, len(job.base))
    calls = [("threshold_counts", (part,)) for part in parts]
    found = _in_order(crew, calls, [len(part) for part in parts], f"fold {fold}: baseline's threshold", upcoming)
    return ThresholdCounts.concatenated(found).best(classes)


def _units(
    config: CrossValidationConfig, lists: Sequence[Sequence[Any]], with_baselines: Sequence[bool], threshold: float
) -> list[Unit]:
    return [
        Unit(test, part, with_baselines[test], threshold)
        for test, episodes in enumerate(lists)
        for part in _parts(config, len(episodes))
    ]


def _parts(config: CrossValidationConfig, episodes: int) -> list[range]:
    """What is handed out at a time: one batch, or some where they are quick."""
    size = config.evaluation.evaluation_batch * (GPU_BATCHES if config.compute.use_gpu else 1)
    return [range(i, min(i + size, episodes)) for i in range(0, episodes, size)]


def _outcomes(crew: Crew, units: Sequence[Unit], fold: int) -> tuple[list[dict[str, Outcomes]], CacheUse]:
    """Of each list by predictor, in the episodes' order."""
    from mshnet.features import CacheUse
    from mshnet.statistics import concatenated

    calls = [("judge", (unit,)) for unit in units]
    found = _in_order(crew, calls, [len(unit.episodes) for unit in units], f"fold {fold}: evaluation")
    by_list: dict[int, dict[str, list[Outcomes]]] = {}
    use = CacheUse()
    for unit, (outcomes, used) in zip(units, found, strict=True):
        use += used
        for predictor, part in outcomes.items():
            by_list.setdefault(unit.test, {}).setdefault(predictor, []).append(part)
    return [
        {predictor: concatenated(parts) for predictor, parts in by_list[test].items()} for test in sorted(by_list)
    ], use


def _in_order(crew: Crew, calls: Sequence[Call], episodes: Sequence[int], desc: str, upcoming: int = 0) -> list[Any]:
    """The calls' results; a bar shows how many of the episodes they are of are done."""
    from ray.experimental import tqdm_ray

    results: list[Any] = [None] * len(calls)
    bar = tqdm_ray.tqdm(total=sum(episodes), desc=desc, unit="episode", flush_interval_s=5)
    try:
        for number, result in crew.results(calls, upcoming):
            results[number] = result
            bar.update(episodes[number])
    finally:
        bar.close()  # or it is drawn to the end of the job
    return results


def _by_seed(judged: Sequence[Judged]) -> dict[tuple[str, int], list[Outcomes]]:
    """By predictor and shot, seed after seed."""
    grouped: dict[tuple[str, int], list[Outcomes]] = {}
    for each in judged:
        grouped.setdefault((each.predictor, each.shot), []).append(each.outcomes)
    return grouped


def _classes(drawn: DrawnTest, shot: int, by_seed: Sequence[Outcomes]) -> Sequence[int]:
    if shot == drawn.protocol.shot:
        return drawn.novel_classes
    # With other supports, other classes may have too few images.
    return sorted({int(c) for outcomes in by_seed for c in outcomes.class_ids})


def _pictures(folder: str, fold: int, trained: TrainedFold, scores: Mapping[str, Score]) -> tuple[str, str]:
    from mshnet.visualize import class_bars, learning_curves

    curve = [(record.epoch, record.loss, record.validation_miou) for record in trained.history]
    storage.write_bytes(storage.join(folder, CURVES), learning_curves({f"fold {fold}": curve}))
    intervals = {name: (ends.low, ends.high) for name, ends in scores[TRAINED].class_interval.items()}
    bars = class_bars({name: score.class_iou for name, score in scores.items()}, intervals)
    storage.write_bytes(storage.join(folder, BARS), bars)
    return CURVES, BARS


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate only: the job's stages up to the folds' numbers."""
    from pipelines.job import run_stages

    return run_stages(
        argv,
        "python -m pipelines.evaluate",
        "Evaluate the folds (and train those that are not).",
        lambda graph: graph.evaluated,
    )


if __name__ == "__main__":
    raise SystemExit(main())
