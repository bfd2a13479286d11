"""What a person reads in MLflow: the description of a run, a model version and a registered model, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipelines import paper_numbers
from pipelines.conditions import Conditions
from pipelines.config import CrossValidationConfig
from pipelines.fold_table import (
    CHOSEN_ON_TEST_NOTE,
    LABELS,
    NOTHING,
    fact_table,
    in_percent,
    interval_text,
    novel_images,
    percent,
    setting,
    table_header,
    table_rows,
    trained_label,
)
from pipelines.markdown import escaped, table
from pipelines.model_card import CARD
from pipelines.results import BASELINES, CrossValidation, FoldResult, Interval, Score

REPORT = "report/report.html"
"""The report among the parent run's artifacts."""
OUTCOMES = "outcomes.arrow"
"""Every episode's counts, among a fold's run's."""
INTERVALS = "95 % intervals: bootstrap over the test episodes."


@dataclass(frozen=True, kw_only=True)
class FoldPage:
    """A fold with all that its pages say of it."""

    config: CrossValidationConfig
    result: FoldResult
    conditions: Conditions
    links: dict[str, str]
    """Addresses within MLflow's UI by what they lead to."""

    @property
    def paper(self) -> paper_numbers.PaperRow | None:
        """The paper's row for the same setting."""
        config = self.config
        if config.model.architecture != "mshnet":
            return None
        return paper_numbers.paper_row(config.dataset, config.model.backbone, config.model.similarity, config.shot)

    def of_run(self) -> str:
        """Of the fold's run."""
        result = self.result
        lines = [
            *self._head(),
            *self._scores(),
            *("", "**By class and size**", ""),
            *_details(result),
            "**How it was measured**",
            "",
            *table(["", ""], self.measured()),
            "",
            f"Artifacts: `{CARD}` (its model card), `fold.json` (all numbers), `protocol.json`, `{OUTCOMES}` (every "
            "episode's counts), `pictures/` (charts, panels, failures, energy maps).",
        ]
        return "\n".join(lines) + "\n"

    def of_version(self) -> str:
        """Of the fold's model version."""
        result = self.result
        data = [
            ["data", f"{self.config.data_title}, fingerprint {self.conditions.data_fingerprint[:12]}"],
            ["trained on", _training(result)],
            ["commit", result.git_commit],
        ]
        rows = [*self.measured(), *data]
        lines = [
            *self._head(),
            *self._scores(),
            *("", "**How it was measured and made**", ""),
            *table(["", ""], rows),
            "",
            _use(self.config.model_name, f"fold{self.result.fold}"),
        ]
        return "\n".join(lines) + "\n"

    def _head(self) -> Iterator[str]:
        config, score = self.config, self.result.score
        network = f"{trained_label(config.model.architecture, self.result.given)} ({config.model.label})"
        yield (
            f"mIoU {_iou(score.miou, score.miou_interval)}, FB-IoU {_iou(score.fb_iou, score.fb_iou_interval)}: "
            f"{escaped(config.data_title)} fold {self.result.fold}, {config.shot}-shot, {network}"
        )
        if self.result.chosen_on_test:
            yield from ("", f"**{CHOSEN_ON_TEST_NOTE}**: not to be compared with a number that was not.")
        yield from ("", " · ".join(f"[{escaped(name)}]({address})" for name, address in self.links.items()), "")

    def _scores(self) -> Iterator[str]:
        yield from table(["IoU, %", "mIoU", "95 % interval", "FB-IoU"], self.score_rows())

    def score_rows(self) -> list[list[str]]:
        """What was measured: label, mIoU, its interval, FB-IoU, in %."""

        def row(label: str, score: Score | None) -> list[str]:
            if score is None:
                return [label, NOTHING, NOTHING, NOTHING]
            interval = interval_text(in_percent(score.miou_interval))
            return [label, percent(100 * score.miou), interval, percent(100 * score.fb_iou)]

        rows = [row(trained_label(self.config.model.architecture, self.result.given), self.result.score)]
        rows += [row(LABELS[name], self.result.baselines.get(name)) for name in BASELINES]
        rows += [
            row(f"trained, judged with {shots} {'support' if shots == '1' else 'supports'}", score)
            for shots, score in self.result.other_shots.items()
        ]
        if self.paper:
            label = f"paper, table {self.paper.table}"
            rows.append([label, percent(self.paper.fold_miou[self.result.fold]), NOTHING, NOTHING])
        return rows

    def measured(self) -> list[list[str]]:
        """How it was measured."""
        protocol = self.conditions.protocol
        return [
            ["test classes", ", ".join(self.result.novel_classes)],
            ["test episodes", f"{protocol.name}: {protocol.label}"],
            ["episodes hash", self.conditions.episodes_hash],
            ["epoch chosen", protocol.selection],
            ["split lists", protocol.split_lists],
            ["training images with a novel class", novel_images(self.result)],
            ["masks", protocol.mask_mode],
        ]


def of_cross_validation(result: CrossValidation, links: dict[str, str]) -> str:
    """Of the parent run: the fold table with intervals, how it was measured, where the rest is."""
    rows = []
    for row in table_rows(result):
        rows.append([row.label, *row.cells])
        if row.intervals:
            rows.append(["95 % interval", *map(interval_text, row.intervals)])
    lines = [
        f"mean mIoU {_iou(result.mean_miou, result.miou_interval)}, "
        f"FB-IoU {_iou(result.mean_fb_iou, result.fb_iou_interval)}: {escaped(setting(result))}",
        *(["", f"**{CHOSEN_ON_TEST_NOTE}**"] if result.chosen_on_test else []),
        "",
        " · ".join(f"[{escaped(name)}]({address})" for name, address in links.items()),
        "",
        *table(["mIoU, %", *table_header(result)], rows),
        "",
        INTERVALS,
        "",
        *table(*fact_table(result)),
        "",
        f"Commit `{escaped(result.git_commit)}`, data `{escaped(result.fingerprints.get('data', ''))[:12]}`. "
        "Artifacts: `report/`, `cross_validation.json`, `config.json`.",
    ]
    return "\n".join(lines) + "\n"


def of_model(config: CrossValidationConfig) -> str:
    """Of the registered model: what its versions and aliases are, and how one is used."""
    aliases = ", ".join(f"`fold{fold}`" for fold in range(config.fold_total))
    network = trained_label(config.model.architecture, bool(config.trained))
    return f"""Few-shot segmentation: {network} on {escaped(config.data_title)}, \
{config.model.backbone}, {config.shot}-shot. A version is one fold's network; its page has the numbers, and how they \
were measured.

**Aliases** {aliases}: of each fold the version with the highest mIoU among those that were measured under the same \
conditions (protocol, test episodes, data: the tag `conditions`). A version measured under others is not \
comparable: the alias stays, and the log says what differs.

**Alias** `champion`: the version to use. Of the cross-validation with the highest mean mIoU under the same conditions \
it is the fold that leads prototype matching, which needs no training, by most.

**Classes** A fold's network was trained without the fold's own classes. It segments whatever its labelled \
examples show, of any class.

{_use(config.model_name, "champion")}
"""


def _use(model_name: str, alias: str) -> str:
    return f"""**Use**

```python
model = mlflow.pyfunc.load_model("models:/{model_name}@{alias}")
masks = model.predict(table)["mask"]
```

A row is one query: `query` (PNG or JPEG, base64), `supports` (JSON list of k labelled images, base64), `masks` \
(JSON list of their masks: base64 PNG, object pixels not 0, or COCO run lengths). The answer's `mask` is a base64 PNG \
of the query's size, 255 where the object is; with `params={{"output": "rle"}}` it is COCO's run lengths, with \
`"threshold"` (0.5) the probability from which a pixel is the object's.

Over HTTP: `mlflow models serve --env-manager local --model-uri "models:/{model_name}@{alias}"`. Pictures from disk, \
without MLflow: `mshnet segment --model "models:/{model_name}@{alias}" --help`."""


def _details(result: FoldResult) -> Iterator[str]:
    """Per class and per size of the object."""
    score = result.score
    rows = [
        [name, percent(100 * value), interval_text(in_percent(score.class_interval.get(name)))]
        for name, value in score.class_iou.items()
    ]
    rows += [
        [f"{size} objects", percent(100 * found.miou), f"{found.episodes} episodes"]
        for size, found in score.by_size.items()
    ]
    rows += _seeds(result.protocol.seeds, score.by_seed)
    yield from table(["IoU, %", "", "95 % interval"], rows)
    yield from ("", INTERVALS, "")


def _seeds(seeds: Sequence[int], by_seed: Sequence[float]) -> list[list[str]]:
    if len(by_seed) < 2:
        return []
    return [[f"seed {seed}", percent(100 * value), NOTHING] for seed, value in zip(seeds, by_seed, strict=True)]


def _training(result: FoldResult) -> str:
    if result.given:
        return "not known: the weights were given"
    return f"{result.train_episodes:,} episodes, epoch {result.best_epoch} kept"


def _iou(value: float, interval: Interval | None) -> str:
    """In %, with its interval where there is one, in no marks: lists show a description's first line as it is."""
    ends = f" ({percent(100 * interval.low)} to {percent(100 * interval.high)})" if interval else ""
    return f"{percent(100 * value)} %{ends}"
