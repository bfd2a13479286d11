"""The calls to AWS, made for real, to a server on loopback that answers as AWS does (moto): what infra/aws_access.py
makes, what Ray's own provider makes of ray_cluster.yaml, and `ray up` and `ray down` from beginning to end, with an SSH
server of this machine in the place of the instances'.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError, ParamValidationError
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.aws.utils import client_cache, resource_cache
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from tests.infra.test_ray_cluster import BUCKET, REPOSITORY, access, edited, node_configs
from tests.object_store import free_port

REGION = "us-east-1"
OPERATOR = "203.0.113.7/32"
OPEN = "0.0.0.0/0"
OPERATORS_KEY = "AKIAOPERATOROFTHETEST"


@cache
def client(endpoint: str, service: str, **keys: str) -> Any:
    """Each is made once: that takes longer than what is asked."""
    return boto3.Session().client(service, region_name=REGION, endpoint_url=endpoint, **keys)


def forget_clients() -> None:
    """Ray and boto3 keep theirs, with the keys of the first moment, for as long as the process lives."""
    boto3.DEFAULT_SESSION = None
    for kept in (resource_cache, client_cache):
        kept.cache_clear()


# --- the server, and an account of its own for each test ---


@dataclass(frozen=True)
class Aws:
    """An empty account with an operator who may do everything."""

    endpoint: str
    folder: Path
    file: Path

    def client(self, service: str, **keys: str) -> Any:
        """With the operator's keys, or others."""
        return client(
            self.endpoint, service, **({"aws_access_key_id": "operator", "aws_secret_access_key": "-"} | keys)
        )

    def access(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """infra/aws_access.py on the file."""
        return access(str(self.file), *arguments)

    def enforce(self, on: bool) -> None:
        """Whether permissions are looked at from now on."""
        kind = {"Content-Type": "text/plain"}  # read as a form otherwise
        body = b"0" if on else b"inf"
        request = urllib.request.Request(f"{self.endpoint}/moto-api/reset-auth", body, kind, method="POST")
        urllib.request.urlopen(request, timeout=30).close()

    def group(self) -> dict[str, Any]:
        """The security group of the file's name."""
        filters = [{"Name": "group-name", "Values": ["mshnet"]}]
        (group,) = self.client("ec2").describe_security_groups(Filters=filters)["SecurityGroups"]
        return group

    def instances(self) -> list[dict[str, Any]]:
        """All there ever were."""
        reservations = self.client("ec2").describe_instances()["Reservations"]
        return [instance for reservation in reservations for instance in reservation["Instances"]]

    def states(self) -> dict[str, str]:
        """By instance."""
        return {instance["InstanceId"]: instance["State"]["Name"] for instance in self.instances()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One for the module: Ray keeps its clients for as long as the process lives."""
    port = free_port()
    log = tmp_path_factory.mktemp("aws") / "server.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not answers(endpoint):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)
        yield endpoint
    finally:
        process.kill()
        process.wait()


def answers(endpoint: str) -> bool:
    """Whether the server is up."""
    try:
        urllib.request.urlopen(f"{endpoint}/moto-api/data.json", timeout=10).close()
    except OSError:
        return False
    return True


@pytest.fixture
def aws(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Aws]:
    """The file edited, the operator's home folder with the secrets, keys that are worth nothing elsewhere."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "operator"
    for path, text in {".ray/auth_token": "token-of-the-test", ".mshnet/cluster.env": "A=b"}.items():
        (home / path).parent.mkdir(parents=True)
        (home / path).write_text(text, encoding="utf-8")
        (home / path).chmod(0o600)
    for name, value in {
        "HOME": str(home),
        "AWS_ENDPOINT_URL": server, "AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ACCESS_KEY_ID": OPERATORS_KEY, "AWS_SECRET_ACCESS_KEY": "none",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where `ray down` keeps what it found out
    monkeypatch.chdir(REPOSITORY)
    account = Aws(server, tmp_path, edited(tmp_path))
    account.enforce(False)
    urllib.request.urlopen(urllib.request.Request(f"{server}/moto-api/reset", method="POST"), timeout=30).close()
    yield account
    account.enforce(False)
    if os.environ.get("AWS_ACCESS_KEY_ID") != OPERATORS_KEY:
        forget_clients()


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The program's lines."""
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("aws_access: ") for line in done.stderr.splitlines()]


# --- infra/aws_access.py ---


def test_a_dry_run_tells_and_changes_nothing(aws: Aws) -> None:
    lines = said(aws.access("--dry-run"))
    assert lines[-1] == "nothing was changed"
    assert f"would make the bucket {BUCKET}" in lines
    assert f"would open tcp 22 to 22 for {OPERATOR}" in lines
    assert aws.client("s3").list_buckets()["Buckets"] == []
    assert aws.client("iam").list_roles()["Roles"] == []
    with pytest.raises(ValueError, match="unpack"):
        aws.group()


def test_bucket_and_group_are_closed_and_a_second_run_changes_nothing(aws: Aws) -> None:
    said(aws.access())
    s3 = aws.client("s3")
    closed = s3.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"]
    assert closed == dict.fromkeys(closed, True)
    assert len(closed) == 4
    (encryption,) = s3.get_bucket_encryption(Bucket=BUCKET)["ServerSideEncryptionConfiguration"]["Rules"]
    assert encryption["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    (rule,) = s3.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    (statement,) = json.loads(s3.get_bucket_policy(Bucket=BUCKET)["Policy"])["Statement"]
    assert statement["Effect"] == "Deny"
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert openings(aws.group()) == {("tcp", 22, OPERATOR), ("-1", None, aws.group()["GroupId"])}
    assert said(aws.access()) == ["done"]
    Path(os.environ["HOME"], ".mshnet", "cluster.env").unlink()
    reminder = "(not on this machine: ~/.mshnet/cluster.env; run infra/secrets.sh before `ray up`)"
    assert said(aws.access()) == [reminder, "done"]


def openings(group: dict[str, Any]) -> set[tuple[str, int | None, str]]:
    """Protocol, port, who."""
    return {
        (rule["IpProtocol"], rule.get("FromPort"), source)
        for rule in group["IpPermissions"]
        for source in [
            *(one["CidrIp"] for one in rule["IpRanges"]),
            *(one["CidrIpv6"] for one in rule["Ipv6Ranges"]),
            *(one["GroupId"] for one in rule["UserIdGroupPairs"]),
        ]
    }


def test_what_was_changed_by_hand_is_mended(aws: Aws) -> None:
    said(aws.access())
    group, iam, s3 = aws.group(), aws.client("iam"), aws.client("s3")
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": OPEN}]}
    aws.client("ec2").authorize_security_group_ingress(GroupId=group["GroupId"], IpPermissions=[ssh])
    everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
    iam.put_role_policy(RoleName="mshnet-worker", PolicyName="mshnet", PolicyDocument=json.dumps(everything))
    s3.delete_public_access_block(Bucket=BUCKET)
    assert said(aws.access()) == [
        f"block the public access of {BUCKET}",
        f"close tcp 22 to 22 for {OPEN}",
        "write the policy of the role mshnet-worker",
        "done",
    ]
    assert openings(aws.group()) == openings(group)
    # The operator moves.
    aws.file.write_text(aws.file.read_text(encoding="utf-8").replace(OPERATOR, "198.51.100.0/24"), encoding="utf-8")
    changed = said(aws.access())
    assert changed == [f"close tcp 22 to 22 for {OPERATOR}", "open tcp 22 to 22 for 198.51.100.0/24", "done"]


def test_what_others_made_is_left_alone(aws: Aws) -> None:
    iam = aws.client("iam")
    iam.create_role(RoleName="mshnet-head", AssumeRolePolicyDocument="{}")
    refused = aws.access()
    assert refused.returncode == 1
    assert "the role mshnet-head was not made by this program" in refused.stderr
    assert iam.list_role_policies(RoleName="mshnet-head")["PolicyNames"] == []


def test_another_clusters_role_is_left_alone(aws: Aws) -> None:
    said(aws.access())
    text = aws.file.read_text(encoding="utf-8").replace("cluster_name: mshnet", "cluster_name: second")
    aws.file.write_text(text, encoding="utf-8")
    refused = aws.access()
    assert refused.returncode == 1
    assert "belongs to the cluster 'mshnet'; choose another name" in refused.stderr


def test_a_bucket_that_was_there_keeps_its_settings(aws: Aws) -> None:
    s3 = aws.client("s3")
    s3.create_bucket(Bucket=BUCKET)
    assert f"leave the bucket {BUCKET} and its settings as they are: it was there before" in said(aws.access())
    with pytest.raises(ClientError, match="NoSuchLifecycleConfiguration"):
        s3.get_bucket_lifecycle_configuration(Bucket=BUCKET)


def test_a_bucket_elsewhere_is_refused(aws: Aws) -> None:
    place = {"LocationConstraint": "eu-west-1"}
    aws.client("s3").create_bucket(Bucket=BUCKET, CreateBucketConfiguration=place)
    refused = aws.access()
    assert refused.returncode == 1
    assert f"the bucket {BUCKET} is in eu-west-1, the cluster in {REGION}" in refused.stderr


def test_two_networks_are_a_question_to_the_operator(aws: Aws) -> None:
    ec2 = aws.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.1.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.1.0.0/24")["Subnet"]["SubnetId"]
    ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
    refused = aws.access()
    assert refused.returncode == 1
    assert "expected one VPC with subnets that give public addresses" in refused.stderr
    text = aws.file.read_text(encoding="utf-8")
    aws.file.write_text(
        re.sub(r"(\n +)InstanceType:", rf"\1SubnetIds: [{subnet}]\1InstanceType:", text), encoding="utf-8"
    )
    said(aws.access())
    assert aws.group()["VpcId"] == vpc
    assert {tuple(node["SubnetIds"]) for node in node_configs(resolved(aws)).values()} == {(subnet,)}


def test_without_credentials_it_says_so(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    forget_clients()
    refused = aws.access()
    assert refused.returncode == 1
    assert refused.stderr.startswith("aws_access: no AWS credentials on this machine")


def test_deleting_leaves_the_bucket_and_nothing_else(aws: Aws) -> None:
    said(aws.access())
    aws.client("ec2").create_key_pair(KeyName="mshnet")
    aws.client("s3").delete_bucket_policy(Bucket=BUCKET)  # it refuses what is not encrypted, as this test's server is
    aws.client("s3").put_object(Bucket=BUCKET, Key="results", Body=b"results")
    lines = said(aws.access("--delete"))
    assert any("stays, with your results" in line for line in lines)
    iam, ec2 = aws.client("iam"), aws.client("ec2")
    assert {role["Path"] for role in iam.list_roles()["Roles"]} == {"/aws-service-role/spot.amazonaws.com/"}
    assert iam.list_instance_profiles()["InstanceProfiles"] == []
    assert ec2.describe_key_pairs()["KeyPairs"] == []
    assert "mshnet" not in {group["GroupName"] for group in ec2.describe_security_groups()["SecurityGroups"]}
    assert aws.client("s3").get_object(Bucket=BUCKET, Key="results")["Body"].read() == b"results"
    assert said(aws.access("--delete"))[-1] == "done"  # twice is no error


# --- Ray's provider ---


def resolved(aws: Aws, *, look_up: bool = False) -> dict[str, Any]:
    """What Ray makes of the file in this account; with the resources of its machines looked up, as `ray up` does."""
    config = prepare_config(yaml.safe_load(aws.file.read_text(encoding="utf-8")))
    if look_up:
        config = AWSNodeProvider.fillout_available_node_types_resources(config)
    found: dict[str, Any] = AWSNodeProvider.bootstrap_config(config)
    return found


def provider_of(config: dict[str, Any]) -> AWSNodeProvider:
    """Ray's, as `ray up` and the autoscaler have it."""
    return AWSNodeProvider(config["provider"], config["cluster_name"])


def start(provider: AWSNodeProvider, config: dict[str, Any], name: str) -> str:
    """One machine of a type; its instance."""
    kind = "head" if name == config["head_node_type"] else "worker"
    tags = {TAG_RAY_NODE_KIND: kind, TAG_RAY_USER_NODE_TYPE: name, TAG_RAY_LAUNCH_CONFIG: "hash"}
    (instance,) = provider.create_node(config["available_node_types"][name]["node_config"], tags, 1)
    return str(instance)


def test_ray_takes_group_profiles_and_key_as_they_are(aws: Aws) -> None:
    said(aws.access())
    before = {role["RoleName"] for role in aws.client("iam").list_roles()["Roles"]}
    config = resolved(aws, look_up=True)
    group = aws.group()
    for node in node_configs(config).values():
        assert node["SecurityGroupIds"] == [group["GroupId"]]
        assert node["KeyName"] == "mshnet"
    assert config["head_node"] == {}  # Ray's own profile would be named here
    assert openings(aws.group()) == openings(group)
    assert {role["RoleName"] for role in aws.client("iam").list_roles()["Roles"]} == before
    key = Path(os.environ["HOME"], ".ssh", "mshnet.pem")
    assert key.stat().st_mode & 0o777 == 0o600
    gpu = config["available_node_types"]["gpu_spot"]["resources"]
    assert (gpu["CPU"], gpu["GPU"], gpu["accelerator_type:L40S"]) == (8, 1, 1)


def test_ray_alone_would_open_ssh_to_the_world_and_is_kept_from_it(aws: Aws) -> None:
    """Nothing was made before: `ray up` ends before any rule is set or machine started, however often it is tried."""
    words = "the security group is missing; run infra/aws_access.py first"
    failed = ray("up", "-y", "--no-config-cache", str(aws.file))
    assert failed.returncode != 0
    assert words in failed.stdout + failed.stderr
    with pytest.raises(ParamValidationError, match=words):
        resolved(aws)
    assert aws.group()["IpPermissions"] == []
    assert aws.instances() == []
    # The same file without the guard: the reason for it.
    AWSNodeProvider.bootstrap_config(prepare_config(without_guard(aws)))
    assert ("tcp", 22, OPEN) in openings(aws.group())
    # And what became of it is mended.
    said(aws.access())
    assert openings(aws.group()) == {("tcp", 22, OPERATOR), ("-1", None, aws.group()["GroupId"])}


def without_guard(aws: Aws) -> dict[str, Any]:
    """The file with Ray left to its own rules."""
    config: dict[str, Any] = yaml.safe_load(aws.file.read_text(encoding="utf-8"))
    config["provider"]["security_group"]["IpPermissions"] = []
    return config


def test_each_machine_is_started_as_the_file_says(aws: Aws) -> None:
    said(aws.access())
    config = resolved(aws)
    provider = provider_of(config)
    started = {start(provider, config, name): name for name in config["available_node_types"]}
    found = {instance["InstanceId"]: instance for instance in aws.instances()}
    assert found.keys() == started.keys()
    assert sorted(started.values()) == ["cpu_spot", "gpu_on_demand", "gpu_spot", "head"]
    volumes = {one["Attachments"][0]["InstanceId"]: one for one in aws.client("ec2").describe_volumes()["Volumes"]}
    for number, name in started.items():
        instance, volume = found[number], volumes[number]
        profile = "mshnet-head" if name == "head" else "mshnet-worker"
        assert instance["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{profile}")
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        assert instance.get("InstanceLifecycle") == ("spot" if name.endswith("spot") else None)
        assert [group["GroupId"] for group in instance["SecurityGroups"]] == [aws.group()["GroupId"]]
        tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
        assert tags["Project"] == tags["ray-cluster-name"] == "mshnet"
        (disk,) = config["available_node_types"][name]["node_config"]["BlockDeviceMappings"]
        assert (volume["Size"], volume["VolumeType"], volume["Encrypted"]) == (disk["Ebs"]["VolumeSize"], "gp3", True)
        assert instance["BlockDeviceMappings"][0]["Ebs"]["DeleteOnTermination"]


def test_the_head_is_stopped_and_taken_up_again(aws: Aws) -> None:
    said(aws.access())
    config = resolved(aws)
    provider = provider_of(config)
    head = start(provider, config, "head")
    refused = aws.access("--delete")
    assert refused.returncode == 1
    assert f"the cluster mshnet still runs ({head}); end it first: ray down" in refused.stderr
    provider.terminate_nodes([head])
    assert aws.states() == {head: "stopped"}
    assert start(provider, config, "head") == head
    provider.terminate_nodes([head])
    assert f"end the stopped {head}, disks and MLflow's database included" in said(aws.access("--delete"))
    assert aws.states() == {head: "terminated"}


# --- who may do what: the server looks at permissions ---


def user(aws: Aws, policy: dict[str, Any]) -> dict[str, str]:
    """Keys of somebody who has only that policy; as environment."""
    iam = aws.client("iam")
    iam.create_user(UserName="somebody")
    iam.put_user_policy(UserName="somebody", PolicyName="only", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName="somebody")["AccessKey"]
    return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


def actions_only(policy: dict[str, Any]) -> dict[str, Any]:
    """The server compares actions, for S3 also names; conditions and other services' names it does not know."""
    allowed = [one for one in policy["Statement"] if one["Effect"] == "Allow"]
    statements = [
        {"Effect": "Allow", "Action": in_its_names(one["Action"]), "Resource": one["Resource"] if s3_only(one) else "*"}
        for one in allowed
    ]
    return {"Version": policy["Version"], "Statement": statements}


def in_its_names(actions: str | list[str]) -> list[str]:
    """The server calls three permissions otherwise than AWS does."""
    other = {
        "s3:ListBucket": "s3:HeadBucket",  # for HeadBucket
        "s3:GetBucketPublicAccessBlock": "s3:GetPublicAccessBlock",
        "s3:PutBucketPublicAccessBlock": "s3:PutPublicAccessBlock",
    }
    return [name for one in ([actions] if isinstance(actions, str) else actions) for name in (one, other.get(one, one))]


def s3_only(statement: dict[str, Any]) -> bool:
    """Whether a statement is about S3."""
    actions = statement["Action"]
    return all(name.startswith("s3:") for name in ([actions] if isinstance(actions, str) else actions))


def role_policy(aws: Aws, role: str) -> dict[str, Any]:
    """What infra/aws_access.py wrote."""
    document: dict[str, Any] = aws.client("iam").get_role_policy(RoleName=role, PolicyName="mshnet")["PolicyDocument"]
    return document


def test_the_operators_policy_is_enough(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    """To make everything, to start and stop a cluster, to remove everything."""
    printed = aws.access("--operator-policy")
    for name, value in user(aws, actions_only(json.loads(printed.stdout))).items():
        monkeypatch.setenv(name, value)
    forget_clients()
    aws.enforce(True)
    said(aws.access())
    assert said(aws.access()) == ["done"]
    config = resolved(aws, look_up=True)
    provider = provider_of(config)
    head = start(provider, config, "head")
    provider.non_terminated_nodes({})
    provider.set_node_tags(head, {"ray-node-status": "up-to-date"})
    provider.terminate_nodes([head])
    assert start(provider, config, "head") == head
    provider.terminate_nodes([head])
    assert said(aws.access("--delete"))[-1] == "done"


def test_one_who_may_nothing_is_told_what_is_needed(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Action": "ec2:DescribeVpcs", "Resource": "*"}],
    }
    for name, value in user(aws, nothing).items():
        monkeypatch.setenv(name, value)
    forget_clients()
    aws.enforce(True)
    refused = aws.access()
    assert refused.returncode == 1
    assert "--operator-policy prints" in refused.stderr


def test_the_heads_role_is_enough_for_the_autoscaler_and_for_no_more(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    said(aws.access())
    config = resolved(aws)
    # Conditions and names, which the server does not compare.
    statements = {one["Sid"]: one for one in role_policy(aws, "mshnet-head")["Statement"]}
    instance = statements["StartOnlyThisClustersWorkers"]["Condition"]
    assert instance["StringEquals"] == {
        "aws:RequestTag/ray-cluster-name": "mshnet",
        "ec2:MetadataHttpTokens": "required",
    }
    assert instance["ArnEquals"]["ec2:InstanceProfile"].endswith(":instance-profile/mshnet-worker")
    assert statements["GiveWorkersTheirRole"]["Resource"].endswith(":role/mshnet-worker")
    assert statements["LeadThisClustersInstances"]["Condition"] == {
        "StringEquals": {"aws:ResourceTag/ray-cluster-name": "mshnet"}
    }
    wide = [sid for sid, one in statements.items() if one["Resource"] == "*"]
    assert wide == ["Look"]
    assert not any("*" in action for one in statements.values() for action in ([*one["Action"]]) if len(action) > 1)
    images = statements["FindImages"]["Resource"]
    assert len(images) == 2
    assert all(re.fullmatch(r"arn:aws:ssm:us-east-1::parameter/aws/service/.*/ami-id", image) for image in images)
    # Actions, which it does.
    keys = user(aws, actions_only(role_policy(aws, "mshnet-head")))
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    aws.enforce(True)
    forget_clients()
    provider = provider_of(config)
    started = [start(provider, config, name) for name in ("gpu_spot", "gpu_on_demand", "cpu_spot")]
    assert set(provider.non_terminated_nodes({})) == set(started)
    assert all(provider.internal_ip(name) for name in started)
    provider.set_node_tags(started[0], {"ray-node-status": "up-to-date"})
    provider.terminate_nodes(started)
    mine = {name.lower(): value for name, value in keys.items()}
    for service, call, arguments in (
        ("iam", "create_user", {"UserName": "other"}),
        ("ec2", "create_key_pair", {"KeyName": "other"}),
        ("ec2", "create_security_group", {"GroupName": "other", "Description": "other"}),
        ("ec2", "describe_subnets", {}),
    ):
        with pytest.raises(ClientError, match=r"AccessDenied|UnauthorizedOperation"):
            getattr(aws.client(service, **mine), call)(**arguments)


def test_a_worker_has_the_bucket_and_nothing_else(aws: Aws) -> None:
    said(aws.access())
    other = aws.client("s3")
    other.create_bucket(Bucket="of-somebody-else")
    other.put_object(Bucket="of-somebody-else", Key="key", Body=b"")
    other.delete_bucket_policy(Bucket=BUCKET)
    keys = {name.lower(): value for name, value in user(aws, role_policy(aws, "mshnet-worker")).items()}
    aws.enforce(True)
    s3 = aws.client("s3", **keys)
    s3.put_object(Bucket=BUCKET, Key="a/b", Body=b"body")
    assert s3.get_object(Bucket=BUCKET, Key="a/b")["Body"].read() == b"body"
    assert [one["Key"] for one in s3.list_objects_v2(Bucket=BUCKET, Prefix="a/")["Contents"]] == ["a/b"]
    upload = s3.create_multipart_upload(Bucket=BUCKET, Key="large")["UploadId"]
    s3.upload_part(Bucket=BUCKET, Key="large", UploadId=upload, PartNumber=1, Body=b"part")
    s3.abort_multipart_upload(Bucket=BUCKET, Key="large", UploadId=upload)
    s3.delete_object(Bucket=BUCKET, Key="a/b")
    refusals: list[Callable[[], Any]] = [
        lambda: s3.get_object(Bucket="of-somebody-else", Key="key"),
        lambda: s3.put_object(Bucket="of-somebody-else", Key="key", Body=b""),
        lambda: s3.list_objects_v2(Bucket="of-somebody-else"),
        lambda: s3.delete_bucket(Bucket=BUCKET),
        lambda: s3.put_bucket_policy(Bucket=BUCKET, Policy="{}"),
        lambda: aws.client("ec2", **keys).describe_instances(),
        lambda: aws.client("iam", **keys).list_roles(),
    ]
    for refused in refusals:
        with pytest.raises(ClientError, match=r"AccessDenied|UnauthorizedOperation"):
            refused()


# --- ray up, ray down ---


def ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, as the operator runs it."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("ray")), *arguments],
        capture_output=True, text=True, check=False, timeout=300, cwd=REPOSITORY,
    )  # fmt: skip


@dataclass(frozen=True)
class Instances:
    """What every instance is here: one SSH server, which takes files and writes down commands without running them."""

    home: Path
    log: Path

    @property
    def commands(self) -> list[str]:
        """In the order in which they came."""
        return self.log.read_text(encoding="utf-8").split("\0")[:-1] if self.log.exists() else []


@pytest.fixture
def instances(aws: Aws) -> Iterator[Instances]:
    """Reached by every address that the file's SSH connects to: nothing ever leaves this machine."""
    missing = [name for name in ("rsync", "ssh", "ssh-keygen") if not shutil.which(name)]
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if missing or not sshd:
        pytest.skip("sshd or rsync is absent (apt-get install openssh-server rsync)")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd as root wants to shut its children in
    folder = aws.folder / "instances"
    home, log = folder / "home", folder / "commands"
    home.mkdir(parents=True)
    for name, path in {"host_key": folder / "host_key", "key": folder / "key"}.items():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(path)], check=True)
    answer = folder / "answer.sh"
    answer.write_text(
        f"#!/bin/bash\nexport HOME={shlex.quote(str(home))}\ncd\n"
        'case "$SSH_ORIGINAL_COMMAND" in\n'
        '    rsync*) eval "exec $SSH_ORIGINAL_COMMAND" ;;\n'
        f'    *) printf "%s\\0" "$SSH_ORIGINAL_COMMAND" >>{shlex.quote(str(log))}\n'
        # File mounts begin with a mkdir, without which rsync has no place.
        '       if [[ "$SSH_ORIGINAL_COMMAND" == *"mkdir -p"* ]]; then eval "$SSH_ORIGINAL_COMMAND"; fi ;;\n'
        "esac\n",
        encoding="utf-8",
    )
    answer.chmod(0o755)
    config = folder / "sshd_config"
    port = free_port()
    config.write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder / 'host_key'}\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder / 'key.pub'}\nPasswordAuthentication no\nForceCommand {answer}\n",
        encoding="utf-8",
    )
    config_of_cluster = yaml.safe_load(aws.file.read_text(encoding="utf-8"))
    relay = "import os, socket, sys, threading; s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))"
    config_of_cluster["auth"] = {
        "ssh_user": os.environ.get("USER") or subprocess.check_output(["id", "-un"], text=True).strip(),
        "ssh_private_key": str(folder / "key"),
        "ssh_proxy_command": f"{sys.executable} {write_relay(folder, relay)} {port}",
    }
    for node in node_configs(config_of_cluster).values():
        node["KeyName"] = "mshnet"
    aws.file.write_text(yaml.safe_dump(config_of_cluster, sort_keys=False), encoding="utf-8")
    with (folder / "sshd.log").open("w") as output:
        process = subprocess.Popen([sshd, "-D", "-e", "-f", str(config)], stdout=output, stderr=output)
    try:
        yield Instances(home, log)
    finally:
        process.terminate()
        process.wait()


def write_relay(folder: Path, connect: str) -> Path:
    """A program that connects its standard input and output with a port of this machine."""
    path = folder / "relay.py"
    path.write_text(
        f"{connect}\n"
        "def up():\n"
        "    while data := os.read(0, 65536):\n"
        "        s.sendall(data)\n"
        "    s.shutdown(socket.SHUT_WR)\n"
        "threading.Thread(target=up, daemon=True).start()\n"
        "while data := s.recv(65536):\n"
        "    os.write(1, data)\n",
        encoding="utf-8",
    )
    return path


def test_ray_up_and_ray_down(aws: Aws, instances: Instances) -> None:
    said(aws.access())
    up = ray("up", "-y", "--no-config-cache", str(aws.file))
    assert up.returncode == 0, up.stdout + up.stderr
    assert "Ray runtime will not be started" not in up.stdout
    (head,) = aws.instances()
    assert head["InstanceType"] == "m7i.xlarge"
    assert openings(aws.group()) == {("tcp", 22, OPERATOR), ("-1", None, aws.group()["GroupId"])}

    # In the file's order: system packages, the locked environment, the services' packages, then Ray by infra/node.sh.
    config = yaml.safe_load(aws.file.read_text(encoding="utf-8"))
    wanted = [*config["setup_commands"], *config["head_setup_commands"], *config["head_start_ray_commands"]]
    ran = [shlex.split(command)[-1] for command in instances.commands]  # of `bash --login -c -i '...'`
    ran = [command for command in ran if "mkdir -p" not in command and "(uptime)" not in command]
    assert len(ran) == len(wanted)
    assert all(command in line for command, line in zip(wanted, ran, strict=True))
    assert all("RAY_enable_autoscaler_v2=1" in line for line in ran[-2:])

    # The repository's part, the secrets closed, and what the autoscaler goes by, in which the private key is a path.
    home = instances.home
    assert (home / "mshnet" / "infra" / "node.sh").stat().st_mode & 0o111
    for path in (".ray/auth_token", ".mshnet/cluster.env"):
        assert (home / path).read_bytes() == Path(os.environ["HOME"], path).read_bytes()
        assert (home / path).stat().st_mode & 0o777 == 0o600
    bootstrap = json.loads((home / "ray_bootstrap_config.yaml").read_text(encoding="utf-8"))
    assert bootstrap["metadata"]["bucket"] == BUCKET
    assert bootstrap["auth"]["ssh_private_key"] == "~/ray_bootstrap_key.pem"
    assert "token-of-the-test" not in json.dumps(bootstrap)

    down = ray("down", "-y", str(aws.file))
    assert down.returncode == 0, down.stdout + down.stderr
    assert "ray stop" in instances.commands[-1]
    assert aws.states() == {head["InstanceId"]: "stopped"}
