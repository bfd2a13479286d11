"""The account of object_store.sh: its keys, in AWS's own format, and its bucket. Called at the first start.

Secrets come on stdin, because a key on a command line could be read by every user of the machine:
`bucket NAME` reads `radosgw-admin user info`, `keys` an access key, a secret key and `radosgw-admin metadata get`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

UNFINISHED_UPLOAD_DAYS = 7
PROFILE = "[{name}]\naws_access_key_id = {access_key}\naws_secret_access_key = {secret_key}\n"


def put_keys() -> None:
    """Print Ceph's record of the account with the given pair of keys in place of its own."""
    access_key, secret_key = sys.stdin.readline().strip(), sys.stdin.readline().strip()
    record = json.load(sys.stdin)
    record["data"]["keys"] = [
        {"user": record["data"]["user_id"], "access_key": access_key, "secret_key": secret_key},
    ]
    json.dump(record, sys.stdout)


def make_bucket(bucket: str) -> None:
    """Write the credentials file that the environment names, then the bucket with its lifecycle rule."""
    import boto3

    key = json.load(sys.stdin)["keys"][0]
    path = os.environ["AWS_SHARED_CREDENTIALS_FILE"]
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(PROFILE.format(name=bucket, access_key=key["access_key"], secret_key=key["secret_key"]))
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=bucket)  # no error if it is there already and ours
    rule = {
        "ID": "unfinished uploads",
        "Status": "Enabled",
        "Filter": {"Prefix": ""},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": UNFINISHED_UPLOAD_DAYS},
    }
    s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [rule]})


if __name__ == "__main__":
    verbs: dict[str, Callable[..., None]] = {"keys": put_keys, "bucket": make_bucket}
    verb, *names = sys.argv[1:]
    verbs[verb](*names)
