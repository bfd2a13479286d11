"""Who may do what on AWS: the policies of the cluster's roles, its bucket and its operator. For aws_access.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aws_cluster_file import Wanted

CLUSTER_TAG = "ray-cluster-name"  # Ray's own, on every instance that it starts

Json = dict[str, Any]


@dataclass(frozen=True)
class Names:
    """How an account in a region names things: ARNs."""

    partition: str
    region: str
    account: str

    def ec2(self, name: str) -> str:
        """Something of EC2."""
        return f"arn:{self.partition}:ec2:{self.region}:{self.account}:{name}"

    def iam(self, name: str) -> str:
        """Something of IAM, which knows no regions."""
        return f"arn:{self.partition}:iam::{self.account}:{name}"

    def s3(self, bucket: str) -> str:
        """A bucket; the names of buckets are the world's."""
        return f"arn:{self.partition}:s3:::{bucket}"

    def public(self, service: str, name: str) -> str:
        """Something that belongs to no account, such as an image or the parameter that names it."""
        return f"arn:{self.partition}:{service}:{self.region}::{name}"


def trust() -> Json:
    """Who may take on the roles: EC2 for its instances."""
    return _document([{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}])


def worker_policy(wanted: Wanted, names: Names) -> Json:
    """A worker reads and writes the bucket, nothing else."""
    return _document(_bucket_statements(wanted, names))


def head_policy(wanted: Wanted, names: Names) -> Json:
    """The head also does what Ray's autoscaler does, with instances of this cluster that are what they should be."""
    start: list[Json] = [
        {
            "Sid": "StartOnlyThisClustersWorkers",
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": names.ec2("instance/*"),
            "Condition": {
                "StringEquals": {f"aws:RequestTag/{CLUSTER_TAG}": wanted.cluster, "ec2:MetadataHttpTokens": "required"},
                "ArnEquals": {"ec2:InstanceProfile": names.iam(f"instance-profile/{wanted.worker_profile}")},
            },
        },
        {
            "Sid": "StartWithEncryptedVolumes",
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": names.ec2("volume/*"),
            "Condition": {"Bool": {"ec2:Encrypted": "true"}},
        },
        {
            "Sid": "StartInTheClustersGroup",
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": names.ec2("security-group/*"),
            "Condition": {"StringEquals": {f"aws:ResourceTag/{CLUSTER_TAG}": wanted.cluster}},
        },
        {
            "Sid": "StartFrom",
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": [
                names.ec2("subnet/*"),
                names.ec2("network-interface/*"),
                names.ec2(f"key-pair/{wanted.key}*"),
                names.ec2("spot-instances-request/*"),
                names.public("ec2", "image/*"),
                names.public("ec2", "snapshot/*"),
            ],
        },
        {
            "Sid": "TagWhatIsStarted",
            "Effect": "Allow",
            "Action": "ec2:CreateTags",
            "Resource": [names.ec2("instance/*"), names.ec2("volume/*")],
            "Condition": {"StringEquals": {"ec2:CreateAction": "RunInstances"}},
        },
        {
            "Sid": "LeadThisClustersInstances",
            "Effect": "Allow",
            "Action": ["ec2:CreateTags", "ec2:StartInstances", "ec2:StopInstances", "ec2:TerminateInstances"],
            "Resource": names.ec2("instance/*"),
            "Condition": {"StringEquals": {f"aws:ResourceTag/{CLUSTER_TAG}": wanted.cluster}},
        },
        # EC2 knows no narrower permission to look.
        {"Sid": "Look", "Effect": "Allow", "Action": "ec2:DescribeInstances", "Resource": "*"},
        {
            "Sid": "GiveWorkersTheirRole",
            "Effect": "Allow",
            "Action": "iam:PassRole",
            "Resource": names.iam(f"role/{wanted.worker_profile}"),
            "Condition": {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
        },
    ]
    return _document([*start, *_image_statements(wanted, names), *_bucket_statements(wanted, names)])


def operator_policy(wanted: Wanted, names: Names) -> Json:
    """What this program, `ray up`, `ray dashboard` and `ray down` do on the operator's machine."""
    roles = [names.iam(f"{kind}/{name}") for kind in ("role", "instance-profile") for name in wanted.roles]
    iam = [
        "CreateRole", "GetRole", "TagRole", "UpdateAssumeRolePolicy", "DeleteRole",
        "PutRolePolicy", "GetRolePolicy", "DeleteRolePolicy",
        "CreateInstanceProfile", "GetInstanceProfile", "TagInstanceProfile", "DeleteInstanceProfile",
        "AddRoleToInstanceProfile", "RemoveRoleFromInstanceProfile",
    ]  # fmt: skip
    ec2 = [
        "DescribeInstances", "DescribeInstanceTypes", "DescribeSubnets", "DescribeSecurityGroups", "DescribeKeyPairs",
        "CreateSecurityGroup", "AuthorizeSecurityGroupIngress", "RevokeSecurityGroupIngress", "DeleteSecurityGroup",
        "CreateKeyPair", "DeleteKeyPair",
        "RunInstances", "StartInstances", "StopInstances", "TerminateInstances", "CreateTags",
    ]  # fmt: skip
    s3 = [
        "CreateBucket", "ListBucket", "GetBucketTagging", "PutBucketTagging",
        "GetBucketPublicAccessBlock", "PutBucketPublicAccessBlock",
        "GetEncryptionConfiguration", "PutEncryptionConfiguration",
        "GetLifecycleConfiguration", "PutLifecycleConfiguration",
        "GetBucketPolicy", "PutBucketPolicy",
    ]  # fmt: skip
    return _document(
        [
            {"Effect": "Allow", "Action": [f"iam:{name}" for name in iam], "Resource": roles},
            {
                "Effect": "Allow",
                "Action": "iam:PassRole",
                "Resource": names.iam(f"role/{wanted.head_profile}"),
                "Condition": {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
            },
            {
                "Effect": "Allow",
                "Action": "iam:CreateServiceLinkedRole",
                "Resource": names.iam("role/aws-service-role/spot.amazonaws.com/*"),
            },
            {"Effect": "Allow", "Action": [f"ec2:{name}" for name in ec2], "Resource": "*"},
            {"Effect": "Allow", "Action": [f"s3:{name}" for name in s3], "Resource": names.s3(wanted.bucket)},
            {"Effect": "Allow", "Action": ["sts:GetCallerIdentity", "iam:ListRoles"], "Resource": "*"},
            *_image_statements(wanted, names),
        ]
    )


def _bucket_statements(wanted: Wanted, names: Names) -> list[Json]:
    bucket = names.s3(wanted.bucket)
    objects = ["GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload", "ListMultipartUploadParts"]
    return [
        {
            "Sid": "Bucket",
            "Effect": "Allow",
            "Action": ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"],
            "Resource": bucket,
        },
        {"Sid": "Objects", "Effect": "Allow", "Action": [f"s3:{name}" for name in objects], "Resource": f"{bucket}/*"},
    ]


def _image_statements(wanted: Wanted, names: Names) -> list[Json]:
    if not wanted.images:
        return []
    images = [names.public("ssm", f"parameter{name}") for name in wanted.images]
    return [{"Sid": "FindImages", "Effect": "Allow", "Action": "ssm:GetParameters", "Resource": images}]


def bucket_policy(wanted: Wanted, names: Names) -> Json:
    """Nobody speaks to the bucket in the clear."""
    bucket = names.s3(wanted.bucket)
    return _document(
        [
            {
                "Sid": "OnlyEncryptedConnections",
                "Effect": "Deny",
                "Principal": "*",
                "Action": "s3:*",
                "Resource": [bucket, f"{bucket}/*"],
                "Condition": {"Bool": {"aws:SecureTransport": "false"}},
            }
        ]
    )


def _document(statements: Sequence[Mapping[str, Any]]) -> Json:
    return {"Version": "2012-10-17", "Statement": list(statements)}
