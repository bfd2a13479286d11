"""A fold's and a cross-validation's numbers under the names that MLflow's charts and columns group by.

IoU from 0 to 1; `_low` and `_high` are the ends of the 95 % interval. A number whose epoch was chosen on its test
episodes has a name of its own, so that no table of runs compares it with an honest one; so has one of given weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipelines import paper_numbers
from pipelines.results import BASELINES, CrossValidation, FoldResult, Interval, Score

DECIMALS = 7
"""What a column can show; fold.json has all of them."""
CHOSEN_ON_TEST = "_epoch_chosen_on_test"
GIVEN = "_given_weights"


def of_fold(fold: FoldResult, paper: paper_numbers.PaperRow | None) -> dict[str, float]:
    """Of one fold's run. Raises KeyError for a fold without one of the baselines."""
    chosen = _apart(fold)
    score, test = fold.score, f"test{chosen}"
    metrics = _ious(test, score)
    if paper:
        metrics[f"{test}/miou_minus_paper"] = score.miou - paper.fold_miou[fold.fold] / 100
    for name in BASELINES:
        metrics |= _ious(f"baseline_{name}", fold.baselines[name])
    metrics |= _group(f"class_iou{chosen}", score.class_iou)
    metrics |= _group(f"{test}_by_size", {size: found.miou for size, found in score.by_size.items()})
    metrics |= _group(f"{test}_by_shots", {shots: found.miou for shots, found in fold.other_shots.items()})
    if len(score.by_seed) > 1:
        by_seed = zip(fold.protocol.seeds, score.by_seed, strict=True)
        metrics |= _group(f"{test}_by_seed", {str(seed): value for seed, value in by_seed})
    if fold.features and fold.features.asked:
        metrics["features/reused"] = 1 - fold.features.computed / fold.features.asked
        metrics["features/computed"] = fold.features.computed
    return _rounded(metrics) | {"best_epoch": fold.best_epoch, "train_s": fold.train_s, "evaluate_s": fold.evaluate_s}


def of_cross_validation(result: CrossValidation, paper: paper_numbers.PaperRow | None) -> dict[str, float]:
    """Of the parent run: the means first, then each fold's mIoU."""
    chosen = _apart(result)
    mean = f"mean{chosen}"
    metrics = {f"{mean}/miou": result.mean_miou, f"{mean}/fb_iou": result.mean_fb_iou}
    metrics |= _ends(f"{mean}/miou", result.miou_interval) | _ends(f"{mean}/fb_iou", result.fb_iou_interval)
    if paper:
        # Of the same folds, where only some were run.
        theirs = [paper.fold_miou[fold.fold] for fold in result.folds]
        whole = len(theirs) == len(paper.fold_miou)
        metrics[f"{mean}/miou_minus_paper"] = (
            result.mean_miou - (paper.mean_miou if whole else sum(theirs) / len(theirs)) / 100
        )
    for name in BASELINES:
        value = result.baseline_miou(name)
        if value is not None:
            metrics[f"mean/baseline_{name}_miou"] = value
    for fold in result.folds:
        name = f"fold{fold.fold}{chosen}/miou"
        metrics |= {name: fold.score.miou} | _ends(name, fold.score.miou_interval)
    return _rounded(metrics)


def _apart(found: FoldResult | CrossValidation) -> str:
    return CHOSEN_ON_TEST if found.chosen_on_test else GIVEN if found.given else ""


def _ious(group: str, score: Score) -> dict[str, float]:
    metrics = {f"{group}/miou": score.miou, f"{group}/fb_iou": score.fb_iou}
    return metrics | _ends(f"{group}/miou", score.miou_interval) | _ends(f"{group}/fb_iou", score.fb_iou_interval)


def _ends(name: str, interval: Interval | None) -> dict[str, float]:
    return {f"{name}_low": interval.low, f"{name}_high": interval.high} if interval else {}


def _group(name: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}/{key}": value for key, value in values.items()}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, DECIMALS) for name, value in values.items()}
