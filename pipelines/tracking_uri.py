"""Where runs are tracked, as a URI: checked, made absolute, and where its artifacts go."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mshnet.data.filesystem import secret_in
from mshnet.errors import InputError

SQLITE = "sqlite:///"
VARIABLE = "MLFLOW_TRACKING_URI"
USER_VARIABLES = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
_LOCAL = f"{SQLITE}outputs/mlflow.db"
_USER = re.compile(r"://[^/:@]*@")
_PASSWORD = re.compile(r"://[^/@]*:[^@]*@")  # of a database: also one that looks like HOST:PORT and has a slash


def absolute(uri: str) -> str:
    """The URI, with a SQLite file's path made absolute: workers run in other folders than the driver.

    An empty one is what MLFLOW_TRACKING_URI names, else outputs/mlflow.db.

    Raises InputError for what several processes cannot share (a plain folder, a database in memory), and, without
    repeating it, for one with a password or token in it.
    """
    uri = uri or os.environ.get(VARIABLE, "") or _LOCAL
    _refuse_secrets(uri)
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


def _refuse_secrets(uri: str) -> None:
    if uri.lower().startswith(("http://", "https://")):
        found = secret_in(uri)
        advice = f"set {USER_VARIABLES}"
    else:  # a database's user alone is no secret
        found = "a password before the @" if _PASSWORD.search(uri) else secret_in(_USER.sub("://", uri))
        advice = "run an MLflow server in front of the database (or, for PostgreSQL, set PGPASSWORD)"
    if found:
        raise InputError(
            f"expected a tracking URI without credentials, found {found}; it is recorded with every run, so give the "
            f"bare URI and {advice}"
        )


def sqlite_file(uri: str) -> Path | None:
    """The database file of an absolute SQLite URI; None for a server."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None


def artifact_location(uri: str) -> str | None:
    """`mlartifacts` beside a SQLite file (MLflow's default is the working folder); None: a server decides."""
    file = sqlite_file(uri)
    return file.with_name("mlartifacts").as_uri() if file else None
