"""Keep the keys that Ceph made, in AWS's own format, and make the bucket. Called by object_store.sh at the first start.

Reads `radosgw-admin user info` on stdin, because a key on a command line could be read by every user of the machine.
"""

from __future__ import annotations

import json
import os
import sys

import boto3

UNFINISHED_UPLOAD_DAYS = 7
PROFILE = "[{name}]\naws_access_key_id = {access_key}\naws_secret_access_key = {secret_key}\n"


def main(bucket: str) -> None:
    """Write the credentials file that the environment names, then the bucket with its lifecycle rule."""
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
    main(sys.argv[1])
