"""Use a service as its clients do, where a shell cannot. Called by `infra/services.sh check`; exit code 1 if it fails.

`storage URI` puts an object there, gets and removes it. `tracker ADDRESS` looks whether MLflow refuses strangers and
serves who logs in, down to the artifacts; the administrator's password comes on stdin.
"""

from __future__ import annotations

import os
import sys
import uuid

import tracker_users

TIMEOUT_S = 20


def storage(uri: str) -> None:
    """Put, get, remove."""
    import boto3
    import botocore.config
    import botocore.exceptions

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    config = botocore.config.Config(
        connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S, retries={"mode": "standard", "max_attempts": 2}
    )
    s3 = boto3.client("s3", config=config)
    body = uuid.uuid4().hex
    place = {"Bucket": bucket, "Key": f"{prefix.strip('/')}/.check-{body}".lstrip("/")}
    try:
        s3.put_object(**place, Body=body.encode())
        got = s3.get_object(**place)["Body"].read().decode()
        s3.delete_object(**place)
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        sys.exit(str(error))
    if got != body:
        sys.exit(f"put '{body}', got '{got}'")


def tracker(server: str) -> None:
    """A stranger, the administrator, the cluster's user."""
    administrator = (tracker_users.ADMINISTRATOR, sys.stdin.read().strip())
    name, password = (os.environ.get(f"MLFLOW_TRACKING_{part}", "") for part in ("USERNAME", "PASSWORD"))
    experiments, artifacts = "/mlflow/experiments/search?max_results=1", "/mlflow-artifacts/artifacts?path=."
    asked = [
        ("without a log-in", ("", ""), experiments, 401),
        ("as administrator", administrator, experiments, 200),
        ("as administrator, for the artifacts", administrator, artifacts, 200),
    ]
    if name and password:
        asked.append((f"as '{name}'", (name, password), experiments, 200))
    for who, log_in, path, expected in asked:
        try:
            status = tracker_users.ask(server, log_in, "GET", path, timeout_s=TIMEOUT_S)
        except OSError as error:  # no connection, or no answer in time
            sys.exit(f"asked {who}: {error}")
        if status != expected:
            sys.exit(f"asked {who}, it must answer {expected}, got {status}")


if __name__ == "__main__":
    {"storage": storage, "tracker": tracker}[sys.argv[1]](sys.argv[2])
