"""The server stack as it runs: who comes in, what it keeps, what it says when something is wrong."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from services import INFRA, CommandLines, Server, clean_environment, command, free_ports, running

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]  # a fixture starts a whole stack
DAEMONS = ("postgres", "mlflow", "proxy", "mon", "osd", "rgw")


def search(env, **options):
    """A request that needs an account and the database."""
    options.setdefault("verify", env["MLFLOW_TRACKING_SERVER_CERT_PATH"])
    return requests.get(
        f"{env['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search?max_results=10", timeout=20, **options
    )


def account(env):
    return env["MLFLOW_TRACKING_USERNAME"], env["MLFLOW_TRACKING_PASSWORD"]


def s3(env):
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        region_name=env["AWS_REGION"],
    )


def test_only_accounts_come_in(stack):
    assert search(stack).status_code == 401
    assert search(stack, auth=("admin", "password1234")).status_code == 401
    assert search(stack, auth=account(stack)).status_code == 200
    page = requests.get(stack["MLFLOW_TRACKING_URI"], verify=stack["MLFLOW_TRACKING_SERVER_CERT_PATH"], timeout=20)
    assert page.status_code == 401


def test_a_foreign_host_is_refused(stack):
    """DNS rebinding: a page elsewhere whose name comes to point here."""
    for host in ("evil.example", "evil.example:8443", "10.0.0.7"):
        answer = search(stack, auth=account(stack), headers={"Host": host})
        assert answer.status_code == 403, host
    assert search(stack, auth=account(stack), headers={"Host": "localhost"}).status_code == 200


def test_a_page_of_another_origin_can_not_write(stack):
    url = f"{stack['MLFLOW_TRACKING_URI']}/ajax-api/2.0/mlflow/experiments/create"
    options = {"auth": account(stack), "verify": stack["MLFLOW_TRACKING_SERVER_CERT_PATH"], "timeout": 20}
    body = {"name": f"origin-{time.time()}"}
    assert requests.post(url, json=body, headers={"Origin": "https://evil.example"}, **options).status_code == 403
    own = requests.post(url, json=body, headers={"Origin": stack["MLFLOW_TRACKING_URI"]}, **options)
    assert own.status_code == 200, own.text


def test_tls_is_verified_by_the_own_ca_alone(stack, server):
    with pytest.raises(requests.exceptions.SSLError):
        search(stack, auth=account(stack), verify=True)
    plain = f"http://127.0.0.1:{server.ports['port']}/health"
    assert requests.get(plain, timeout=20).status_code == 400
    ca = Path(stack["MLFLOW_TRACKING_SERVER_CERT_PATH"])
    assert "PRIVATE" not in ca.read_text()
    shown = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", ca, server.dir / "tls/server.pem"],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr


def sockets(process):
    """The inodes of a process's sockets."""
    found = set()
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        try:
            link = os.readlink(descriptor)
        except FileNotFoundError:  # closed since
            continue
        if link.startswith("socket:["):
            found.add(link[8:-1])
    return found


def test_all_listen_on_loopback_alone(server):
    """Of the stack's own processes, by the kernel's tables: no socket listens on another address."""
    listening = {}
    for name in DAEMONS:
        inodes = set().union(*(sockets(process) for process in running(server.pid(name))))
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == "0A" and words[9] in inodes:
                    listening.setdefault(name, set()).add(words[1].split(":")[0])
    assert listening == {name: {"0100007F"} for name in DAEMONS}


def test_no_secret_in_a_command_line_nor_in_a_log(server):
    """Seen over the whole first start, and now."""
    with CommandLines() as now:
        time.sleep(0.5)
    lines = b"\n".join(server.lines | now.seen)
    for word in (b"initdb", b"ceph-authtool", b"radosgw-admin", b"mlflow\0server", b"nginx"):
        assert word in lines, f"the watch saw no {word!r}"
    for secret in server.secrets():
        assert len(secret) >= 20
        assert secret.encode() not in lines
        for log in (server.dir / "log").iterdir():
            assert secret not in log.read_text(errors="replace"), log


def test_secrets_are_their_owners_alone(server):
    files = [
        *(server.dir / "secrets").iterdir(),
        *(server.dir / "tls").glob("*.key"),
        *(server.dir / "ceph/keys").iterdir(),
    ]
    assert len(files) >= 10
    for file in files:
        assert file.stat().st_mode & 0o077 == 0, file


def test_a_client_logs_and_reads_back(in_stack, tmp_path):
    import mlflow
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=in_stack["MLFLOW_TRACKING_URI"])
    run = client.create_run(client.create_experiment(f"client-{time.time()}")).info
    assert run.artifact_uri.startswith("mlflow-artifacts:/"), "artifacts go through the server"
    client.log_param(run.run_id, "k", 8)
    for step in range(5):
        client.log_metric(run.run_id, "loss", 1 / (step + 1), step=step)
    data = os.urandom(9_000_000)
    (tmp_path / "weights").write_bytes(data)
    client.log_artifact(run.run_id, str(tmp_path / "weights"))
    assert [m.value for m in client.get_metric_history(run.run_id, "loss")] == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    uri = in_stack["MLFLOW_TRACKING_URI"]
    back = mlflow.artifacts.download_artifacts(
        f"runs:/{run.run_id}/weights", dst_path=str(tmp_path / "back"), tracking_uri=uri
    )
    assert Path(back).read_bytes() == data
    bucket = in_stack["MMDISTILL_BUCKET"].removeprefix("s3://")
    key = "mlflow/" + run.artifact_uri.removeprefix("mlflow-artifacts:/") + "/weights"
    assert s3(in_stack).get_object(Bucket=bucket, Key=key)["Body"].read() == data


LOGGER = """
import sys
from mlflow import MlflowClient
from mlflow.entities import Metric
client, run, me = MlflowClient(), sys.argv[1], int(sys.argv[2])
for step in range(30):
    client.log_batch(run, metrics=[Metric(f"m{me}", 1000 * me + step, 1 + step, step), Metric("all", me, 1, 30 * me + step)])
"""


def test_eight_processes_at_once_lose_nothing(in_stack):
    """Every metric is there once, those of a name of its own and those that all write under one name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=in_stack["MLFLOW_TRACKING_URI"])
    run = client.create_run(client.create_experiment(f"eight-{time.time()}")).info.run_id

    def log(me):
        words = [sys.executable, "-c", LOGGER, run, str(me)]
        return subprocess.run(words, env=clean_environment() | in_stack, capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(8) as pool:
        for done in pool.map(log, range(8)):
            assert done.returncode == 0, done.stderr
    for me in range(8):
        history = client.get_metric_history(run, f"m{me}")
        assert sorted((m.step, m.value) for m in history) == [(step, 1000 * me + step) for step in range(30)]
    assert sorted(m.step for m in client.get_metric_history(run, "all")) == list(range(240))


def test_a_second_start_changes_nothing(server):
    before = {name: server.pid(name) for name in DAEMONS}
    server.start()
    assert {name: server.pid(name) for name in DAEMONS} == before
    done = server("status")
    assert done.returncode == 0
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [[name, "up"] for name in DAEMONS]


def test_options_are_not_changed_under_a_running_stack(server):
    done = server("start", "--workers", "2")
    assert done.returncode == 1
    assert "is running with other options: stop it before you change them" in done.stderr
    assert "WORKERS=1" in (server.dir / "settings").read_text()


def test_what_died_is_shown_and_started_again(server, stack):
    """MLflow's first process alone is killed, and leaves its worker behind on the port."""
    before = {name: server.pid(name) for name in DAEMONS}
    os.kill(before["mlflow"], signal.SIGKILL)
    time.sleep(0.5)
    assert running(before["mlflow"])
    done = server("status")
    assert done.returncode == 3
    assert re.search(r"^mlflow +down +.*log .*/log/mlflow\.log$", done.stdout, re.M)
    server.start()
    assert not running(before["mlflow"])
    after = {name: server.pid(name) for name in DAEMONS}
    assert {name for name in DAEMONS if after[name] != before[name]} == {"mlflow"}
    assert search(stack, auth=account(stack)).status_code == 200


def test_stop_and_start_keep_everything(server, in_stack, tmp_path):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=in_stack["MLFLOW_TRACKING_URI"])
    run = client.create_run(client.create_experiment(f"kept-{time.time()}")).info.run_id
    client.log_metric(run, "loss", 0.25, step=7)
    client.log_text(run, "kept", "note.txt")
    bucket = in_stack["MMDISTILL_BUCKET"].removeprefix("s3://")
    s3(in_stack).put_object(Bucket=bucket, Key="data/shard", Body=b"shard")
    groups = [server.pid(name) for name in DAEMONS]
    server.stop()
    states = [line.split()[1] for line in server("status").stdout.splitlines()]
    left = {group: running(group) for group in groups}
    server.start()
    assert states == ["down"] * 6
    assert left == {group: [] for group in groups}
    assert server.environment() == in_stack
    assert [(m.step, m.value) for m in client.get_metric_history(run, "loss")] == [(7, 0.25)]
    assert Path(client.download_artifacts(run, "note.txt", str(tmp_path))).read_text() == "kept"
    assert s3(in_stack).get_object(Bucket=bucket, Key="data/shard")["Body"].read() == b"shard"


# What it says when something is wrong


def only_line(done):
    """The one line of an error."""
    assert done.returncode == 1, done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.strip()


@pytest.fixture
def place(tmp_path_factory):
    one = Server()
    yield one
    one.remove()


@pytest.mark.parametrize("missing", ["nginx", "postgres", "radosgw"])
def test_a_missing_package_is_named(place, tmp_path, missing):
    """PATH holds all that the script calls but one program: its package is named, and nothing is started."""
    shadow = tmp_path / "bin"
    shadow.mkdir()
    folders = ["/usr/bin", "/bin", "/usr/sbin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))]
    for folder in folders:
        for program in Path(folder).iterdir():
            if program.name != missing and not (shadow / program.name).exists():
                (shadow / program.name).symlink_to(program)
    env = {"PATH": str(shadow), "MMDISTILL_TOOL_PATH": ""}
    package = {"nginx": "nginx-light", "postgres": "postgresql", "radosgw": "radosgw"}[missing]
    said = only_line(command("stack.sh", "start", place.dir, *place.options, env=env))
    assert said == f"stack.sh: not found: {missing}; apt-get install -y --no-install-recommends {package}"
    assert package in (INFRA / "debian-packages.txt").read_text().split()
    assert not place.dir.exists()


def test_python_without_the_extra_is_told_what_to_install(place, tmp_path, stack):
    import venv

    venv.create(tmp_path / "bare", symlinks=True)
    options = [*place.options, "--python", str(tmp_path / "bare/bin/python"), "--bucket", stack["MMDISTILL_BUCKET"]]
    said = only_line(command("stack.sh", "start", place.dir, *options, env=stack))
    assert "lacks mlflow psycopg2 flask_wtf boto3: pip install 'mmdistill[server]' in it" in said


@pytest.mark.parametrize("option", ["port", "postgres-port", "s3-port"])
def test_a_port_that_is_taken(place, option):
    """Refused by name; what had been started before it is stopped."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", place.ports[option]))
        other.listen()
        done = place("start", *place.options)
    assert done.returncode == 1
    line = f"port {place.ports[option]} of 127.0.0.1 is taken by another program: choose another with --{option}"
    assert next(text for text in done.stderr.splitlines() if not text.endswith(": stopped")).endswith(line)
    assert "up " not in place("status").stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prot", "1"], "--prot: no such option; there are:"),
        (["--port", "http"], "--port http: not a number"),
        (["--port", "80443"], "--port 80443: a port is at most 65535"),
        (["--address", "0.0.0.0"], "say with --name what clients call this machine"),
        (["--certificate", "/etc/hostname"], "--certificate wants its --key"),
        (["--bucket", "mmdistill"], "--bucket mmdistill: wants s3://NAME"),
        (["--s3-store", "tape"], "--s3-store tape: disk or memory"),
        (["--port"], "--port: wants a value"),
    ],
)
def test_a_wrong_option(place, options, says):
    done = place("start", *options)
    assert done.returncode == 1
    assert says in done.stderr.splitlines()[0]
    assert not place.dir.exists()


def test_a_folder_that_is_not_a_stacks_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    before = tmp_path.stat()
    said = only_line(command("stack.sh", "start", tmp_path))
    assert said.endswith("is not empty, and nothing of a stack's: name another folder")
    assert (tmp_path.stat().st_mode, tmp_path.stat().st_uid) == (before.st_mode, before.st_uid)
    for verb in ("stop", "status", "env"):
        assert only_line(command("stack.sh", verb, tmp_path)).endswith("no stack was started here")


def test_a_bucket_that_does_not_answer(place):
    (port,) = free_ports(1)
    env = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    done = command("stack.sh", "start", place.dir, *place.options, "--bucket", "s3://nowhere", env=env)
    assert f"http://127.0.0.1:{port}" in only_line(done)
