"""The tracker's users, as infra/services.sh wants them: the administrator, and whom the cluster's secrets name.

Called after each start with the server's address and the connection string of its users' database. The administrator's
password comes on stdin, the other user's from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.error
import urllib.request

API = "/api/2.0"
USERS = "/mlflow/users"
ADMINISTRATOR = "admin"
SHORTEST_PASSWORD = 12  # MLflow refuses shorter ones
OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # never by a proxy


def ask(
    server: str, who: tuple[str, str], method: str, path: str, body: dict[str, str] | None = None, timeout_s: float = 60
) -> int:
    """The status of one request to MLflow's API. Nobody's name is empty."""
    headers = {"Content-Type": "application/json"}
    if who[0]:
        headers["Authorization"] = f"Basic {base64.b64encode(':'.join(who).encode()).decode()}"
    data = json.dumps(body).encode() if body is not None else None
    try:
        with OPEN(
            urllib.request.Request(server + API + path, data, headers, method=method), timeout=timeout_s
        ) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def set_password(users: str, name: str, password: str) -> None:
    """Write it to the database, past the server: after a restore nobody may be able to log in."""
    import psycopg2
    from werkzeug.security import generate_password_hash

    with psycopg2.connect(users) as database, database.cursor() as rows:
        rows.execute(
            "UPDATE users SET password_hash = %s WHERE username = %s", (generate_password_hash(password), name)
        )


def see_to_user(server: str, administrator: tuple[str, str], user: tuple[str, str]) -> None:
    """Make the user, or give it the password that is in the secrets now."""
    name, password = user
    if len(password) < SHORTEST_PASSWORD:
        sys.exit(
            f"MLFLOW_TRACKING_PASSWORD must have at least {SHORTEST_PASSWORD} characters, got {len(password)};"
            " infra/secrets.sh makes one"
        )
    if ":" in name or not user[0].isascii() or not password.isascii():
        sys.exit("MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD must be ASCII, the name without ':'")
    if ask(server, user, "GET", f"{USERS}/current") == 200:
        return
    status = ask(server, administrator, "POST", f"{USERS}/create", {"username": name, "password": password})
    if status == 400:  # it is there already
        status = ask(
            server, administrator, "PATCH", f"{USERS}/update-password", {"username": name, "password": password}
        )
    if status != 200:
        sys.exit(f"MLflow answered {status} when the user '{name}' was made")


def main(server: str, users: str) -> None:
    """See to both users."""
    administrator = (ADMINISTRATOR, sys.stdin.read().strip())
    if ask(server, administrator, "GET", f"{USERS}/current") != 200:
        set_password(users, *administrator)
    name, password = (os.environ.get(f"MLFLOW_TRACKING_{part}", "") for part in ("USERNAME", "PASSWORD"))
    if name == ADMINISTRATOR:
        sys.exit(f"MLFLOW_TRACKING_USERNAME must not be '{ADMINISTRATOR}', which is the administrator's own name")
    if name and password:
        see_to_user(server, administrator, (name, password))
    else:
        print(
            "services: nobody but the administrator can log in to MLflow yet; infra/secrets.sh makes a user,"
            " the next start takes it over",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
