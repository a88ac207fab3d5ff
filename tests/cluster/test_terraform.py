"""infra/terraform/: formatted, valid, and made and unmade for real against moto's AWS.

Its provider is found in the folder TF_PLUGIN_DIR, in one below /opt, or where terraform's own configuration says.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import yaml
from services import ROOT, clean_environment
from stores import KEYS, moto

FOLDER = ROOT / "infra/terraform"
AMI = "ami-12c6146b"  # one that moto has
VARIABLES = [f"-var=ami={AMI}", "-var=throw_away=true"]


def plugins() -> list[str]:
    folder = os.environ.get("TF_PLUGIN_DIR") or next(map(str, Path("/opt").glob("*/registry.terraform.io")), "")
    return [f"-plugin-dir={folder.removesuffix('/registry.terraform.io')}"] if folder else []


class Terraform:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = clean_environment() | {"TF_IN_AUTOMATION": "1", "CHECKPOINT_DISABLE": "1"}
        self.env.pop("TF_CLI_CONFIG_FILE", None)

    def __call__(self, verb: str, *words: str) -> subprocess.CompletedProcess[str]:
        line = ["terraform", verb, "-no-color", *words]
        return subprocess.run(line, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=1500)


@pytest.fixture(scope="module")
def terraform(tmp_path_factory: pytest.TempPathFactory) -> Terraform:
    if not shutil.which("terraform"):
        pytest.skip("terraform is not installed")
    folder = tmp_path_factory.mktemp("terraform")
    shutil.copytree(FOLDER, folder / "code", ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
    one = Terraform(folder / "code")
    done = one("init", "-input=false", *plugins())
    said = " ".join(done.stderr.split())
    if "Failed to query available provider packages" in said and "no available releases match" not in said:
        pytest.skip(f"terraform finds no provider hashicorp/aws (TF_PLUGIN_DIR names a folder): {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    return one


def test_formatted_and_valid(terraform: Terraform) -> None:
    done = terraform("fmt", "-check", "-diff")
    assert done.returncode == 0, done.stdout
    done = terraform("validate", "-json")
    told = json.loads(done.stdout)
    assert (told["valid"], told["diagnostics"]) == (True, [])


def test_a_misspelt_argument_is_refused(terraform: Terraform, tmp_path: Path) -> None:
    shutil.copytree(terraform.folder, tmp_path / "code", symlinks=True)
    wrong = Terraform(tmp_path / "code")
    file = wrong.folder / "storage.tf"
    file.write_text(file.read_text().replace("block_public_acls  ", "block_public_acl   "))
    assert 'An argument named "block_public_acl" is not expected here' in wrong("validate").stderr


def test_its_text_opens_nothing() -> None:
    """Ingress is from security groups alone; nothing has a public address; no secret, no password in the code."""
    text = "".join(file.read_text() for file in sorted(FOLDER.glob("*.tf")))
    for rule in re.findall(r"ingress {(.*?)}", text, re.S):
        assert "cidr" not in rule
        assert re.search(r"self +=|security_groups +=", rule)
    assert not re.search(r"(associate_public_ip_address|publicly_accessible|map_public_ip_on_launch) += true", text)
    assert not re.search(r'\bpassword +=|secret_string|random_password|"\*:\*"|AdministratorAccess', text)
    for statement in re.findall(r'actions += \[([^\]]*)\]\s+resources += \["\*"\]', text):
        assert all(re.search("ecr:GetAuthorizationToken|ec2:Describe", one) for one in statement.split(",")), statement


@pytest.fixture(scope="module")
def applied(terraform: Terraform) -> Iterator[dict[str, object]]:
    """Its outputs, and clients for what was made."""
    with moto(MOTO_IAM_LOAD_MANAGED_POLICIES="true") as address:
        terraform.env |= KEYS | {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"}
        terraform.env.pop("AWS_CA_BUNDLE", None)
        done = terraform("apply", "-input=false", "-auto-approve", *VARIABLES)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        out = {name: one["value"] for name, one in json.loads(terraform("output", "-json").stdout).items()}
        keys = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
        session = boto3.Session(region_name="us-east-1", **keys)
        yield out | {
            "client": lambda name: session.client(name, endpoint_url=address),
            "state": terraform("show", "-json").stdout,
        }


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_made_and_unmade_against_moto(terraform: Terraform, applied: dict, tmp_path: Path) -> None:
    client = applied["client"]
    bucket(client("s3"), applied["bucket"].removeprefix("s3://"))
    network(client("ec2"))
    templates(client("ec2"))
    policies(client("iam"))
    (database,) = client("rds").describe_db_instances()["DBInstances"]
    assert database["StorageEncrypted"]
    assert not database["PubliclyAccessible"]
    assert database["BackupRetentionPeriod"] >= 7
    assert applied["registry"].startswith("123456789012.dkr.ecr.us-east-1.")
    assert applied["tracking_uri"] == "http://mlflow.mmdistill.internal:5000"
    assert "MasterUserPassword" not in applied["state"]
    assert not re.search(r'"password": ?"[^"]', applied["state"]), "no password is in the state"
    start_script(client("ec2"), applied["mlflow_instance"], tmp_path)

    again = terraform("plan", "-input=false", "-detailed-exitcode", *VARIABLES)
    assert again.returncode in (0, 2), again.stderr
    assert "must be replaced" not in again.stdout, "a second apply makes nothing anew"

    done = terraform("destroy", "-input=false", "-auto-approve", *VARIABLES)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert client("s3").list_buckets()["Buckets"] == []
    assert not [one for one in client("ec2").describe_vpcs()["Vpcs"] if not one["IsDefault"]]
    assert client("iam").list_roles()["Roles"] == []


def bucket(s3, name):
    assert s3.get_bucket_versioning(Bucket=name)["Status"] == "Enabled"
    (rule,) = s3.get_bucket_encryption(Bucket=name)["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    blocked = s3.get_public_access_block(Bucket=name)["PublicAccessBlockConfiguration"]
    assert len(blocked) == 4
    assert all(blocked.values())
    policy = json.loads(s3.get_bucket_policy(Bucket=name)["Policy"])
    assert policy["Statement"][0]["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def network(ec2):
    (vpc,) = [one["VpcId"] for one in ec2.describe_vpcs()["Vpcs"] if not one["IsDefault"]]
    of = [{"Name": "vpc-id", "Values": [vpc]}]
    groups = ec2.describe_security_groups(Filters=of)["SecurityGroups"]
    assert {g["GroupName"] for g in groups} == {"default", "mmdistill-nodes", "mmdistill-mlflow", "mmdistill-database"}
    for group in groups:
        for rule in group["IpPermissions"]:
            assert not rule.get("IpRanges"), f"{group['GroupName']} is open"
            assert not rule.get("Ipv6Ranges"), f"{group['GroupName']} is open"
            assert rule["UserIdGroupPairs"]
    assert not any(s["MapPublicIpOnLaunch"] for s in ec2.describe_subnets(Filters=of)["Subnets"])


def templates(ec2):
    """As cluster/aws.yaml names them; what Ray copies from them into RunInstances has names that RunInstances knows."""
    file = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())
    wanted = {n["node_config"]["LaunchTemplate"]["LaunchTemplateName"] for n in file["available_node_types"].values()}
    assert {one["LaunchTemplateName"] for one in ec2.describe_launch_templates()["LaunchTemplates"]} == wanted
    known = ec2.meta.service_model.operation_model("RunInstances").input_shape.members
    for name in wanted:
        (version,) = ec2.describe_launch_template_versions(LaunchTemplateName=name, Versions=["$Default"])[
            "LaunchTemplateVersions"
        ]
        data = version["LaunchTemplateData"]
        assert data.keys() <= known.keys()
        (interface,) = data["NetworkInterfaces"]
        assert interface["AssociatePublicIpAddress"] is False
        assert data["IamInstanceProfile"]["Name"] == name
        assert data["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True


def policies(iam):
    """Least privilege: whatever changes something names what it changes."""
    seen = set()
    for role in iam.list_roles()["Roles"]:
        for name in iam.list_role_policies(RoleName=role["RoleName"])["PolicyNames"]:
            document = iam.get_role_policy(RoleName=role["RoleName"], PolicyName=name)["PolicyDocument"]
            for statement in document["Statement"]:
                actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
                seen |= {(role["RoleName"], action) for action in actions}
                assert not any(action.endswith("*") for action in actions), statement
                if statement["Resource"] == "*":
                    assert all(a.startswith("ec2:Describe") or a == "ecr:GetAuthorizationToken" for a in actions)
    assert ("mmdistill-head", "ec2:RunInstances") in seen
    assert not {action for role, action in seen if role == "mmdistill-worker" and action.startswith(("ec2:", "iam:"))}
    assert not {action for _, action in seen if action == "s3:DeleteObjectVersion"}


AWS = """#!/bin/bash
case "$*" in
    *'ecr get-login-password'*) echo login ;;
    *'put-secret-value'*) f=${@: -1}; cp "${f#file://}" FOLDER/kept ;;
    *'--secret-id mmdistill-mlflow '*)
        [ -e FOLDER/kept ] || { echo 'An error occurred (ResourceNotFoundException) ...' >&2; exit 254; }
        [ ! -e FOLDER/throttled ] || { echo 'An error occurred (ThrottlingException) ...' >&2; exit 254; }
        cat FOLDER/kept ;;
    *'get-secret-value'*) echo '{"password": "of-the-master"}' ;;
esac
"""
DOCKER = """#!/bin/bash
echo "$*" >>FOLDER/told
[ "$1" != login ] || cat >/dev/null
[ "$1" != run ] || cat FOLDER/secrets/* >>FOLDER/mounted
"""


def start_script(ec2, instance, folder):
    """MLflow's machine: the passwords are made once, and are on no command line. With stand-ins for aws and docker."""
    held = ec2.describe_instance_attribute(InstanceId=instance, Attribute="userData")["UserData"]["Value"]
    script = base64.b64decode(held).decode()
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    (inner,) = re.findall(r"<<'START'\n(.*?)\nSTART\n", script, re.S)
    assert "${" not in re.sub(r"\$\{(run\[@\]|UPGRADE:-no)\}", "", inner), "all of the template is filled in"
    for name, text in (("aws", AWS), ("docker", DOCKER)):
        (folder / name).write_text(text.replace("FOLDER", str(folder)))
        (folder / name).chmod(0o755)
    start = folder / "start"
    start.write_text(inner.replace("/run/mmdistill/secrets", str(folder / "secrets")))
    run = functools.partial(
        subprocess.run,
        ["bash", start],
        env=os.environ | {"PATH": f"{folder}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    for _ in range(2):
        done = run()
        assert done.returncode == 0, done.stderr
        kept = json.loads((folder / "kept").read_text())
        assert set(kept) == {"database", "admin", "session"}
        assert all(len(one) == 48 for one in kept.values())
    shown = (folder / "told").read_text() + done.stdout + done.stderr
    assert [line.split()[0] for line in shown.splitlines()] == ["login", "pull", "run", "run"] * 2
    mounted = (folder / "mounted").read_text()
    for secret in [*kept.values(), "of-the-master"]:
        assert secret not in shown
        assert secret in mounted
    assert mounted.count("of-the-master") == 2, "the master's password goes before the server comes"
    assert len(set(re.findall("[0-9a-f]{48}", mounted))) == 3, "the second start makes no new ones"
    (folder / "throttled").touch()
    done = run()
    assert done.returncode == 1
    assert "ThrottlingException" in done.stderr
    assert json.loads((folder / "kept").read_text()) == kept, "nor does one that got no answer"
