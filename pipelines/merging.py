"""Several cross-validations as one graph: what they share runs once, and their trainings take turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pipelines.cells import Cell
from pipelines.dag import Stage
from pipelines.graph import Graph


@dataclass(frozen=True)
class Part:
    """A cell's share of the graph."""

    reported: Stage
    """Its last stage."""
    registered: tuple[Stage, ...]
    """Its folds', in order."""

    @property
    def names(self) -> list[str]:
        """Of all its stages, shared ones included, what is needed first."""
        return [stage.name for stage in upstream(self.reported)]


def upstream(target: Stage) -> Iterator[Stage]:
    """A stage and all that it needs, what is needed first; by result, so one of each."""
    seen: set[str] = set()

    def visit(stage: Stage) -> Iterator[Stage]:
        if stage.result not in seen:
            seen.add(stage.result)
            for need in stage.needs:
                yield from visit(need)
            yield stage

    yield from visit(target)


def merge(graphs: Mapping[Cell, Graph], at_once: int) -> dict[Cell, Part]:
    """Graphs built one by one (`graph.build`, without an order of the trainings), as parts of one.

    Stages with the same result become one. A name begins with what the stage is for: "pascal: seal the store",
    "pascal 1-shot: draw test episodes of fold 0", "pascal 1-shot resnet50 both: train fold 0". Of the folds that
    are still to train, `at_once` are trained and judged at any time, in the cells' order.
    """
    names = _names(graphs)
    folds = [fold for graph in graphs.values() for fold in zip(graph.trained, graph.evaluated, strict=True)]
    # A fold is judged before the next one takes its room, or all would be judged at the very end.
    pending = {trained.result: (trained, evaluated) for trained, evaluated in folds if trained.recorded() is None}
    queue = list(pending)
    made: dict[str, Stage] = {}

    def renamed(stage: Stage) -> Stage:
        if stage.result not in made:
            after: tuple[Stage, ...] = ()
            if stage.result in pending and (place := queue.index(stage.result)) >= at_once:
                after = (renamed(pending[queue[place - at_once]][1]),)
            needs = tuple(renamed(need) for need in stage.needs)
            made[stage.result] = replace(stage, name=names[stage.result], needs=needs, after=after)
        return made[stage.result]

    for result in queue:  # in turn, so that none is reached through a long row of others
        renamed(pending[result][0])
    return {
        cell: Part(renamed(graph.reported), tuple(renamed(stage) for stage in graph.registered))
        for cell, graph in graphs.items()
    }


def _names(graphs: Mapping[Cell, Graph]) -> dict[str, str]:
    """A name for each result, different for different ones."""
    names: dict[str, str] = {}
    for cell, graph in graphs.items():
        images = {stage.result for stage in upstream(graph.sealed)}
        drawn = {stage.result for stage in (*graph.drawn_training, *graph.drawn_test)}
        for stage in upstream(graph.reported):
            if stage.result not in names:
                scope = cell.words[:1] if stage.result in images else cell.words[:2] if stage.result in drawn else ()
                name = f"{' '.join(scope) or cell.label}: {stage.name}"
                # Within one cell names are different, so its whole label makes this one so.
                names[stage.result] = f"{cell.label}: {stage.name}" if name in names.values() else name
    return names
