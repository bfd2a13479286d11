"""The errors that a user can mend or must know of; everything else is a bug and keeps its traceback."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: the message says what was expected, what was found and what to do."""


class DatasetNotFoundError(InputError):
    """No data set where the user pointed."""


class TrainingDivergedError(RuntimeError):
    """A loss or gradient that is not finite: the message names fold, update, losses and episodes. Not worth a retry."""
