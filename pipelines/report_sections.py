"""What both forms of the report say beside the fold table: rows of text, captions, charts."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipelines.fold_table import NOTHING, in_percent, interval_text, percent
from pipelines.results import BASELINES, GIVEN, CrossValidation, EpisodeOutcome, FoldResult, Score

CURVES, INTERVALS, SIZES = "curves.png", "intervals.png", "sizes.png"
"""Charts of all folds, by their names beside the page."""
TYPICAL: tuple[str, ...] = ("best", "median")
FAILURES: Mapping[str, tuple[str, str]] = {
    "worst": ("Lowest IoU", "The episodes with the lowest IoU of all."),
    "false foreground": (
        "False foreground",
        "The most predicted pixels outside the object, as a share of the query's pixels that count.",
    ),
    "missed small object": (
        "Missed small objects",
        "Of the objects that are small in their picture, those with the lowest IoU.",
    ),
}
"""Heading and definition of each rank in the gallery of failures. No query is shown under two ranks."""
ENERGY_NOTE = (
    "Mean over a block's layers and the supports of each similarity between query and supports, as in the paper's "
    "section 6.1. Block4 is the deepest of the three that are used. Colours compare within a row, whose scale the bar "
    "gives; the true object is outlined in white."
)
INTERVAL_NOTE = (
    "Intervals are 95 % by bootstrap over the episodes within each class. They say how much the number depends on "
    "which episodes were drawn, not on which model training gave."
)


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first cell of each names it."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def picture_name(fold: int, file_name: str) -> str:
    """The key of a fold's picture in `pictures`, and its path beside the Markdown file."""
    return f"fold{fold}/{file_name}"


def pictured_files(fold: FoldResult) -> list[str]:
    """The names of all pictures that the fold's evaluation drew."""
    drawn = [name for panel in fold.panels for name in (panel.picture, panel.energy) if name]
    return [fold.curve_picture, fold.bars_picture, *drawn]


def fold_summary(fold: FoldResult) -> str:
    """How the fold was trained and tested, in one line."""
    tested = f"{fold.score.episodes:,} test episodes in {duration(fold.evaluate_s)}"
    if fold.given:
        return f"{fold.selection}, {tested}"
    return (
        f"best epoch {fold.best_epoch} of {len(fold.history)}, {fold.train_episodes:,} training episodes in "
        f"{duration(fold.train_s)}, {tested}"
    )


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def class_table(fold: FoldResult) -> Table:
    """IoU in % by novel class: trained, its interval where it is known, then the baselines measured."""
    baselines = [key for key in BASELINES if key in fold.baselines]
    known = bool(fold.score.class_interval)
    rows = []
    for name in fold.novel_classes:
        interval = interval_text(in_percent(fold.score.class_interval.get(name)))
        others = [percent(100 * fold.baselines[key].class_iou.get(name, math.nan)) for key in baselines]
        own = percent(100 * fold.score.class_iou.get(name, math.nan))
        rows.append((name, own, *([interval] if known else []), *others))
    return Table(
        ("class", GIVEN if fold.given else "trained", *(["95 % interval"] if known else []), *baselines), tuple(rows)
    )


def interval_table(result: CrossValidation) -> Table | None:
    """mIoU and FB-IoU in % with their intervals, per fold and of the mean; None where no interval is known."""
    if not any(fold.score.miou_interval for fold in result.folds):
        return None

    def row(name: str, of: Score | CrossValidation, miou: float, fb_iou: float, episodes: int) -> tuple[str, ...]:
        intervals = [interval_text(in_percent(known)) for known in (of.miou_interval, of.fb_iou_interval)]
        return (name, percent(100 * miou), intervals[0], percent(100 * fb_iou), intervals[1], f"{episodes:,}")

    rows = [row(f"fold {f.fold}", f.score, f.score.miou, f.score.fb_iou, f.score.episodes) for f in result.folds]
    episodes = sum(fold.score.episodes for fold in result.folds)
    rows.append(row("mean", result, result.mean_miou, result.mean_fb_iou, episodes))
    return Table(("", "mIoU", "95 % interval", "FB-IoU", "95 % interval", "episodes"), tuple(rows))


def seed_table(result: CrossValidation) -> Table | None:
    """mIoU in % of each seed's episodes, and the standard deviation; None where there was one seed."""
    seeds = result.folds[0].protocol.seeds
    if len(seeds) < 2 or any(len(fold.score.by_seed) != len(seeds) for fold in result.folds):
        return None
    values = [(f"fold {fold.fold}", fold.score.by_seed) for fold in result.folds]
    means = tuple(statistics.fmean(of_seed) for of_seed in zip(*(by_seed for _, by_seed in values), strict=True))
    rows = [
        (name, *(percent(100 * value) for value in by_seed), f"{100 * statistics.stdev(by_seed):.2f}")
        for name, by_seed in [*values, ("mean", means)]
    ]
    return Table(("", *(f"seed {seed}" for seed in seeds), "std. dev."), tuple(rows))


def size_table(result: CrossValidation) -> Table | None:
    """mIoU in % by the size of the query's object, with the number of episodes; None where it was not measured."""
    sizes = _sizes(result)
    if not sizes:
        return None

    def cells(fold: FoldResult) -> Iterator[str]:
        for size in sizes:
            found = fold.score.by_size.get(size)
            yield f"{percent(100 * found.miou)} (n={found.episodes:,})" if found else NOTHING

    rows = [(f"fold {fold.fold}", *cells(fold)) for fold in result.folds]
    means = [
        _mean([fold.score.by_size[size].miou for fold in result.folds if size in fold.score.by_size]) for size in sizes
    ]
    return Table(("", *sizes), (*rows, ("mean", *means)))


def _sizes(result: CrossValidation) -> list[str]:
    return list(dict.fromkeys(size for fold in result.folds for size in fold.score.by_size))


def size_note() -> str:
    """What the sizes mean."""
    from mshnet.statistics import SIZES as LIMITS

    limits = [f"{name}: below {100 * limit:.0f} %" for name, limit in list(LIMITS.items())[:-1]]
    return (
        f"The share of the query's counted pixels that its object takes: {', '.join(limits)}, {list(LIMITS)[-1]}: more."
    )


def shot_table(result: CrossValidation) -> Table | None:
    """mIoU in % by the number of supports, per fold and the mean; None where it was judged with one number."""
    shots = sorted({result.shot, *(int(shot) for fold in result.folds for shot in fold.other_shots)})
    if len(shots) < 2:
        return None
    rows = []
    for shot in shots:
        scores = [f.score if shot == result.shot else f.other_shots.get(str(shot)) for f in result.folds]
        cells = [_with_interval(score) for score in scores]
        rows.append((f"{shot}-shot", *cells, _mean([score.miou for score in scores if score])))
    return Table(("", *(f"fold {fold.fold}" for fold in result.folds), "mean"), tuple(rows))


def _with_interval(score: Score | None) -> str:
    if score is None:
        return NOTHING
    interval = f" {interval_text(in_percent(score.miou_interval))}" if score.miou_interval else ""
    return percent(100 * score.miou) + interval


def _mean(values: Sequence[float]) -> str:
    return percent(100 * statistics.fmean(values)) if values else NOTHING


def feature_table(result: CrossValidation) -> Table | None:
    """How often features were needed and computed in the evaluation; None where it was not counted."""
    rows = []
    for fold in result.folds:
        use = fold.features
        if use and use.asked and use.computed:
            counts = [use.images, use.asked, use.computed, use.from_memory, use.from_disk]
            hits, saved = 1 - use.computed / use.asked, use.asked / use.computed
            rows.append((f"fold {fold.fold}", *(f"{n:,}" for n in counts), f"{100 * hits:.1f} %", f"{saved:.1f}×"))
    header = ("", "images", "times asked", "computed", "from memory", "from disk", "hit rate", "backbone work saved")
    return Table(header, tuple(rows)) if rows else None


def protocol_table(result: CrossValidation) -> Table:
    """All that the numbers depend on beside the model, a column for each fold."""
    ways = [dataclasses.asdict(fold.protocol) for fold in result.folds]
    rows = [(name.replace("_", " "), *(_plain(way[name]) for way in ways)) for name in ways[0]]
    rows.append(("episodes' hash", *(fold.episodes_hash or NOTHING for fold in result.folds)))
    return Table(("", *(f"fold {fold.fold}" for fold in result.folds)), tuple(rows))


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value) or NOTHING


def caption(fold: FoldResult, panel: EpisodeOutcome) -> str:
    """What a panel shows."""
    note = f"{panel.note}. " if panel.note else ""
    return (
        f"Fold {fold.fold}, {panel.class_name}, IoU {percent(100 * panel.iou)} %. {note}"
        f"Query {panel.query}; support {', '.join(panel.supports)}"
    )


def ranked(result: CrossValidation, rank: str) -> list[tuple[FoldResult, EpisodeOutcome]]:
    """The shown episodes of a rank, of all folds."""
    return [(fold, panel) for fold in result.folds for panel in fold.panels if panel.rank == rank]


def provenance(result: CrossValidation) -> list[tuple[str, list[tuple[str, str]]]]:
    """What leads from a number back to code, data, config and runs: (heading, (name, value) rows)."""
    run_rows = [("cross-validation", result.parent_run_id or NOTHING)]
    run_rows += [(f"fold {fold.fold}", fold.run_id or NOTHING) for fold in result.folds]
    models = [
        (f"fold {f.fold}", f"version {f.model_version}, {f.checkpoint}" if f.model_version else f.checkpoint)
        for f in result.folds
    ]
    outcomes = [
        (f"fold {f.fold}", f"{f.outcomes}, sha256 {f.outcomes_sha256 or NOTHING}") for f in result.folds if f.outcomes
    ]
    return [
        ("Code", [("git commit", result.git_commit or NOTHING), *sorted(result.versions.items())]),
        ("Data fingerprints", sorted(result.fingerprints.items())),
        ("MLflow runs", run_rows),
        ("Models", models),
        ("Every episode's counts", outcomes),
        ("Where things lie", sorted(result.artifacts.items())),
    ]


def charts(result: CrossValidation) -> dict[str, bytes]:
    """PNG files by name, of what there is to draw."""
    from mshnet.visualize import learning_curves, size_bars

    drawn = {
        CURVES: learning_curves(
            {f"fold {f.fold}": [(e.epoch, e.loss, e.validation_miou) for e in f.history] for f in result.folds}
        )
    }
    if any(fold.score.miou_interval for fold in result.folds):
        drawn[INTERVALS] = _interval_chart(result)
    sizes = {
        f"fold {fold.fold}": {size: (of.miou, of.episodes) for size, of in fold.score.by_size.items()}
        for fold in result.folds
    }
    if any(sizes.values()):
        drawn[SIZES] = size_bars(sizes)
    return drawn


def _interval_chart(result: CrossValidation) -> bytes:
    from mshnet.visualize import Measured, interval_chart

    rows = []
    for fold in result.folds:
        group, score = f"fold {fold.fold}", fold.score
        if score.miou_interval:
            low, high = score.miou_interval.low, score.miou_interval.high
            rows.append(Measured(name=f"fold {fold.fold}, mIoU", value=score.miou, low=low, high=high, group=group))
        for name, interval in score.class_interval.items():
            value = score.class_iou.get(name, math.nan)
            if math.isfinite(value):
                rows.append(Measured(name=name, value=value, low=interval.low, high=interval.high, group=group))
    if result.miou_interval:
        low, high = result.miou_interval.low, result.miou_interval.high
        rows.insert(0, Measured(name="mean of the folds", value=result.mean_miou, low=low, high=high, group="mean"))
    return interval_chart(rows, "mIoU of each fold, IoU of its novel classes, 95 % intervals", "IoU, %")


SECTIONS: Sequence[tuple[str, str, Callable[[CrossValidation], Table | None]]] = (
    ("Intervals", "mIoU and FB-IoU in %", interval_table),
    ("Spread over seeds", "mIoU in % of each seed's episodes", seed_table),
    ("By object size", "mIoU in %", size_table),
    ("By number of supports", "mIoU in %, the trained network", shot_table),
)
"""Of the numbers: heading, caption, and the table, which may be absent."""
