"""The errors that a user can mend; everything else is a bug and keeps its traceback."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: the message says what was expected, what was found and what to do."""


class DatasetNotFoundError(InputError):
    """No data set where the user pointed."""
