"""A table of the paper filled: the published rows, ours from their runs, the difference of every cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mshnet.data.folds import FOLDS
from pipelines import paper_numbers
from pipelines.cells import BACKBONES, FB_IOU, MEAN, SHOTS, Table
from pipelines.chosen_runs import FIELD_LISTS, Asked, Chosen, Key, choose, weights_of
from pipelines.fold_table import CHOSEN_ON_TEST_NOTE, LABELS, in_percent, network_name
from pipelines.paper_numbers import PaperRow
from pipelines.peer_numbers import PEERS, Peer, Published
from pipelines.results import BASELINES, CHOSEN_ON_TEST, GIVEN, FoldResult, Interval, Record, Score
from pipelines.tracking_search import TrackedRun

BACKBONE_NAMES = {"resnet18": "ResNet-18", "resnet34": "ResNet-34", "resnet50": "ResNet-50", "resnet101": "ResNet-101"}
SIMILARITY_NAMES = {"both": "both similarities", "cosine": "cosine alone", "prototype": "prototype alone"}
NOT_RUN, NOT_PRINTED = "not run", "not printed"


@dataclass(frozen=True, kw_only=True)
class Number(Record):
    """One number of a table, or why there is none."""

    shot: int
    column: str
    """fold 0..3, mIoU or FB-IoU."""
    value: float | None = None
    """In %."""
    interval: Interval | None = None
    """95 %, in %; None where it is not known."""
    state: str
    """measured, published, not run, running, failed, killed, or not printed (in the paper)."""
    paper: float | None = None
    """The paper's number in the same place."""
    run_id: str = ""
    """MLflow run that it was read from: the fold's, or for a mean the cross-validation's."""
    note: str = ""

    @property
    def difference(self) -> float | None:
        """To the paper's, in points, above 0 where ours is higher."""
        return None if self.value is None or self.paper is None else self.value - self.paper

    @property
    def inside(self) -> bool | None:
        """Whether the paper's number lies in our interval; None where one of them is not known."""
        if self.interval is None or self.paper is None:
            return None
        return self.interval.low <= self.paper <= self.interval.high


@dataclass(frozen=True, kw_only=True)
class Row(Record):
    """A row of a table."""

    kind: str
    """peer, paper, ours, baseline or later."""
    label: str
    architecture: str = ""
    similarity: str = ""
    numbers: list[Number]
    parameters: int | None = None
    """Learnable ones, counted on the code."""
    paper_parameters: str = ""
    """As printed."""


@dataclass(frozen=True, kw_only=True)
class Block(Record):
    """The rows of one backbone."""

    backbone: str
    rows: list[Row]


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A table with its numbers, and the runs behind it."""

    table: Table
    blocks: tuple[Block, ...]
    chosen: Chosen
    foreign: tuple[Peer, ...] = field(default=())
    """Later methods on backbones that the paper does not have."""

    @property
    def differs(self) -> list[tuple[str, str, str]]:
        """What keeps ours from being compared with the paper's: (name, here, paper)."""
        here = dict(self.chosen.measured)
        there = {
            "test episodes": "published (1,000 episodes)",
            "checkpoint": CHOSEN_ON_TEST,
            "image size": f"{paper_numbers.IMAGE_SIZE_PX} px square",
            "ignored pixels": "left out of the counts",
            "split lists": FIELD_LISTS,
            "training images with a novel class": "left out" if self.table.dataset == "pascal" else "kept",
            "backbone weights": "imagenet",
        }
        return [(name, here[name], there[name]) for name in there if name in here and here[name] != there[name]]


def fill(table: Table, runs: Sequence[TrackedRun], asked: Asked) -> Filled:
    """The table from an experiment's runs, newest first."""
    chosen = choose(table, runs, asked)
    others = sorted({key.backbone for key in chosen.runs} - set(BACKBONES), key=list(BACKBONE_NAMES).index)
    blocks = tuple(
        Block(backbone=backbone, rows=list(_rows(table, backbone, chosen))) for backbone in (*BACKBONES, *others)
    )
    foreign = PEERS.get((table.dataset, "foundation models"), ()) if table.fb_iou else ()
    return Filled(table=table, blocks=blocks, chosen=chosen, foreign=foreign)


def _rows(table: Table, backbone: str, chosen: Chosen) -> Iterator[Row]:
    peers = PEERS.get((table.dataset, backbone), ()) if len(table.similarities) == 1 else ()
    yield from (_peer(table, peer) for peer in peers if not peer.later)
    for similarity in table.similarities:
        name = f", {SIMILARITY_NAMES[similarity]}" if len(table.similarities) > 1 else ""
        rows = {shot: paper_numbers.paper_row(table.dataset, backbone, similarity, shot) for shot in SHOTS}
        if any(rows.values()):
            yield _paper(table, similarity, rows, f"MSHNet{name}, paper")
        yield _ours(table, Key(backbone, similarity, "mshnet", 0), chosen, rows, f"MSHNet{name}, here")
    others = sorted({key.architecture for key in chosen.runs if key.backbone == backbone} - {"mshnet"})
    for architecture in others:
        yield _ours(table, Key(backbone, "both", architecture, 0), chosen, {}, f"{network_name(architecture)}, here")
    yield from _baselines(table, backbone, chosen)
    yield from (_peer(table, peer) for peer in peers if peer.later)


def _peer(table: Table, peer: Peer) -> Row:
    numbers = [n for shot in SHOTS for n in _printed(table, shot, peer.published(shot))]
    kind = "later" if peer.later else "peer"
    return Row(kind=kind, label=peer.method, numbers=numbers, paper_parameters=peer.parameters)


def _paper(table: Table, similarity: str, rows: dict[int, PaperRow | None], label: str) -> Row:
    numbers: list[Number] = []
    for shot, row in rows.items():
        published = Published(row.mean_miou, row.fold_miou, row.fb_iou) if row else None
        numbers += _printed(table, shot, published)
    parameters = paper_numbers.PARAMETERS[similarity]
    return Row(kind="paper", label=label, similarity=similarity, numbers=numbers, paper_parameters=parameters)


def _printed(table: Table, shot: int, published: Published | None) -> Iterator[Number]:
    values: list[float | None] = [None] * (FOLDS + 2)
    if published:
        values = [*(published.fold_miou or [None] * FOLDS), published.mean_miou, published.fb_iou]
    for column, value in zip(table.columns, values, strict=False):
        yield Number(shot=shot, column=column, value=value, state=NOT_PRINTED if value is None else "published")


def _ours(table: Table, of: Key, chosen: Chosen, paper: dict[int, PaperRow | None], label: str) -> Row:
    numbers: list[Number] = []
    for shot in SHOTS:
        key = Key(of.backbone, of.similarity, of.architecture, shot)
        numbers += _measured(table, key, chosen, paper.get(shot))
    # Chosen runs were all measured in one way, this among it.
    chosen_on = dict(chosen.measured)["checkpoint"] if chosen.runs else ""
    note = {CHOSEN_ON_TEST: f", {CHOSEN_ON_TEST_NOTE}", GIVEN: f", {GIVEN}"}.get(chosen_on, "")
    return Row(
        kind="ours",
        label=label + note,
        architecture=of.architecture,
        similarity=of.similarity,
        numbers=numbers,
        parameters=parameters(of.architecture, of.backbone, of.similarity),
        paper_parameters=paper_numbers.PARAMETERS[of.similarity] if any(paper.values()) else "",
    )


def _baselines(table: Table, backbone: str, chosen: Chosen) -> Iterator[Row]:
    """The untrained network of every similarity; what needs no network once, from whichever run has it."""
    several = len(table.similarities) > 1
    for name in BASELINES:
        of_network = name == "untrained"
        for similarity in table.similarities if of_network else ("",):
            numbers: list[Number] = []
            for shot in SHOTS:
                keys = [Key(backbone, s, "mshnet", shot) for s in ((similarity,) if similarity else table.similarities)]
                if not of_network:
                    keys += [key for key in chosen.runs if (key.backbone, key.shot) == (backbone, shot)]
                key = next((key for key in keys if key in chosen.runs), keys[0])
                numbers += _measured(table, key, chosen, baseline=name)
            which = f", {SIMILARITY_NAMES[similarity]}" if several and similarity else ""
            yield Row(kind="baseline", label=LABELS[name] + which, similarity=similarity, numbers=numbers)


def _measured(
    table: Table,
    key: Key,
    chosen: Chosen,
    paper: PaperRow | None = None,
    baseline: str = "",
) -> Iterator[Number]:
    """The numbers of a run, of its trained network or of a baseline."""
    run = chosen.runs.get(key)
    scores = {fold.fold: (fold, score) for fold in run.folds if (score := _score(fold, baseline))} if run else {}
    missing = NOT_RUN
    if run is None and not baseline and key in chosen.unfinished:
        missing = chosen.unfinished[key].status.lower()
    for number in range(FOLDS):
        printed = paper.fold_miou[number] if paper else None
        place: dict[str, Any] = {"shot": key.shot, "column": f"fold {number}", "paper": printed}
        if number in scores:
            fold, score = scores[number]
            yield Number(
                **place,
                value=100 * score.miou,
                interval=in_percent(score.miou_interval),
                state="measured",
                run_id=fold.run_id,
                note=fold.protocol.classes,
            )
        else:
            yield Number(**place, state=missing)
    whole = [score for _, score in scores.values()] if len(scores) == FOLDS else []
    some = f"{len(scores)} of {FOLDS} folds" if scores else missing
    intervals = {MEAN: run.miou_interval, FB_IOU: run.fb_iou_interval} if run and whole and not baseline else {}
    papers = {MEAN: paper.mean_miou, FB_IOU: paper.fb_iou} if paper else {}
    for column, values in {MEAN: [s.miou for s in whole], FB_IOU: [s.fb_iou for s in whole]}.items():
        if column not in table.columns:
            continue
        yield Number(
            shot=key.shot,
            column=column,
            value=100 * sum(values) / FOLDS if values else None,
            interval=in_percent(intervals.get(column)),
            state="measured" if values else some,
            paper=papers.get(column),
            run_id=run.run_id if run and values else "",
        )


def _score(fold: FoldResult, baseline: str) -> Score | None:
    return fold.baselines.get(baseline) if baseline else fold.score


@cache
def parameters(architecture: str, backbone: str, similarity: str) -> int:
    """Learnable ones of a network, counted on its code."""
    import torch

    from mshnet.architectures import build
    from mshnet.config import ModelConfig

    with torch.device("meta"):  # shapes only: nothing is allocated
        config: Any = {"architecture": architecture, "backbone": backbone, "similarity": similarity}
        model = build(ModelConfig(**config))
    return sum(parameter.numel() for parameter in model.relation.parameters())


@dataclass(frozen=True, kw_only=True)
class Behind(Record):
    """A run behind a table, and what it was trained with."""

    run_id: str
    name: str
    label: str
    folds: tuple[int, ...]
    training: str
    weights: str
    git_commit: str
    started_ms: int


def behind(chosen: Chosen) -> list[Behind]:
    """The runs of a table, in the order of its cells."""
    return [
        Behind(
            run_id=run.run_id,
            name=run.name,
            label=_cell(key),
            folds=tuple(fold.fold for fold in run.folds),
            training=training(run),
            weights=weights_of(run),
            git_commit=run.folds[0].git_commit,
            started_ms=run.started_ms,
        )
        for key, run in sorted(
            chosen.runs.items(), key=lambda item: (item[0].backbone, item[0].similarity, item[0].shot)
        )
    ]


def _cell(key: Key) -> str:
    return f"{key.backbone}, {key.similarity if key.architecture == 'mshnet' else key.architecture}, {key.shot}-shot"


def training(run: TrackedRun) -> str:
    """What it was trained with, in one line."""
    p = run.params
    return (
        f"{p.get('training.epochs', '?')} × {p.get('training.episodes_per_epoch', '?')} episodes, batch "
        f"{p.get('training.global_batch', '?')}, SGD {p.get('training.learning_rate', '?')}, "
        f"{p.get('training.schedule', '?')}, {p.get('precision', 'float32')}"
    )
