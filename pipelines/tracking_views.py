"""The experiment's page in MLflow: its description, and views of the table of runs with the columns that tell.

A view is a tag, as MLflow's own "Views, Save" writes it (seen in 3.17); a server that knows no views ignores it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pipelines.run_metrics import CHOSEN_ON_TEST

PAGE_TAG = "mshnet.page"
"""On an experiment whose page was written."""
VIEW_TAG = "mlflow.sharedViewState."
METRIC_PX, TAG_PX = 120, 90
SETTING = ("dataset", "shot", "backbone", "similarity", "architecture", "protocol", "selection")


@dataclass(frozen=True)
class View:
    """Columns, in order, and filter."""

    name: str
    metrics: tuple[str, ...]
    tags: tuple[str, ...]
    filter: str = ""
    order: str = "attributes.start_time"
    ascending: bool = False

    @property
    def state(self) -> str:
        """As the tag holds it."""
        widths = {f"metrics.`{name}`": METRIC_PX for name in self.metrics}
        widths |= {f"tags.`{name}`": TAG_PX for name in self.tags}
        state = {
            "searchFilter": self.filter,
            "orderByKey": self.order,
            "orderByAsc": self.ascending,
            "selectedColumns": list(widths),
            "columnOrder": list(widths),
            "columnWidths": widths,
        }
        return json.dumps({"name": self.name, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def _ends(name: str) -> tuple[str, str, str]:
    return (name, f"{name}_low", f"{name}_high")


VIEWS = {
    "cross-validations": View(
        "Cross-validations",
        (
            *_ends("mean/miou"),
            "mean/miou_minus_paper",
            "mean/fb_iou",
            "mean/baseline_prototype_miou",
            f"mean{CHOSEN_ON_TEST}/miou",
        ),
        SETTING,
    ),
    "folds": View(
        "Folds",
        (*_ends("test/miou"), "test/fb_iou", "baseline_prototype/miou", f"test{CHOSEN_ON_TEST}/miou"),
        SETTING,
        "tags.fold LIKE '%'",
        "tags.`fold`",
        ascending=True,
    ),
}
"""By the key in their address."""

DESCRIPTION = f"""\
Cross-validations of few-shot segmentation: a run each, with a run below it for every fold. IoU from 0 to 1, \
`_low` and `_high` are the ends of the 95 % interval.

[Cross-validations](PAGE?viewStateShareKey=cross-validations) · [Folds](PAGE?viewStateShareKey=folds) (also under \
"Views")

To find runs, for example: `tags.protocol = 'published' and tags.shot = '1'`, `tags.fold = '0'`, \
`tags.episodes_hash = '...'` (the very same test episodes), `metrics.\\`mean/miou\\` > 0.6`. A number whose epoch was \
chosen on the test episodes is `test{CHOSEN_ON_TEST}/miou` instead of `test/miou`.
"""


def experiment_tags(experiment_id: str) -> dict[str, str]:
    """Tags that an experiment's page is made of."""
    description = DESCRIPTION.replace("PAGE", f"#/experiments/{experiment_id}/runs")
    return {
        "mlflow.note.content": description,
        **{f"{VIEW_TAG}{key}": view.state for key, view in VIEWS.items()},
        PAGE_TAG: "1",
    }
