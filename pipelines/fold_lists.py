"""Which pairs a fold trains and tests on: the lists, less what shows a novel class, and what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mshnet.errors import InputError
from pipelines import own_folds
from pipelines.config import CrossValidationConfig

if TYPE_CHECKING:
    from mshnet.data.folds import Partition
    from mshnet.data.splits import Pair, SplitLists
    from mshnet.data.store.images import ImageStore


@dataclass(frozen=True)
class FoldLists:
    """A fold's lists, checked against the store."""

    train: tuple[Pair, ...]
    """After removal."""
    val: tuple[Pair, ...]
    origin: str
    removed: int
    held_out: tuple[int, ...]
    """Base classes kept out of training for choosing the best epoch."""
    base: tuple[int, ...]
    """The other base classes."""
    novel: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def training(self) -> list[Pair]:
        return [pair for pair in self.train if pair[1] in self.base]

    @property
    def to_choose_on(self) -> list[Pair]:
        """Of the classes that are held out."""
        return [pair for pair in self.train if pair[1] in self.held_out]


def read_fold(config: CrossValidationConfig, fold: int, images: ImageStore) -> FoldLists:
    """A fold's lists. InputError where they name images that the store has not, or classes are too small."""
    from mshnet.data import splits

    contents = images.contents()
    partition = own_folds.partition(config, images.manifest.class_names, images.manifest.images_per_class)
    lists = split_lists(config, partition, fold, contents)
    absent = sorted({image_id for image_id, _ in (*lists.train, *lists.val)} - set(images.image_ids))
    if absent:
        raise InputError(
            f"expected every image of the split lists in the source, found {len(absent)} missing "
            f"(first: {absent[0]}); give the lists made for this source, or leave --split-lists empty to derive them"
        )
    if config.is_own and not config.skip_small_classes:
        _refuse_small(config, partition, lists)
    kept = lists.train
    if config.removes_novel:
        present = {image_id: set(px) for image_id, _, px in contents}
        kept = splits.without_novel(kept, present, partition.tested(fold))
    held_out: tuple[int, ...] = ()
    if config.selection == "base":
        held_out = without_small(config, partition, kept).held_out(
            fold, config.validation.held_out_classes, config.training.seed
        )
    return FoldLists(
        train=kept,
        val=lists.val,
        origin=lists.origin,
        removed=len(lists.train) - len(kept),
        held_out=held_out,
        base=tuple(c for c in partition.base(fold) if c not in held_out),
        novel=partition.tested(fold),
        names=images.manifest.class_names,
    )


def split_lists(
    config: CrossValidationConfig, partition: Partition, fold: int, contents: Sequence[tuple[str, str, dict[int, int]]]
) -> SplitLists:
    """All pairs of a fold: of the field's files, or by rule from what the images show (`ImageStore.contents`)."""
    from mshnet.data import splits

    if config.is_own:
        divided = not config.removes_novel
        return splits.own_split_lists(partition, fold, contents, config.min_object_px, divided=divided)
    if config.split_lists:
        return splits.read_split_lists(config.dataset, config.split_lists, fold)
    return splits.derive_split_lists(config.dataset, fold, contents, config.min_object_px)


def without_small(config: CrossValidationConfig, partition: Partition, train: Sequence[Pair]) -> Partition:
    """Of one's own data, what can be held out: on classes with too few images nothing can be chosen."""
    from mshnet.data.episodes import small_classes

    if not config.is_own:
        return partition
    small = small_classes(train, range(len(partition.names)), config.shot)
    return replace(partition, idle=tuple(small))


def _refuse_small(config: CrossValidationConfig, partition: Partition, lists: SplitLists) -> None:
    """Of one's own data all at once, of whatever fold, as it is the data that is to be mended."""
    from mshnet.data.episodes import small_classes

    taking_part = [c for c in range(len(partition.names)) if c not in partition.idle]
    small = small_classes([*lists.train, *lists.val], taking_part, config.shot)
    if small:
        named = ", ".join(f"{partition.names[c]} ({found})" for c, found in small.items())
        raise InputError(
            f"expected {config.shot + 1} images or more of every class for {config.shot}-shot episodes, each with "
            f"{config.min_object_px} px of it or more, found fewer of {named}; leave these classes out "
            "(--skip-small-classes), merge them with others or take their objects for background (--classes FILE), "
            "or lower --shot or --min-object-px"
        )
