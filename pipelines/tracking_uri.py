"""Where runs are tracked, as a URI: checked, made absolute, and where its artifacts go."""

from __future__ import annotations

from pathlib import Path

from mshnet.errors import InputError

SQLITE = "sqlite:///"


def absolute(uri: str) -> str:
    """The URI, with a SQLite file's path made absolute: workers run in other folders than the driver.

    Raises InputError for what several processes cannot share: a plain folder, a database in memory.
    """
    if uri.startswith(SQLITE):
        path, question, options = uri.removeprefix(SQLITE).partition("?")
        if path not in ("", ":memory:"):
            return f"{SQLITE}{Path(path).expanduser().resolve()}{question}{options}"
    elif "://" in uri and not uri.startswith(("file:", "sqlite:")):
        return uri
    raise InputError(
        f"expected a tracking URI such as sqlite:///mlflow.db or http://HOST:5000, got {uri!r} "
        "(a plain folder or a database in memory cannot be shared by many processes)"
    )


def sqlite_file(uri: str) -> Path | None:
    """The database file of an absolute SQLite URI; None for a server."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None


def artifact_location(uri: str) -> str | None:
    """`mlartifacts` beside a SQLite file (MLflow's default is the working folder); None: a server decides."""
    file = sqlite_file(uri)
    return file.with_name("mlartifacts").as_uri() if file else None
