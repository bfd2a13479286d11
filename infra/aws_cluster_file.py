"""What the cluster's file (ray_cluster.yaml) wants of an AWS account, checked. For aws_access.py."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

WIDEST_PREFIX = {4: 8, 6: 32}  # a wider network than this is the whole internet in all but name


class AccessError(Exception):
    """Something that the operator has to see to, in words."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The names in the cluster's file."""

    cluster: str
    region: str
    bucket: str
    ssh_from: tuple[str, ...]
    group: str
    key: str
    head_profile: str
    worker_profile: str
    images: tuple[str, ...]
    """Systems Manager's parameters by which the file names its images."""
    subnets: tuple[str, ...]
    spot: bool
    secrets: tuple[str, ...]
    """Files of the operator's home folder that go to the nodes."""

    @property
    def roles(self) -> tuple[str, str]:
        """Each role has an instance profile of its own name. The worker's comes first: the head's policy names it."""
        return self.worker_profile, self.head_profile


def read(path: Path) -> Wanted:
    """The file's wishes; raises AccessError with the line to edit."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AccessError(f"no cluster file '{path}'; give its path") from None
    except yaml.YAMLError as error:
        raise AccessError(f"'{path}' is no YAML: {error}") from None
    try:
        nodes = {name: node["node_config"] for name, node in config["available_node_types"].items()}
        head = nodes[config["head_node_type"]]
        workers = [node for name, node in nodes.items() if name != config["head_node_type"]]
        profiles = sorted({node["IamInstanceProfile"]["Name"] for node in workers})
        wanted = Wanted(
            cluster=config["cluster_name"],
            region=config["provider"]["region"],
            bucket=str(config["metadata"]["bucket"]),
            ssh_from=tuple(str(network) for network in config["metadata"]["ssh_from"]),
            group=config["provider"]["security_group"]["GroupName"],
            key=config["provider"]["key_pair"]["key_name"],
            head_profile=head["IamInstanceProfile"]["Name"],
            worker_profile=profiles[0],
            images=tuple(sorted({name for node in nodes.values() if (name := _parameter(node["ImageId"]))})),
            subnets=tuple(sorted({subnet for node in nodes.values() for subnet in node.get("SubnetIds", [])})),
            secrets=tuple(sorted(name for name in config.get("file_mounts", {}).values() if name.startswith("~/"))),
            spot=any(node.get("InstanceMarketOptions", {}).get("MarketType") == "spot" for node in workers),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise AccessError(f"'{path}' lacks something ({error!r}); compare it with the repository's") from None
    if len(profiles) > 1 or wanted.worker_profile == wanted.head_profile:
        raise AccessError(
            "expected one IamInstanceProfile for all worker types and another one for the head, "
            f"found {', '.join(profiles)} and {wanted.head_profile}"
        )
    _check_bucket(wanted.bucket)
    if not wanted.ssh_from:
        raise AccessError("metadata.ssh_from is empty: nobody could reach the cluster, `ray up` neither")
    for network in wanted.ssh_from:
        _check_network(network)
    return wanted


def _parameter(image: str) -> str:
    return image.removeprefix("resolve:ssm:") if image.startswith("resolve:ssm:") else ""


def _check_bucket(name: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]", name):
        raise AccessError(
            "metadata.bucket must be a name that no bucket in the world has yet, or that is yours, of 3 to 63 small "
            f"letters, digits and hyphens, got {name!r}; edit that line"
        )


def _check_network(text: str) -> None:
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        raise AccessError(
            "metadata.ssh_from must list the networks that may use SSH, such as 203.0.113.7/32 for one address "
            f"(curl https://checkip.amazonaws.com shows yours), got {text!r}; edit that line"
        ) from None
    if network.prefixlen < WIDEST_PREFIX[network.version]:
        raise AccessError(f"metadata.ssh_from would let in everybody, got {text}; name your own network")
