"""The files for `ray up`, by the check that users have (`mmdistill doctor --cluster FILE`), and by what they promise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from services import ROOT

from workflows.cluster.check import check_cluster, possible

FILES = ("aws", "gcp", "local")
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]  # type: ignore[index]


def config(name):
    return yaml.safe_load((ROOT / f"cluster/{name}.yaml").read_text())


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user with a token, readable by themselves alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    token = tmp_path / ".ray/auth_token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    return tmp_path


@pytest.fixture
def said(home):
    """What the check says of a configuration."""

    def check(given):
        file = home / "cluster.yaml"
        file.write_text(yaml.safe_dump(given))
        return check_cluster(file)

    return check


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_file_is_ready(name, home):
    file = home / "cluster.yaml"
    file.write_text((ROOT / f"cluster/{name}.yaml").read_text().replace("YOUR-PROJECT", "a-project"))
    assert check_cluster(file) == []


def test_what_is_still_to_be_filled_in_is_said(home):
    assert check_cluster(ROOT / "cluster/gcp.yaml") == ["YOUR-PROJECT is still to be filled in"]


def put(given, path, value):
    """A copy with `value` at the dotted path."""
    out = json.loads(json.dumps(given))  # no part of it is shared, as YAML's aliases are
    *way, last = path.split(".")
    inside = out
    for step in way:
        inside = inside[int(step) if step.isdigit() else step]
    inside[last] = value
    return out


WRONG = {
    "max_worker: 3": ("aws", "max_worker: no such key; did you mean max_workers?"),
    "idle_timeout_minutes: soon": ("aws", "idle_timeout_minutes: 'soon' is not of type 'number'"),
    "head_node_type: hed": ("aws", "`head_node_type` must be one of `available_node_types`."),
    "provider.cache_stoped_nodes: true": (
        "aws",
        "provider.cache_stoped_nodes: no such key; did you mean cache_stopped_nodes?",
    ),
    "docker.imag: x": ("aws", "docker.imag: no such key; did you mean image?"),
    "available_node_types.gpu.max_worker: 3": (
        "aws",
        "available_node_types.gpu.max_worker: no such key; did you mean max_workers?",
    ),
    "available_node_types.gpu.resources.GPU: 0.5": (
        "aws",
        "available_node_types.gpu.resources.GPU: 0.5 is not of type 'integer'",
    ),
    "available_node_types.cpu.min_workers: 9": ("aws", "available_node_types.cpu: min_workers is above max_workers"),
    "available_node_types.gpu.node_config.InstanceTyp: m7i": (
        "aws",
        "available_node_types.gpu.node_config.InstanceTyp: no such key; did you mean InstanceType?",
    ),
    "available_node_types.gpu.node_config.MetadataOptions.HttpToken: required": (
        "aws",
        "available_node_types.gpu.node_config.MetadataOptions.HttpToken: no such key; did you mean HttpTokens?",
    ),
    "available_node_types.gpu.node_config.machinType: g2": (
        "gcp",
        "available_node_types.gpu.node_config.machinType: no such key; did you mean machineType?",
    ),
    "available_node_types.gpu.node_config.disks.0.initializeParams.diskSizeGB: 5": (
        "gcp",
        "available_node_types.gpu.node_config.disks[0].initializeParams.diskSizeGB: no such key; did you mean diskSizeGb?",
    ),
    "head_start_ray_commands: [ray start --head]": (
        "aws",
        "head_start_ray_commands: RAY_AUTH_MODE=token is not set before ray start: Ray would ask nobody for the token",
    ),
    "head_start_ray_commands: [RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0]": (
        "aws",
        "head_start_ray_commands: --dashboard-host 0.0.0.0 can be reached from outside; use 127.0.0.1 and `ray dashboard`",
    ),
    "file_mounts: {/data: ./nowhere}": ("aws", "file_mounts: ./nowhere is not there"),
}


@pytest.mark.parametrize("change", WRONG)
def test_a_mistake_is_one_line(change, said):
    name, line = WRONG[change]
    path, value = change.split(": ", 1)
    given = yaml.safe_load((ROOT / f"cluster/{name}.yaml").read_text().replace("YOUR-PROJECT", "a-project"))
    assert said(put(given, path, yaml.safe_load(value))) == [line]


def test_a_type_that_the_cloud_refuses_is_told(said):
    (line,) = said(put(config("aws"), "available_node_types.gpu.node_config.InstanceType", 7))
    assert line.startswith("available_node_types.gpu.node_config: Invalid type for parameter InstanceType, value: 7")


def test_what_is_no_configuration_is_one_line(home):
    file = home / "cluster.yaml"
    (line,) = check_cluster(file)
    assert line == f"{file}: No such file or directory"
    file.write_text("a: [1")
    (line,) = check_cluster(file)
    assert line.startswith(f"{file}: not YAML: ")
    assert "\n" not in line
    file.write_text("- 1")
    assert check_cluster(file) == [f"{file}: holds no keys"]
    file.write_text("cluster_name: x")
    assert check_cluster(file) == ["'provider' is a required property"]
    file.write_text("cluster_name: x\nprovider: {type: local}")
    assert check_cluster(file) == ["provider: machines of your own need head_ip and worker_ips"]


def test_the_token_has_to_be_there_and_private(home):
    token = home / ".ray/auth_token"
    token.chmod(0o644)
    assert check_cluster(ROOT / "cluster/aws.yaml") == [
        "file_mounts: ~/.ray/auth_token can be read by others: chmod 600 ~/.ray/auth_token"
    ]
    token.unlink()
    assert check_cluster(ROOT / "cluster/aws.yaml") == [
        "file_mounts: ~/.ray/auth_token is not there: make it with `ray get-auth-token --generate`"
    ]


def test_the_command_ends_with_an_exit_code(home):
    bad = home / "bad.yaml"
    bad.write_text((ROOT / "cluster/aws.yaml").read_text().replace("max_workers: 24", "max_worker: 24"))
    for file, code, word in ((ROOT / "cluster/aws.yaml", 0, "ready for ray up"), (bad, 1, "max_worker: no such key")):
        words = [sys.executable, "-m", "workflows", "doctor", "--cluster", str(file)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert (done.returncode, word in done.stdout) == (code, True), done.stdout + done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_machines_come_with_demand_and_go_when_idle(name):
    given = config(name)
    groups = {key: node for key, node in given["available_node_types"].items() if key != given["head_node_type"]}
    assert all(node["min_workers"] == 0 for node in groups.values())
    assert given["idle_timeout_minutes"] <= 10
    assert given["provider"].get("cache_stopped_nodes", False) is False, "stopped machines cost their disks"
    assert any("GPU" in node["resources"] for node in groups.values())
    assert any("GPU" not in node["resources"] for node in groups.values())
    for node in groups.values():
        inside = node["node_config"]
        market = inside.get("InstanceMarketOptions", {}).get("MarketType") or inside["scheduling"]["provisioningModel"]
        assert market.lower() == "spot"
    assert given["available_node_types"]["head"]["resources"]["CPU"] == 0, "the head runs drivers alone"


@pytest.mark.parametrize("name", FILES)
def test_no_secret_and_no_door(name):
    text = (ROOT / f"cluster/{name}.yaml").read_text()
    given = yaml.safe_load(text)
    assert given["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert not re.search(r"RAY_AUTH_TOKEN=|AKIA|BEGIN .*PRIVATE|password:", text)
    assert not re.search(r"0\.0\.0\.0|accessConfigs|AssociatePublicIpAddress", text), "no public address"
    if name != "local":
        assert given["provider"]["use_internal_ips"] is True
        assert given["auth"]["ssh_proxy_use_node_id"] is True
        assert "ssh_private_key" not in given["auth"], "Ray makes a key of its own"
    for commands in (given["head_start_ray_commands"], given["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert start.index("RAY_AUTH_MODE=token") < start.index("ray start")


def test_the_image_has_one_name_with_one_version():
    """cluster/ and build.sh mean the same images: mmdistill:VERSION, with -gpu or -cpu where the build is meant."""
    found = {}
    for file in [*(ROOT / "cluster").glob("*.yaml"), *(ROOT / "cluster/kuberay").glob("*.yaml")]:
        for name in re.findall(r"mmdistill:[0-9][\w.-]*", file.read_text()):
            found.setdefault(name, []).append(file.name)
    assert set(found) == {
        f"mmdistill:{VERSION}",
        f"mmdistill:{VERSION}-",
        f"mmdistill:{VERSION}-cpu",
        f"mmdistill:{VERSION}-gpu",
    }
    assert config("aws")["docker"]["image"] == config("gcp")["docker"]["image"] == f"mmdistill:{VERSION}"


def test_terraform_makes_what_the_aws_file_names():
    given, text = config("aws"), "".join(p.read_text() for p in Path(ROOT / "infra/terraform").glob("*.tf"))
    names = {n["node_config"]["LaunchTemplate"]["LaunchTemplateName"] for n in given["available_node_types"].values()}
    assert names == {"mmdistill-head", "mmdistill-worker"}
    assert 'name                   = "${var.name}-${each.key}"' in text
    assert 'toset(["head", "worker"])' in text
    defaults = dict(re.findall(r'variable "(\w+)" {[^}]*?default\s+= "([^"]*)"', text))
    assert given["cluster_name"] == defaults["name"] == "mmdistill"
    assert given["provider"]["region"] == defaults["region"]


def test_what_a_cluster_can_ever_have(tmp_path, monkeypatch):
    """As its head is told: never more machines than the file allows in all."""
    file = tmp_path / "ray_bootstrap_config.yaml"
    assert possible(file) == {}
    given = config("aws")
    file.write_text(json.dumps(given))
    assert possible(file) == {"CPU": 8 * 16 + 16 * 8, "GPU": 16}
    file.write_text(json.dumps(given | {"max_workers": 10}))
    assert possible(file) == {"CPU": 8 * 16 + 2 * 8, "GPU": 10}
    monkeypatch.setenv("MMDISTILL_ROOM", '{"CPU": 3}')
    assert possible(file) == {"CPU": 3}
