#!/usr/bin/env python3
"""What a cluster on AWS needs before `ray up`: bucket, security group, roles with their instance profiles.

    .venv/bin/python infra/aws_access.py                     # make what is missing, mend what differs, say which
    .venv/bin/python infra/aws_access.py --dry-run           # only say it
    .venv/bin/python infra/aws_access.py --operator-policy   # the permissions that you need yourself, as JSON
    .venv/bin/python infra/aws_access.py --delete            # remove it again, the bucket excepted

All names are read from the cluster's file (ray_cluster.yaml, or the one given), so that nothing is said twice. The
security group is made here because one that Ray makes always lets SSH in from everywhere, and the roles because Ray's
own may do everything with EC2 and S3. What is made here carries the cluster's name as a tag; what does not, but has a
name that is wanted, is left alone.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from aws_cluster_file import AccessError, Wanted, read
from aws_policies import CLUSTER_TAG, Json, Names, bucket_policy, head_policy, operator_policy, trust, worker_policy
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

POLICY = "mshnet"  # each role has this one
UNFINISHED_UPLOAD_DAYS = 7


class Account:
    """One account in one region, and the only door through which it is changed."""

    def __init__(self, wanted: Wanted, *, dry_run: bool) -> None:
        self.clients = {name: boto3.client(name, region_name=wanted.region) for name in ("ec2", "iam", "s3", "sts")}
        caller = self.clients["sts"].get_caller_identity()
        self.names = Names(partition=caller["Arn"].split(":")[1], region=wanted.region, account=caller["Account"])
        self.wanted, self.dry_run = wanted, dry_run
        self.tags = [{"Key": CLUSTER_TAG, "Value": wanted.cluster}, {"Key": "Project", "Value": "mshnet"}]

    def ask(self, service: str, call: str, absent: Sequence[str] = (), **arguments: Any) -> Json | None:
        """A question; None where AWS answers with one of the `absent` codes."""
        try:
            answer: Json = getattr(self.clients[service], call)(**arguments)
        except ClientError as error:
            if error.response["Error"]["Code"] in absent:
                return None
            raise
        return answer

    def every(self, service: str, call: str, field: str, **arguments: Any) -> list[Json]:
        """All of a list that comes in pages."""
        return [one for page in self.clients[service].get_paginator(call).paginate(**arguments) for one in page[field]]

    def change(self, what: str, service: str, call: str, **arguments: Any) -> Json:
        """A change, said before it is made; in a dry run only said, and the answer is empty."""
        say(f"would {what}" if self.dry_run else what)
        return {} if self.dry_run else getattr(self.clients[service], call)(**arguments)

    def must_be_ours(self, what: str, tags: Sequence[Mapping[str, str]]) -> None:
        """Raise AccessError for what somebody else made."""
        found = cluster_of(tags)
        if found != self.wanted.cluster:
            raise AccessError(
                f"{what} {f'belongs to the cluster {found!r}' if found else 'was not made by this program'}; choose "
                f"another name in the cluster's file, or, if it is yours, tag it {CLUSTER_TAG}={self.wanted.cluster}"
            )


def cluster_of(tags: Sequence[Mapping[str, str]]) -> str | None:
    """The cluster that something is tagged with."""
    return next((tag["Value"] for tag in tags if tag["Key"] == CLUSTER_TAG), None)


def say(text: str) -> None:
    """On stderr, as all of the project's scripts do."""
    print(f"aws_access: {text}", file=sys.stderr)


# --- the bucket ---


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One of a bucket's settings: get_<call> asks for it, put_<call> sets it."""

    what: str
    call: str
    absent: str
    wanted: Json
    holds: Callable[[Json], bool]


def see_to_bucket(account: Account) -> None:
    """A private, encrypted bucket. One that somebody else made is used as it is."""
    name, region = account.wanted.bucket, account.wanted.region
    owner = account.names.account
    found = account.ask("s3", "head_bucket", ("404", "NoSuchBucket"), Bucket=name, ExpectedBucketOwner=owner)
    if found is None:
        # us-east-1 is the one region that must not be named.
        place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        account.change(f"make the bucket {name}", "s3", "create_bucket", Bucket=name, **place)
        account.change(f"tag {name}", "s3", "put_bucket_tagging", Bucket=name, Tagging={"TagSet": account.tags})
    elif (place := found.get("BucketRegion", region)) != region:
        raise AccessError(f"the bucket {name} is in {place}, the cluster in {region}; each read would be paid for")
    else:
        tags = account.ask("s3", "get_bucket_tagging", ("NoSuchTagSet",), Bucket=name) or {"TagSet": []}
        if cluster_of(tags["TagSet"]) != account.wanted.cluster:
            say(f"leave the bucket {name} and its settings as they are: it was there before")
            return
    for one in bucket_settings(account):
        present = account.ask("s3", f"get_{one.call}", (one.absent,), Bucket=name) if found else None
        if present is None or not one.holds(present):
            account.change(f"{one.what} of {name}", "s3", f"put_{one.call}", Bucket=name, **one.wanted)


def bucket_settings(account: Account) -> Iterator[Setting]:
    """Closed to the public, encrypted on the disk and on the way, without rests of uploads."""
    closed = dict.fromkeys(("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets"), True)
    yield Setting(
        what="block the public access",
        call="public_access_block",
        absent="NoSuchPublicAccessBlockConfiguration",
        wanted={"PublicAccessBlockConfiguration": closed},
        holds=lambda found: found["PublicAccessBlockConfiguration"] == closed,
    )
    # S3 encrypts by itself since 2023; said nonetheless, because audits ask for it. A key of one's own is left.
    encryption = {"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]}
    yield Setting(
        what="encrypt the objects",
        call="bucket_encryption",
        absent="ServerSideEncryptionConfigurationNotFoundError",
        wanted={"ServerSideEncryptionConfiguration": encryption},
        holds=lambda found: bool(found["ServerSideEncryptionConfiguration"]["Rules"]),
    )
    unfinished = {
        "ID": "unfinished uploads",
        "Status": "Enabled",
        "Filter": {"Prefix": ""},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": UNFINISHED_UPLOAD_DAYS},
    }
    yield Setting(
        what=f"have uploads unfinished for {UNFINISHED_UPLOAD_DAYS} days removed out",
        call="bucket_lifecycle_configuration",
        absent="NoSuchLifecycleConfiguration",
        wanted={"LifecycleConfiguration": {"Rules": [unfinished]}},
        holds=lambda found: any(rule.get("ID") == unfinished["ID"] for rule in found["Rules"]),
    )
    policy = bucket_policy(account.wanted, account.names)
    yield Setting(
        what="refuse connections without TLS to the objects",
        call="bucket_policy",
        absent="NoSuchBucketPolicy",
        wanted={"Policy": json.dumps(policy)},
        holds=lambda found: json.loads(found["Policy"]) == policy,
    )


# --- the security group ---

SOURCES = {
    "IpRanges": "CidrIp",
    "Ipv6Ranges": "CidrIpv6",
    "UserIdGroupPairs": "GroupId",
    "PrefixListIds": "PrefixListId",
}


def see_to_group(account: Account) -> None:
    """SSH from the operator's networks, everything among the nodes, nothing else from anywhere."""
    name, vpc = account.wanted.group, find_vpc(account)
    group = find_group(account, vpc)
    if group is None:
        made = account.change(
            f"make the security group {name} in {vpc}", "ec2", "create_security_group", GroupName=name, VpcId=vpc,
            Description="Ray cluster: SSH from the operator, everything among its nodes",
            TagSpecifications=[{"ResourceType": "security-group", "Tags": account.tags}],
        )  # fmt: skip
        group = {"GroupId": made.get("GroupId", ""), "IpPermissions": []}
    else:
        account.must_be_ours(f"the security group {name} in {vpc}", group.get("Tags", []))
    number = group["GroupId"]
    rules = {key(rule): rule for rule in group_rules(account.wanted, number)}
    present = {key(one): one for rule in group["IpPermissions"] for one in single(rule)}
    # What is open too far is closed before anything else.
    for one in present.keys() - rules.keys():
        rule = {"GroupId": number, "IpPermissions": [present[one]]}
        account.change(f"close {in_words(present[one])}", "ec2", "revoke_security_group_ingress", **rule)
    for one in rules.keys() - present.keys():
        rule = {"GroupId": number, "IpPermissions": [rules[one]]}
        account.change(f"open {in_words(rules[one])}", "ec2", "authorize_security_group_ingress", **rule)


def find_vpc(account: Account) -> str:
    """The network that Ray will choose: that of the subnets in the file, else of those that give public addresses."""
    chosen = {"SubnetIds": list(account.wanted.subnets)} if account.wanted.subnets else {}
    subnets = account.every("ec2", "describe_subnets", "Subnets", **chosen)
    vpcs: list[str] = sorted({one["VpcId"] for one in subnets if chosen or one["MapPublicIpOnLaunch"]})
    if len(vpcs) == 1:
        return vpcs[0]
    raise AccessError(
        f"expected one VPC with subnets that give public addresses in {account.wanted.region}, found "
        f"{', '.join(vpcs) or 'none'}; "
        + (
            "name subnets of one of them: SubnetIds, in each node_config"
            if vpcs
            else "make a default VPC in the console"
        )
    )


def find_group(account: Account, vpc: str) -> Json | None:
    """The group of that name in that network."""
    filters = [{"Name": "vpc-id", "Values": [vpc]}, {"Name": "group-name", "Values": [account.wanted.group]}]
    return next(iter(account.every("ec2", "describe_security_groups", "SecurityGroups", Filters=filters)), None)


def group_rules(wanted: Wanted, group: str) -> Iterator[Json]:
    """All that may come in."""
    yield {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    for network in map(ipaddress.ip_network, wanted.ssh_from):
        kind = "IpRanges" if network.version == 4 else "Ipv6Ranges"
        source = {SOURCES[kind]: str(network), "Description": "operator"}
        yield {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, kind: [source]}


def single(rule: Json) -> Iterator[Json]:
    """AWS puts all sources of a port into one rule; here each is a rule."""
    ports: Json = {name: rule[name] for name in ("IpProtocol", "FromPort", "ToPort") if name in rule}
    for kind, name in SOURCES.items():
        for source in rule.get(kind, []):
            yield {**ports, kind: [{name: source[name]}]}


def key(rule: Json) -> tuple[str, ...]:
    """Equal for rules that say the same. Where the protocol is "all", answers have ports of -1 or none."""
    ports = [] if rule["IpProtocol"] == "-1" else [str(rule.get(name)) for name in ("FromPort", "ToPort")]
    return (rule["IpProtocol"], *ports, source_of(rule))


def source_of(rule: Json) -> str:
    """The network or group that a rule lets in."""
    return next(str(rule[kind][0][name]) for kind, name in SOURCES.items() if rule.get(kind))


def in_words(rule: Json) -> str:
    """For the operator to read."""
    ports = f"{rule['IpProtocol']} {rule.get('FromPort')} to {rule.get('ToPort')}"
    return f"{'every port' if rule['IpProtocol'] == '-1' else ports} for {source_of(rule) or 'the group itself'}"


# --- roles and instance profiles ---


def see_to_role(account: Account, name: str, policy: Json) -> None:
    """The role, its one policy, and the instance profile that gives it to instances."""
    role = account.ask("iam", "get_role", ("NoSuchEntity",), RoleName=name)
    if role is None:
        document = {"AssumeRolePolicyDocument": json.dumps(trust()), "Tags": account.tags}
        account.change(f"make the role {name}", "iam", "create_role", RoleName=name, **document)
    else:
        account.must_be_ours(f"the role {name}", role["Role"].get("Tags", []))
        if role["Role"]["AssumeRolePolicyDocument"] != trust():
            document = {"RoleName": name, "PolicyDocument": json.dumps(trust())}
            account.change(f"let only EC2 take on the role {name}", "iam", "update_assume_role_policy", **document)
    where = {"RoleName": name, "PolicyName": POLICY}
    present = account.ask("iam", "get_role_policy", ("NoSuchEntity",), **where) if role else None
    if present is None or present["PolicyDocument"] != policy:
        document = {**where, "PolicyDocument": json.dumps(policy)}
        account.change(f"write the policy of the role {name}", "iam", "put_role_policy", **document)
    see_to_profile(account, name)


def see_to_profile(account: Account, name: str) -> None:
    """The instance profile with the role in it."""
    profile = account.ask("iam", "get_instance_profile", ("NoSuchEntity",), InstanceProfileName=name)
    which = {"InstanceProfileName": name}
    if profile is None:
        account.change(
            f"make the instance profile {name}", "iam", "create_instance_profile", Tags=account.tags, **which
        )
    if profile is None or not profile["InstanceProfile"]["Roles"]:
        what = f"put the role {name} into its instance profile"
        account.change(what, "iam", "add_role_to_instance_profile", RoleName=name, **which)
        say("(it takes some 15 s until EC2 knows a new profile; an earlier `ray up` says that it is invalid)")


def see_to_spot(account: Account) -> None:
    """The role by which EC2 starts spot instances. An account has it from its first spot instance on."""
    if not account.wanted.spot:
        return
    if not account.every("iam", "list_roles", "Roles", PathPrefix="/aws-service-role/spot.amazonaws.com/"):
        what = "make the account's role for spot instances, without which the head could start none"
        account.change(what, "iam", "create_service_linked_role", AWSServiceName="spot.amazonaws.com")


# --- there and back ---


def make(account: Account) -> None:
    """Everything that `ray up` needs and does not make itself, or not as it should be."""
    see_to_bucket(account)
    see_to_group(account)
    policies = worker_policy(account.wanted, account.names), head_policy(account.wanted, account.names)
    for name, policy in zip(account.wanted.roles, policies, strict=True):
        see_to_role(account, name, policy)
    see_to_spot(account)


def look_for_secrets(wanted: Wanted) -> None:
    """`ray up` would notice only after it had started the head."""
    if missing := [name for name in wanted.secrets if not Path(name).expanduser().is_file()]:
        say(f"(not on this machine: {', '.join(missing)}; run infra/secrets.sh before `ray up`)")


def delete(account: Account) -> None:
    """Everything but the bucket; while an instance runs, nothing."""
    delete_instances(account)
    name = account.wanted.group
    if (group := find_group(account, find_vpc(account))) is not None:
        account.must_be_ours(f"the security group {name}", group.get("Tags", []))
        account.change(f"remove the security group {name}", "ec2", "delete_security_group", GroupId=group["GroupId"])
    for name in account.wanted.roles:
        delete_role(account, name)
    name = account.wanted.key
    keys = account.ask("ec2", "describe_key_pairs", Filters=[{"Name": "key-name", "Values": [name]}])
    if keys and keys["KeyPairs"]:
        account.change(f"remove the key pair {name}", "ec2", "delete_key_pair", KeyName=name)
        say(f"(its private half is still on this machine: rm ~/.ssh/{name}.pem)")
    say(f"(the bucket {account.wanted.bucket} stays, with your results; to remove it is your decision)")


def delete_instances(account: Account) -> None:
    """Those that `ray down` only stopped."""
    cluster = account.wanted.cluster
    filters = [{"Name": f"tag:{CLUSTER_TAG}", "Values": [cluster]}]
    reservations = account.every("ec2", "describe_instances", "Reservations", Filters=filters)
    states = {one["InstanceId"]: one["State"]["Name"] for reserved in reservations for one in reserved["Instances"]}
    if running := sorted(name for name, state in states.items() if state in ("pending", "running")):
        raise AccessError(f"the cluster {cluster} still runs ({', '.join(running)}); end it first: ray down")
    if stopped := sorted(name for name, state in states.items() if state in ("stopping", "stopped")):
        what = f"end the stopped {', '.join(stopped)}, disks and MLflow's database included"
        account.change(what, "ec2", "terminate_instances", InstanceIds=stopped)
        if not account.dry_run:  # the group cannot go before them
            account.clients["ec2"].get_waiter("instance_terminated").wait(InstanceIds=stopped)


def delete_role(account: Account, name: str) -> None:
    """The instance profile, then the role."""
    role = account.ask("iam", "get_role", ("NoSuchEntity",), RoleName=name)
    if role is not None:
        account.must_be_ours(f"the role {name}", role["Role"].get("Tags", []))
    which = {"InstanceProfileName": name}
    if (profile := account.ask("iam", "get_instance_profile", ("NoSuchEntity",), **which)) is not None:
        for member in profile["InstanceProfile"]["Roles"]:
            what, member_name = f"take the role out of the instance profile {name}", member["RoleName"]
            account.change(what, "iam", "remove_role_from_instance_profile", RoleName=member_name, **which)
        account.change(f"remove the instance profile {name}", "iam", "delete_instance_profile", **which)
    if role is not None:
        where = {"RoleName": name, "PolicyName": POLICY}
        if account.ask("iam", "get_role_policy", ("NoSuchEntity",), **where) is not None:
            account.change(f"remove the policy of the role {name}", "iam", "delete_role_policy", **where)
        account.change(f"remove the role {name}", "iam", "delete_role", RoleName=name)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 there is something to see to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=Path("ray_cluster.yaml"), help="the cluster's file")
    parser.add_argument("--dry-run", action="store_true", help="change nothing, say what would be changed")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--delete", action="store_true", help="remove everything again, the bucket excepted")
    which.add_argument("--operator-policy", action="store_true", help="print the permissions that you need, as JSON")
    which.add_argument("--bucket", action="store_true", help="print the bucket's name; asks AWS nothing")
    given = parser.parse_args(arguments)
    try:
        wanted = read(given.file)
        if given.bucket:
            print(wanted.bucket)
            return 0
        account = Account(wanted, dry_run=given.dry_run)
        if given.operator_policy:
            print(json.dumps(operator_policy(wanted, account.names), indent=2))
            return 0
        (delete if given.delete else make)(account)
        if not given.delete:
            look_for_secrets(wanted)
        say("nothing was changed" if given.dry_run else "done")
    except (AccessError, ClientError, BotoCoreError) as error:
        say(explain(error))
        return 1
    return 0


def explain(error: Exception) -> str:
    """What to do about it, where AWS's own words do not say."""
    if isinstance(error, NoCredentialsError):
        return "no AWS credentials on this machine; name a profile (AWS_PROFILE=...) or sign in (aws configure sso)"
    code = error.response["Error"]["Code"] if isinstance(error, ClientError) else ""
    if code == "BucketAlreadyExists":
        return f"{error}; another account has that name, choose another one: metadata.bucket"
    if code in ("403", "AccessDenied", "AccessDeniedException", "UnauthorizedOperation"):
        bucket = ", or the bucket is another account's (choose another name: metadata.bucket)" if code == "403" else ""
        return f"{error}; these credentials may not do that (--operator-policy prints what is needed){bucket}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
