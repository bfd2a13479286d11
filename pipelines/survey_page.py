"""The data report: a self-contained HTML page, a Markdown file with its pictures beside it, numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mshnet.data.expectations import Expectation, words
from mshnet.data.survey_facts import ClassFacts, Survey
from pipelines.markdown import escaped, table
from pipelines.pages import rendered
from pipelines.report_page import inline_pictures
from pipelines.report_sections import Table

if TYPE_CHECKING:
    from mshnet.visualize.survey_charts import ClassBar

PAGE, TEXT, NUMBERS, CHOICE = "data_report.html", "data_report.md", "survey.json", "classes.json"
CLASSES, SIZES, TOGETHER = "pictures/classes.png", "pictures/sizes.png", "pictures/together.png"
CHARTED = 60
"""Classes in a chart, the most frequent first; a table has all of them."""
CROSSED = 40
"""Classes in the chart of those seen together."""
LISTED = 100
"""Problems on the page; the numbers have all of them."""
NOTHING = "–"
WEIGHTS = {"stops": "stops the job", "look": "have a look", "note": "good to know"}
TOGETHER_NOTES = {
    True: "Images that show a class which a fold tests are not trained on there. So classes of different folds that "
    "are often seen together cost training pairs.",
    False: "Images that show a class which a fold tests may be trained on there, that class unlabelled. So of classes "
    "of different folds that are often seen together the model has seen what it is tested on.",
}
"""By whether images that show a novel class are removed."""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Everything on the page."""

    title: str
    place: str
    """Where the data lies, as the person gave it."""
    survey: Survey
    expectations: Sequence[Expectation]
    choice: Mapping[str, Any]
    """A proposal for `--classes`."""
    removes_novel: bool
    """Whether images that show a class which a fold tests are left out of its training."""
    origin: str
    """How classes were divided into folds and pairs drawn, in words."""
    pictures: Mapping[str, bytes]
    """PNG files by their names beside the page."""
    examples: Mapping[int, str]
    """Class id to the name of its strip of examples, in the order in which they are shown."""

    def files(self) -> dict[str, bytes]:
        """All of it by name, the page included."""
        numbers = {**asdict(self.survey), "expectations": [asdict(each) for each in self.expectations]}
        return {
            PAGE: self.html().encode(),
            TEXT: ("\n".join(self.markdown()) + "\n").encode(),
            NUMBERS: json.dumps(numbers, ensure_ascii=False).encode(),
            CHOICE: (json.dumps(self.choice, ensure_ascii=False, indent=2) + "\n").encode(),
            **self.pictures,
        }

    def html(self) -> str:
        """The page."""
        context: dict[str, Any] = {
            "report": self,
            "found": self.survey,
            "headline": headline(self.survey),
            "weights": WEIGHTS,
            "classes": class_table(self.survey),
            "folds": fold_table(self.survey),
            "pairs": together_table(self.survey),
            "names": {"classes": CLASSES, "sizes": SIZES, "together": TOGETHER},
            "listed": LISTED,
            "choice_text": json.dumps(self.choice, ensure_ascii=False, indent=2),
            "choice_words": words(self.choice),
            "together_note": TOGETHER_NOTES[self.removes_novel],
            "crossed": min(CROSSED, len(self.survey.class_names)),
            "charted": CHARTED,
            "inline": inline_pictures(self.pictures),
        }
        return rendered("survey.html.j2", context)

    def markdown(self) -> Iterator[str]:
        """The same in lines."""
        found = self.survey
        yield from (f"# {escaped(self.title)}", "", escaped(headline(found)), "", "## What to expect", "")
        for each in self.expectations:
            yield f"- **{WEIGHTS[each.weight]}: {escaped(each.title)}.** {escaped(each.text)}"
        yield from ("", "## Classes", "", self._image(CLASSES, "images and object sizes by class"), "")
        yield from _table(class_table(found))
        if found.folds:
            yield from ("", "## Folds", "", escaped(self.origin), "", *_table(fold_table(found)))
        if pairs := together_table(found):
            yield from ("", "## Seen together", "", TOGETHER_NOTES[self.removes_novel], "")
            if TOGETHER in self.pictures:
                yield from (self._image(TOGETHER, "classes seen together"), "")
            yield from _table(pairs)
        yield from ("", "## Pictures", "", self._image(SIZES, "sizes of the pictures"))
        for remark in found.remarks:
            yield from ("", f"- {escaped(remark_text(remark.what, remark.images, remark.first))}")
        if found.problems:
            yield from ("", "## Problems", "")
            for problem in found.problems[:LISTED]:
                yield f"- {escaped(problem.where)}: {escaped(problem.what)}"
            if len(found.problems) > LISTED:
                yield f"- and {len(found.problems) - LISTED:,} more, in {NUMBERS}"
        yield from ("", "## Examples", "")
        for class_id, name in self.examples.items():
            yield from (f"### {escaped(found.class_names[class_id])}", "", self._image(name, "examples"), "")
        yield from ("## A proposal for --classes", "", f"{CHOICE}: {escaped(words(self.choice))}.")

    def _image(self, name: str, text: str) -> str:
        return f"![{text}]({name})" if name in self.pictures else f"*(picture missing: {name})*"


def _table(found: Table) -> Iterator[str]:
    return table(found.header, found.rows)


def headline(found: Survey) -> str:
    """The data set in a sentence."""
    folds = f", {len(found.folds)} folds" if found.folds else ""
    return (
        f"{found.images:,} images, {len(found.class_names):,} classes{folds}; "
        f"{found.smallest[1]}×{found.smallest[0]} to {found.largest[1]}×{found.largest[0]} px"
    )


def remark_text(what: str, images: int, first: str) -> str:
    """What a reader decided, and about how many images."""
    if images == 0:
        return what
    return f"{what} ({images:,} images, first {first})" if images > 1 else f"{what} ({first})"


def tested_in(found: Survey) -> dict[str, int]:
    """Class name to the fold that tests it."""
    return {name: fold.fold for fold in found.folds for name in fold.novel}


def class_table(found: Survey) -> Table:
    """A row for each class."""
    fold_of = tested_in(found)

    def row(c: ClassFacts) -> tuple[str, ...]:
        share = (
            f"{_percent(c.share.median)} ({_percent(c.share.low)} to {_percent(c.share.high)})" if c.share else NOTHING
        )
        enough = f"{c.large_enough:,}" + (" (too few)" if c in found.small else "")
        fold = fold_of.get(c.name)
        return (
            c.name,
            f"{c.images:,}",
            enough,
            f"{c.alone:,}",
            f"{c.pixels:,}",
            share,
            f"{c.tiny:,}",
            NOTHING if fold is None else str(fold),
        )

    header = (
        "class",
        "images",
        f"with {found.min_object_px:,} px or more",
        "alone",
        "pixels",
        "of the picture, median (10 to 90 %)",
        "tiny",
        "tested in fold",
    )
    return Table(header, tuple(row(c) for c in found.classes))


def fold_table(found: Survey) -> Table:
    """A row for each fold."""
    rows = []
    for fold in found.folds:
        most = next(iter(fold.removed_by), "")
        removed = f"{fold.removed_pairs:,}" + (f" (most: {most})" if most else "")
        rows.append(
            (
                f"fold {fold.fold}",
                _short(fold.novel),
                f"{len(fold.training_classes)}" + (f" + {len(fold.held_out)} held out" if fold.held_out else ""),
                f"{fold.training_pairs:,}",
                removed,
                f"{fold.test_pairs:,} of {fold.test_images:,} images",
                _percent(fold.marked_all),
            )
        )
    header = (
        "",
        "tests",
        "classes trained on",
        "training pairs",
        "left out: a novel class is seen",
        "test pairs",
        "marking all, mIoU",
    )
    return Table(header, tuple(rows))


def together_table(found: Survey, most: int = 12) -> Table | None:
    """Pairs of classes that are often seen in one image, those of different folds; None where there is none."""
    fold_of = tested_in(found)
    pairs = [
        (count, a, b)
        for a, row in enumerate(found.together)
        for b, count in enumerate(row[:a])
        if count and fold_of.get(found.class_names[a]) != fold_of.get(found.class_names[b])
    ]
    rows = []
    for count, a, b in sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:most]:
        names = found.class_names[b], found.class_names[a]
        folds = [fold_of.get(name) for name in names]
        shares = [_percent(count / max(1, found.classes[c].images)) for c in (b, a)]
        where = ", ".join(NOTHING if fold is None else str(fold) for fold in folds)
        rows.append((f"{names[0]}, {names[1]}", f"{count:,}", *shares, where))
    header = ("classes of different folds", "images with both", "of the first's", "of the second's", "folds")
    return Table(header, tuple(rows)) if rows else None


def charts(found: Survey) -> dict[str, bytes]:
    """PNG files by name."""
    import numpy as np

    from mshnet.data.survey_facts import TINY_PX
    from mshnet.visualize.survey_charts import class_chart, size_chart, together_chart

    frequent = sorted(found.classes, key=lambda c: (-c.large_enough, -c.images, c.class_id))
    drawn = {
        CLASSES: class_chart([_bar(found, c) for c in frequent[:CHARTED]], TINY_PX / found.image_size_px**2),
        SIZES: size_chart({(height, width): count for height, width, count in found.sizes}, found.image_size_px),
    }
    fold_of = tested_in(found)
    crossed = sorted(frequent[:CROSSED], key=lambda c: (fold_of.get(c.name, len(found.folds)), c.class_id))
    together = np.array(found.together)
    if len(crossed) > 1 and (together - np.diag(np.diag(together))).any():
        ids = [c.class_id for c in crossed]
        drawn[TOGETHER] = together_chart([c.name for c in crossed], together[np.ix_(ids, ids)])
    return drawn


def _bar(found: Survey, c: ClassFacts) -> ClassBar:
    from mshnet.visualize.survey_charts import ClassBar

    share = (c.share.low, c.share.median, c.share.high) if c.share else None
    fold = tested_in(found).get(c.name)
    return ClassBar(name=c.name, images=c.images, large_enough=c.large_enough, share=share, fold=fold)


Load = Callable[[str, int], tuple[Any, Any]]
"""Image id and class id to its picture (H W 3, 8-bit) and the class's mask (H W)."""


def strip(wanted: Sequence[tuple[str, float]], class_id: int, load: Load) -> bytes:
    """PNG: examples of a class by (image id, share of the picture)."""
    from mshnet.visualize import png_bytes
    from mshnet.visualize.survey_pictures import Example, example_strip

    shown = []
    for image_id, share in wanted:
        image, mask = load(image_id, class_id)
        shown.append(Example(image=image, mask=mask, caption=f"{_percent(share)} of the picture"))
    return png_bytes(example_strip(shown))


def strip_name(class_id: int) -> str:
    """Of a class's examples: its number, as names may hold anything."""
    return f"pictures/class-{class_id:04d}.png"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def _short(names: Sequence[str], most: int = 8) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
