"""Whether a tracking server answers this process and lets it in, found out in seconds."""

from __future__ import annotations

from mshnet.errors import InputError
from pipelines.tracking_uri import USER_VARIABLES

ANSWER_S = 10
"""How long a server may take; MLflow's own requests are repeated for minutes."""


def check(uri: str) -> None:
    """Ask a server for one experiment. Nothing is asked of a database.

    Raises InputError for a server that is not there, does not answer, or refuses.
    """
    if not uri.startswith(("http://", "https://")):
        return
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        answer = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "GET",
            params={"max_results": 1},
            max_retries=0,
            timeout=ANSWER_S,
            raise_on_status=False,
        )
    except MlflowException as error:
        raise InputError(
            f"expected a tracking server at {uri!r}, found none that answers ({_reason(str(error))}); start it, or "
            "correct --tracking-uri or MLFLOW_TRACKING_URI"
        ) from error
    if answer.status_code != 200:
        found, advice = _refusal(answer.status_code, answer.text)
        raise InputError(f"expected to be let in by the tracking server at {uri!r}, found {found}; {advice}")


def _refusal(status: int, text: str) -> tuple[str, str]:
    if status == 401:
        return "that it refuses the user and password, or that there is none (401)", f"set {USER_VARIABLES}"
    if status == 403 and "Host header" in text:
        return "that it takes no requests under this name (403)", "start it with this HOST:PORT in --allowed-hosts"
    if status == 403:
        return "that this user may not look at it (403)", "give the user a permission there, or take another one"
    return f"status {status} ({text[:200]})", "look into its log, and whether it is an MLflow server"


def _reason(text: str) -> str:
    """The last of the causes that requests' errors name inside each other."""
    return text.rpartition("(Caused by ")[2].rstrip(")").partition(": ")[2].strip("\"')") or text
