"""ray_cluster.yaml: valid for Ray, closed by default, and what its commands and its autoscaler do."""

from __future__ import annotations

import copy
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import fillout_defaults, prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

REPOSITORY = Path(__file__).resolve().parents[2]
FILE = REPOSITORY / "ray_cluster.yaml"
ACCESS = REPOSITORY / "infra" / "aws_access.py"
BUCKET = "mshnet-test-bucket"
EDITS = {"EDIT-name-of-your-bucket": BUCKET, "EDIT-your-address/32": "203.0.113.7/32"}
MACHINES = {"gpu": {"CPU": 8, "GPU": 1}, "cpu": {"CPU": 8}}  # of the instance types in the file, as EC2 lists them


@pytest.fixture
def config() -> dict[str, Any]:
    """The file as it is."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def edited(folder: Path, **replacements: str) -> Path:
    """A copy with the operator's edits made, or with others."""
    text = FILE.read_text(encoding="utf-8")
    for placeholder, value in (EDITS | replacements).items():
        assert placeholder in text
        text = text.replace(placeholder, value)
    path = folder / "ray_cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def access(*arguments: str) -> subprocess.CompletedProcess[str]:
    """infra/aws_access.py with these arguments, in this process: each start of it loads AWS's SDK anew."""
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        patch.syspath_prepend(str(REPOSITORY / "infra"))
        code = importlib.import_module("aws_access").main(arguments)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def node_configs(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What EC2 gets, by node type."""
    return {name: node["node_config"] for name, node in config["available_node_types"].items()}


# --- valid ---


def test_the_file_agrees_with_rays_schema(config: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(config, schema)
    validate_config(prepare_config(copy.deepcopy(config)))


def test_nothing_is_left_to_rays_defaults_that_matters(config: dict[str, Any]) -> None:
    """Ray's defaults bring an old image, 256 GB disks and commands with an unpinned Ray."""
    filled = fillout_defaults(copy.deepcopy(config))
    defaulted = {name for name in filled if name not in config}
    assert defaulted == {
        "docker", "cluster_synced_files", "file_mounts_sync_continuously", "rsync_filter",
        "initialization_commands", "worker_setup_commands",
    }  # fmt: skip
    assert not any(filled[name] for name in defaulted)


def test_the_lines_to_edit_are_few_and_marked() -> None:
    lines = [
        line for line in FILE.read_text(encoding="utf-8").splitlines() if "EDIT" in line and "EDIT lines" not in line
    ]
    marked = [line for line in lines if "# EDIT" in line]
    assert 3 <= len(marked) <= 10
    # A placeholder cannot be left without its mark being seen.
    assert all("# EDIT" in line for line in lines if "EDIT-" in line)


def test_every_machine_has_its_price_beside_it() -> None:
    """Per hour, near the line with its size."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\s+InstanceType:", line):
            near = " ".join(lines[max(0, number - 3) : number + 1])
            assert re.search(r"\d\.\d\d(/h| on demand| spot)", near), line


# --- closed ---


def test_unedited_it_leads_nowhere(tmp_path: Path) -> None:
    for left, words in [("EDIT-name-of-your-bucket", "metadata.bucket"), ("EDIT-your-address/32", "metadata.ssh_from")]:
        refused = access("--bucket", str(edited(tmp_path, **{left: left})))
        assert refused.returncode == 1
        assert words in refused.stderr
        assert "edit that line" in refused.stderr


@pytest.mark.parametrize("network", ["0.0.0.0/0", "'::/0'", "16.0.0.0/4", "203.0.113.7/24", "home"])
def test_ssh_from_everywhere_is_refused(tmp_path: Path, network: str) -> None:
    refused = access("--bucket", str(edited(tmp_path, **{"EDIT-your-address/32": network})))
    assert refused.returncode == 1
    assert "metadata.ssh_from" in refused.stderr


@pytest.mark.parametrize("network", ["203.0.113.0/24", "'2001:db8::/48'", "203.0.113.7/32, 198.51.100.0/24"])
def test_networks_of_ones_own_are_taken(tmp_path: Path, network: str) -> None:
    assert access("--bucket", str(edited(tmp_path, **{"EDIT-your-address/32": network}))).returncode == 0


def test_no_secret_and_no_open_network_in_the_file() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert not re.search(r"AKIA|ASIA|aws_secret|aws_credentials|BEGIN .*PRIVATE|password\s*[:=]", text, re.IGNORECASE)
    assert "0.0.0.0" not in text
    assert "::/0" not in text


def test_every_machine_is_closed_alike(config: dict[str, Any]) -> None:
    configs = node_configs(config)
    for name, node in configs.items():
        assert node["MetadataOptions"]["HttpTokens"] == "required", name
        assert set(node["IamInstanceProfile"]) == {"Name"}, name
        assert all(
            disk["Ebs"]["Encrypted"] and disk["Ebs"]["VolumeType"] == "gp3" for disk in node["BlockDeviceMappings"]
        )
        assert {tag["ResourceType"] for tag in node["TagSpecifications"]} == {"instance", "volume"}
        assert "SecurityGroupIds" not in node  # the named group's
    head = config["head_node_type"]
    profiles = {name: node["IamInstanceProfile"]["Name"] for name, node in configs.items()}
    assert profiles.pop(head) not in profiles.values()
    assert "InstanceMarketOptions" not in configs[head]


def test_the_secrets_travel_as_files(config: dict[str, Any]) -> None:
    for path in ("~/.ray/auth_token", "~/.mshnet/cluster.env"):
        assert config["file_mounts"][path] == path


# --- what lies on the nodes ---


def sent(config: dict[str, Any], home: Path) -> Path:
    """~/mshnet of a node, by the real rsync with the file's own list."""
    exclude = [f"--exclude={pattern}" for pattern in config["rsync_exclude"]]
    for remote, local in config["file_mounts"].items():
        if remote.startswith("~/mshnet/"):
            source, target = REPOSITORY / local, home / remote.removeprefix("~/")
            target.parent.mkdir(parents=True, exist_ok=True)
            end = "/" if source.is_dir() else ""
            subprocess.run(["rsync", "-a", *exclude, f"{source}{end}", f"{target}{end}"], check=True)
    return home / "mshnet"


needs_rsync = pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is absent (apt-get install rsync)")


@needs_rsync
def test_only_the_repositorys_own_files_travel(config: dict[str, Any], tmp_path: Path) -> None:
    repository = sent(config, tmp_path)
    files = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert files <= set(listed.stdout.splitlines())
    assert sum(path.stat().st_size for path in repository.rglob("*") if path.is_file()) < 5e6


@needs_rsync
def test_what_travels_is_enough_to_install(config: dict[str, Any], tmp_path: Path) -> None:
    """pyproject.toml names files (README, LICENSE) without which the project cannot be built."""
    repository = sent(config, tmp_path)
    for command in (
        ["make", "-n", "setup"],
        [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-build-isolation", "--quiet", "."],
    ):
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr


# --- what runs on the nodes ---


def commands(config: dict[str, Any]) -> Iterator[str]:
    """Every shell command of the file."""
    for name, value in config.items():
        if name.endswith("_commands"):
            yield from value


def test_the_commands_are_shell(config: dict[str, Any]) -> None:
    # Ray wraps each one in parentheses, where a comment at its end would take the closing one along.
    for command in commands(config):
        checked = subprocess.run(["bash", "-n", "-c", f"({command})"], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, (command, checked.stderr)


@pytest.fixture
def node_home(config: dict[str, Any], tmp_path: Path) -> Path:
    """A node's home folder with the real files, but a node.sh and a ray that only tell how they were called."""
    home = tmp_path / "home"
    infra = home / "mshnet" / "infra"
    shutil.copytree(REPOSITORY / "infra", infra)
    report = '#!/bin/sh\nenv | grep -E "^(SERVICES|AWS_)" | sort; echo "$(basename "$0") $*"\n'
    binaries = home / "mshnet" / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for path in (infra / "node.sh", binaries / "ray"):
        path.write_text(report, encoding="utf-8")
        path.chmod(0o755)
    (binaries / "python").symlink_to(sys.executable)
    (home / "bin").mkdir()
    cloud_init = home / "bin" / "cloud-init"
    cloud_init.write_text('#!/bin/sh\n[ "$*" = "query region" ] && echo eu-central-1\n', encoding="utf-8")
    cloud_init.chmod(0o755)
    return home


def run(command: str, home: Path) -> subprocess.CompletedProcess[str]:
    """As Ray runs it on a node."""
    environment = {"HOME": str(home), "PATH": f"{home}/bin:/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(["bash", "-c", f"({command})"], env=environment, capture_output=True, text=True, check=False)


def test_the_head_starts_with_the_bucket_of_the_file(config: dict[str, Any], node_home: Path, tmp_path: Path) -> None:
    # Ray writes what it made of the file to this place, as JSON.
    resolved = yaml.safe_load(edited(tmp_path).read_text(encoding="utf-8"))
    (node_home / "ray_bootstrap_config.yaml").write_text(json.dumps(resolved), encoding="utf-8")
    stop, start = config["head_start_ray_commands"]
    assert run(stop, node_home).stdout == "ray stop\n"
    lines = run(start, node_home).stdout.splitlines()
    assert "ray start" in lines[0]
    assert "--autoscaling-config" in lines[0]
    assert lines[1:] == [
        "AWS_DEFAULT_REGION=eu-central-1",
        "SERVICES=database tracker monitoring",
        f"SERVICES_ARTIFACTS=s3://{BUCKET}/mlflow",
        "node.sh head",
    ]


def test_without_a_bucket_the_head_does_not_start(config: dict[str, Any], node_home: Path) -> None:
    shutil.copy(FILE, node_home / "ray_bootstrap_config.yaml")  # nothing edited
    failed = run(config["head_start_ray_commands"][1], node_home)
    assert failed.returncode != 0
    assert "metadata.bucket" in failed.stderr
    assert "node.sh head" not in failed.stdout


def test_a_worker_starts_in_its_region(config: dict[str, Any], node_home: Path) -> None:
    lines = run(config["worker_start_ray_commands"][1], node_home).stdout.splitlines()
    assert lines == ["AWS_DEFAULT_REGION=eu-central-1", "node.sh worker"]


# --- what the autoscaler makes of it: Ray's own scheduler, asked what it would start ---


@pytest.fixture
def autoscaling(config: dict[str, Any]) -> AutoscalingConfig:
    """As the head has it; the resources would be found by asking EC2."""
    filled = prepare_config(copy.deepcopy(config))
    for name, node in filled["available_node_types"].items():
        node["resources"] = node["resources"] or MACHINES[name[:3]]
    filled["auth"]["ssh_private_key"] = str(FILE)  # read only to be compared
    return AutoscalingConfig(filled, skip_content_hash=True)


def started(autoscaling: AutoscalingConfig, *demands: dict[str, float], failed: tuple[str, ...] = ()) -> Counter[str]:
    """Machines by node type for so many tasks; `failed`: types of which EC2 just had none."""
    request = SchedulingRequest(
        node_type_configs=autoscaling.get_node_type_configs(),
        max_num_nodes=autoscaling.get_max_num_worker_nodes(),
        resource_requests=[
            ResourceRequestByCount(request=ResourceRequestUtil.make(demand), count=1) for demand in demands
        ],
        disable_launch_config_check=False,
        cloud_resource_availabilities=dict.fromkeys(failed, 0.0),
        recoverable_resource_availabilities=dict.fromkeys(failed, 0.0),
    )
    to_launch = ResourceDemandScheduler(event_logger=None).schedule(request).to_launch
    return Counter({launch.instance_type: launch.count for launch in to_launch})


WORKER = {"CPU": 1, "GPU": 1}


def test_four_folds_get_four_spot_machines(autoscaling: AutoscalingConfig) -> None:
    assert started(autoscaling, *[WORKER] * 4) == {"gpu_spot": 4}


def test_where_spot_has_none_the_same_comes_on_demand(autoscaling: AutoscalingConfig) -> None:
    assert started(autoscaling, *[WORKER] * 4, failed=("gpu_spot",)) == {"gpu_on_demand": 4}


def test_preprocessing_gets_machines_without_gpu(autoscaling: AutoscalingConfig) -> None:
    assert started(autoscaling, *[{"CPU": 1}] * 16) == {"cpu_spot": 2}


def test_nothing_to_do_starts_nothing_and_nothing_starts_on_the_head(autoscaling: AutoscalingConfig) -> None:
    assert started(autoscaling) == {}
    assert sum(started(autoscaling, *[WORKER] * 40).values()) == 8  # 4 + 4, never the head's type


def test_spot_and_on_demand_are_the_same_machine(config: dict[str, Any]) -> None:
    configs = node_configs(config)
    spot = dict(configs["gpu_spot"])
    assert spot.pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot == configs["gpu_on_demand"]


def test_ray_asks_ec2_for_the_resources(config: dict[str, Any]) -> None:
    """So that a size is changed in one line."""
    assert hasattr(AWSNodeProvider, "fillout_available_node_types_resources")
    found = {name: node["resources"] for name, node in config["available_node_types"].items()}
    assert found.pop("head") == {"CPU": 0}
    assert set(map(str, found.values())) == {"{}"}
