"""A fold's evaluation: the same counts at any number of workers, also where one is killed; originals by brute force."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest
import ray
import torch
from PIL import Image
from torch.nn import functional as F

from mshnet.checkpoint import save_model
from mshnet.data.store.images import ImageStore
from mshnet.data.tables import read_episodes
from mshnet.engine import network_predictor
from mshnet.feature_files import FOLDER
from mshnet.features import CacheUse
from mshnet.outcomes import Judged, Outcomes, read_outcomes
from pipelines import draw, drawn, evaluate, preprocess, scan, storage
from pipelines.config import ComputeConfig, CrossValidationConfig, EvaluationConfig
from pipelines.drawn import DrawnTest, DrawnTraining, read_test
from pipelines.evaluate import evaluate_fold
from pipelines.evaluation_worker import TRAINED, EvaluationJob, EvaluationWorker, Unit, rows_needed_again
from pipelines.network import build_network
from pipelines.results import BASELINES, FoldResult
from pipelines.train import TrainedFold
from tests.pipelines.drawn_fold import done, draw_fold, small_config

EPISODES, SEEDS, BATCH = 10, (0, 3), 4


@dataclass(frozen=True)
class Fold:
    """A drawn fold and an untrained model."""

    config: CrossValidationConfig
    training: DrawnTraining
    test: DrawnTest
    trained: TrainedFold

    def evaluated(self, folder: Path, **compute: Any) -> tuple[FoldResult, list[Judged]]:
        """By the real stage."""
        config = replace(self.config, compute=ComputeConfig(**compute))
        arguments = (self.training.to_json(), self.test.to_json(), self.trained.to_json())
        uri = storage.join(config.store, folder.name)
        result = FoldResult.from_json(evaluate_fold(config, uri, *arguments))
        return result, read_outcomes(storage.join(config.store, result.outcomes), result.outcomes_sha256)

    def worker(self, **changes: Any) -> EvaluationWorker:
        """In this process, ready."""
        config = replace(self.config, **changes)
        store = storage.join(config.store, self.test.store)
        tests = read_test(config, self.test, ImageStore(store))
        lists = tuple(tuple(episodes) for _, episodes in tests)
        table = storage.join(config.store, self.test.folder, drawn.EPISODES)
        base = tuple(read_episodes(table, self.test.episodes_sha256, "threshold"))
        job = EvaluationJob(
            config=config,
            store=store,
            model=storage.join(config.store, self.trained.model),
            lists=lists,
            base=base,
            again=rows_needed_again([*lists, base]),
            share=False,
        )
        worker = EvaluationWorker(job)
        worker.prepare()
        return worker


@pytest.fixture(scope="module")
def fold(tmp_path_factory: pytest.TempPathFactory) -> Fold:
    """Two seeds of one support, and of two."""
    root = tmp_path_factory.mktemp("evaluate")
    config = replace(
        small_config(root),
        evaluation=EvaluationConfig(
            evaluation_episodes=EPISODES,
            evaluation_seeds=SEEDS,
            evaluation_shots=(2,),
            threshold_episodes=6,
            panels_each=1,
            bootstrap_samples=20,
            evaluation_batch=BATCH,
        ),
    )
    training, scanned = draw_fold(config), scan.scan_source(config)
    test = DrawnTest.from_json(done(draw.test_stage(config, scanned, preprocess.stages(config, scanned), 0)))
    save_model(build_network(config), str(Path(config.store) / "model"), {})
    trained = TrainedFold(
        fold=0, model="model", history=[], best_epoch=1, train_episodes=0, train_s=0.0, run_id="", git_commit=""
    )
    return Fold(config, training, test, trained)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Four logical cores, as more workers than this machine may have cores are wanted."""
    ray.shutdown()
    ray.init(
        "local",
        num_cpus=4,
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        object_store_memory=2**27,
    )
    yield
    ray.shutdown()


def assert_same(found: Sequence[Judged], expected: Sequence[Judged]) -> None:
    keys = [[(each.predictor, each.shot, each.seed, each.queries) for each in judged] for judged in (found, expected)]
    assert keys[0] == keys[1]
    for mine, theirs in zip(found, expected, strict=True):
        assert_same_outcomes(mine.outcomes, theirs.outcomes)


def assert_same_outcomes(found: Outcomes, expected: Outcomes) -> None:
    np.testing.assert_array_equal(found.counts.intersection, expected.counts.intersection)
    np.testing.assert_array_equal(found.counts.union, expected.counts.union)
    for name in ("class_ids", "object_px", "counted_px"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.fixture(scope="module")
def alone(fold: Fold, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[FoldResult, list[Judged]]:
    """One worker that has neither memory nor disk for features."""
    return fold.evaluated(tmp_path_factory.mktemp("alone"), feature_cache_gib=0, feature_spill_gib=0)


def test_the_result_of_one_worker(alone: tuple[FoldResult, list[Judged]], fold: Fold) -> None:
    result, judged = alone
    lists = {(each.predictor, each.shot, each.seed) for each in judged}
    assert lists == {
        *((name, 1, seed) for name in (TRAINED, *BASELINES) for seed in SEEDS),
        *((TRAINED, 2, seed) for seed in SEEDS),
    }
    assert {len(each.queries) for each in judged} == {EPISODES}
    assert set(result.baselines) == set(BASELINES)
    assert result.score == result.baselines["untrained"]  # which is what was saved
    assert set(result.other_shots) == {"2"}
    assert {score.episodes for score in (result.score, *result.baselines.values())} == {2 * EPISODES}
    assert len(result.score.by_seed) == 2
    assert result.protocol == fold.test.protocol
    assert result.episodes_hash == fold.test.episodes_hash
    assert result.features is not None
    visits = 2 * EPISODES * (2 + 3)
    assert (result.features.asked, result.features.computed) == (visits, visits)
    assert 2 < result.features.images < visits / 2
    assert result.panels
    # What is everywhere foreground has all that counts for its union.
    (everywhere, *_) = (each.outcomes for each in judged if each.predictor == "foreground")
    np.testing.assert_array_equal(everywhere.counts.union[:, 1], everywhere.counted_px)
    np.testing.assert_array_equal(everywhere.counts.intersection[:, 1], everywhere.object_px)


def test_two_workers_compute_each_image_once_and_count_the_same(
    alone: tuple[FoldResult, list[Judged]], fold: Fold, tmp_path: Path
) -> None:
    """Whichever needs it; memory holds one image."""
    result, judged = fold.evaluated(tmp_path, evaluation_workers=2, feature_cache_gib=2.0**-30, feature_spill_gib=1.0)
    assert_same(judged, alone[1])
    assert result.score == alone[0].score
    assert result.features is not None
    assert result.features.computed == result.features.images
    assert result.features.from_disk > 0


def test_four_workers_of_which_one_is_killed_count_the_same(
    alone: tuple[FoldResult, list[Judged]], fold: Fold, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    killed: list[int] = []
    ended = threading.Event()
    killer = threading.Thread(target=kill_one, args=(killed, ended))
    killer.start()
    try:
        result, judged = fold.evaluated(tmp_path, evaluation_workers=4)
    finally:
        ended.set()
        killer.join()
    assert len(killed) == 1
    assert "evaluate fold 0: a worker died; another does again what it was doing" in capfd.readouterr().err
    assert_same(judged, alone[1])
    assert result.panels == alone[0].panels


def kill_one(killed: list[int], ended: threading.Event) -> None:
    """The first evaluation worker that is seen judging."""
    while not ended.is_set() and not killed:
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[:1] == ["ray::EvaluationWorker.judge"]:
                    process.kill()
                    killed.append(process.pid)
                    return
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.002)


def test_a_cache_computes_each_image_once_and_changes_no_count(fold: Fold) -> None:
    """Over all lists, whatever their seeds and numbers of supports."""
    plain = fold.worker(compute=ComputeConfig(feature_cache_gib=0, feature_spill_gib=0))
    caching = fold.worker()
    for test in range(len(caching.job.lists)):
        for part in (range(BATCH), range(BATCH, EPISODES)):
            unit = Unit(test, part, False, 0.0)
            (expected, _), (found, _) = plain.judge(unit), caching.judge(unit)
            assert_same_outcomes(found[TRAINED], expected[TRAINED])
    rows = [row for episodes in caching.job.lists for episode in episodes for row in episode.images]
    assert caching.features.use == CacheUse(computed=len(set(rows)), from_memory=len(rows) - len(set(rows)))
    assert plain.features.use == CacheUse(computed=len(rows))
    plain.close()
    caching.close()


@pytest.mark.parametrize("ignored", ["excluded", "background"])
def test_original_size_against_the_annotations_themselves(
    fold: Fold, ignored: Literal["excluded", "background"]
) -> None:
    """Logits straight to the query's own size; counted pixel by pixel against the source's PNG."""
    evaluation = replace(fold.config.evaluation, resize="original", ignored=ignored)
    worker = fold.worker(evaluation=evaluation)
    found, _ = worker.judge(Unit(0, range(BATCH), False, 0.0))
    episodes = worker.job.lists[0][:BATCH]
    (batch,) = worker.loader.batches(episodes, [range(BATCH)])
    with torch.no_grad():
        logits = worker.relation(*worker.features.of(batch), batch.support_masks.float()).logits_low
    outcomes = found[TRAINED]
    for i, episode in enumerate(episodes):
        folder = Path(fold.config.source) / "SegmentationClassAug"
        labels = np.asarray(Image.open(folder / f"{worker.store.image_id(episode.query)}.png"))
        assert labels.shape == worker.store.size_px(episode.query) != (33, 33)
        size = [int(n) for n in labels.shape]
        resized = F.interpolate(logits[i : i + 1], size=size, mode="bilinear", align_corners=True)
        predicted = resized[0].argmax(0).numpy()
        counts = {(t, p): 0 for t in (0, 1) for p in (0, 1)}
        for row in range(size[0]):
            for column in range(size[1]):
                label = labels[row, column]
                if label != 255 or ignored == "background":
                    counts[int(label == episode.class_id + 1), int(predicted[row, column])] += 1
        assert outcomes.counts.intersection[i].tolist() == [counts[0, 0], counts[1, 1]]
        wrong = counts[0, 1] + counts[1, 0]
        assert outcomes.counts.union[i].tolist() == [counts[0, 0] + wrong, counts[1, 1] + wrong]
        assert outcomes.object_px[i] == counts[1, 0] + counts[1, 1]
        assert outcomes.counted_px[i] == sum(counts.values())
    worker.close()


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_all_are_judged_on_features_of_the_trainings_precision(
    fold: Fold, precision: Literal["float32", "bfloat16"], dtype: torch.dtype
) -> None:
    worker = fold.worker(precision=precision)
    (batch,) = worker.loader.batches(worker.job.lists[0], [range(2)])
    features = worker.features.of(batch)
    assert {maps.dtype for part in features for maps in part} == {dtype}
    with torch.no_grad():
        assert network_predictor(worker.relation)(*features, batch).scores.dtype == torch.float32
    worker.close()


def test_nothing_is_left_on_the_disk(node_cache: None, fold: Fold) -> None:
    from mshnet.data.store.cache import NodeCache

    folder = NodeCache.from_environment().folder / FOLDER
    worker = fold.worker()
    assert worker.features.files is not None
    assert worker.features.files.folder.parent == folder
    worker.close()
    assert not worker.features.files.folder.exists()


def test_the_stage_holds_no_cores_and_its_name_says_on_what_it_depends(fold: Fold) -> None:
    def staged(**evaluation: Any) -> Any:
        config = replace(fold.config, evaluation=replace(fold.config.evaluation, **evaluation))
        scanned = scan.scan_source(config)
        sealed = preprocess.stages(config, scanned)
        drawn = draw.training_stage(config, scanned, sealed, 0), draw.test_stage(config, scanned, sealed, 0)
        return evaluate.stage(config, drawn, sealed, 0)

    plain = staged()
    assert (plain.cpus, plain.gpus) == (0, 0)
    others = [
        staged(resize="original"), staged(ignored="background"), staged(evaluation_batch=2),
        staged(bootstrap_samples=30), staged(panels_each=2), staged(evaluation_seeds=(1,)),
    ]  # fmt: skip
    assert len({stage.key for stage in (plain, *others)}) == 7
