"""Into which folds the classes are divided: as the field does, or, of one's own data, by rule or by the user's file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from mshnet.data.class_choice import ClassChoice, read_class_choice
from mshnet.data.folds import Partition, given_partition, published_partition, stratified_partition
from mshnet.errors import InputError
from pipelines.config import CrossValidationConfig

RULE_VERSION = 1
"""Raise it when the rule would give other folds."""


def check(config: CrossValidationConfig) -> None:
    """InputError where the file of --classes gives other folds than as many as --fold-count says."""
    choice = _choice(config)
    if choice.folds and len(choice.folds) != config.own.fold_count:
        raise InputError(
            f"expected the {len(choice.folds)} folds that {config.own.classes!r} gives, found --fold-count "
            f"{config.own.fold_count}; leave the flag out, or take the folds out of the file"
        )


def check_classes(config: CrossValidationConfig, class_names: tuple[str, ...]) -> None:
    """InputError where the folds cannot be of these classes, before it is known how many images show each."""
    partition(config, class_names, dict.fromkeys(class_names, 1))


def partition(
    config: CrossValidationConfig, class_names: tuple[str, ...], images_per_class: Mapping[str, int]
) -> Partition:
    """The folds of a data set with these classes; `images_per_class` (by name) is what the rule goes by.

    InputError where the classes are too few for the folds, or the user's file does not fit them.
    """
    if not config.is_own:
        return published_partition(config.dataset)
    counts = [images_per_class.get(name, 0) for name in class_names]
    if given := _choice(config).folds:
        return given_partition(class_names, given, counts)
    return stratified_partition(class_names, counts, config.own.fold_count, config.own.fold_seed)


def key(config: CrossValidationConfig) -> list[Any]:
    """What the folds depend on beside the data, for fingerprints; nothing for the field's data sets."""
    if not config.is_own:
        return []
    if given := _choice(config).folds:
        return ["folds", [sorted(names) for names in given]]
    return ["folds", RULE_VERSION, config.own.fold_count, config.own.fold_seed]


def _choice(config: CrossValidationConfig) -> ClassChoice:
    return _read(config.own.classes) if config.own.classes else ClassChoice()


@cache
def _read(uri: str) -> ClassChoice:
    return read_class_choice(uri)
