"""compose.yaml and what it starts, as far as it goes without a container engine: its text, and the entrypoint itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import requests
import yaml
from services import INFRA, clean_environment, free_ports

FOLDER = INFRA / "mlflow"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]


def test_the_services_and_who_reaches_whom():
    assert set(SERVICES) == {"postgres", "mlflow", "proxy"}
    assert SERVICES["postgres"]["networks"] == ["inside"], "the database is reached from inside alone"
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    assert SERVICES["mlflow"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert SERVICES["proxy"]["depends_on"]["mlflow"]["condition"] == "service_healthy"
    assert all(service["healthcheck"]["test"] for service in SERVICES.values())
    assert SERVICES["postgres"]["volumes"][0].split(":")[0] in COMPOSE["volumes"], "the data outlive the container"


def test_the_proxy_alone_has_a_port_and_on_loopback_unless_told():
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports == {"proxy": ["${ADDRESS:-127.0.0.1}:${PORT:-8443}:443"]}
    example = dict(re.findall(r"^(\w+)=(.*)$", (FOLDER / ".env.example").read_text(), re.M))
    assert example["ADDRESS"] == "127.0.0.1"


def test_no_secret_stands_in_a_file():
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|TOKEN|ACCESS_KEY", key):
                assert key.endswith("_FILE"), f"{name}: {key}"
                assert value.startswith("/run/secrets/")
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
    assert all(list(secret) == ["file"] for secret in COMPOSE["secrets"].values())
    assert not re.search("PASSWORD|SECRET|KEY", (FOLDER / ".env.example").read_text())
    for ignored in (".env", "secrets/key.pem"):
        done = subprocess.run(["git", "check-ignore", "-q", ignored], cwd=FOLDER)
        assert done.returncode == 0, f"{ignored} could be committed"


def test_every_variable_has_a_value_or_is_asked_for():
    """Each ${X} of the file has a default, or stops compose with a word; .env.example names all that are asked for."""
    text = (FOLDER / "compose.yaml").read_text()
    example = set(re.findall(r"^(\w+)=", (FOLDER / ".env.example").read_text(), re.M))
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    assert asked == {"NAME", "BUCKET", "AWS_ENDPOINT_URL"}
    assert asked <= example
    assert set(re.findall(r"\$\{(\w+)\}", text)) <= asked
    hosts = SERVICES["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert "*" not in hosts
    assert any("NAME" in host for host in hosts)
    assert SERVICES["mlflow"]["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_versions_are_pinned_and_those_of_the_constraints():
    for name in ("postgres", "proxy"):
        assert re.fullmatch(r"[a-z]+:\d+\.\d+(\.\d+)?-bookworm", SERVICES[name]["image"])
    docker = (FOLDER / "Dockerfile").read_text()
    pins = dict(re.findall(r"([a-z0-9-]+)(?:\[auth\])?==([\d.]+)", docker))
    assert set(pins) == {"mlflow", "psycopg2-binary", "boto3"}
    constraints = dict(re.findall(r"^([a-z0-9-]+)==([\d.]+)", (INFRA / "constraints.txt").read_text(), re.M))
    assert {name: constraints.get(name, version) for name, version in pins.items()} == pins
    assert SERVICES["mlflow"]["image"].endswith(f":{pins['mlflow']}")
    assert re.search(r"^FROM python:\d+\.\d+\.\d+-", docker, re.M)


def test_all_that_is_mounted_or_copied_is_there():
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            if volume.startswith("./"):
                assert (FOLDER / volume.split(":")[0]).is_file(), volume
    (copied,) = re.findall(r"^COPY (.*) /opt/mlflow/$", (FOLDER / "Dockerfile").read_text(), re.M)
    ignore = (FOLDER / ".dockerignore").read_text().split()
    assert ignore == ["*", *(f"!{name}" for name in copied.split())]
    assert all((FOLDER / name).is_file() for name in copied.split())


def test_the_proxys_template_is_filled(tmp_path):
    """By the container's own command, up to the point where nginx starts."""
    command = SERVICES["proxy"]["command"][2].replace(
        "/etc/nginx/conf.d/default.conf && exec nginx -g 'daemon off;'", str(tmp_path / "out")
    )
    command = command.replace("/proxy.conf.in", str(FOLDER / "proxy.conf.in"))
    subprocess.run(["bash", "-c", command], check=True)
    text = (tmp_path / "out").read_text()
    assert "listen 443 ssl;" in text
    assert "proxy_pass http://mlflow:5000;" in text
    assert not re.search("@[A-Z]+@", text)


@pytest.mark.services
@pytest.mark.timeout(1800)
def test_the_entrypoint_serves(server, stack, tmp_path):
    """What the container of MLflow runs, over the shared stack's PostgreSQL and S3 store."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (port,) = free_ports(1)
    values = {
        "database": (server.dir / "secrets/mlflow-database").read_text(),
        "admin": stack["MLFLOW_TRACKING_PASSWORD"],
        "session": "0" * 32,
        "s3-access-key": stack["AWS_ACCESS_KEY_ID"],
        "s3-secret-key": stack["AWS_SECRET_ACCESS_KEY"],
    }
    fixed = {k: v for k, v in SERVICES["mlflow"]["environment"].items() if "$" not in v}
    env = clean_environment() | fixed
    env |= {
        "SECRETS": str(secrets),
        "TMPDIR": str(tmp_path),
        "RUN_AS": "",
        "DATABASE": f"127.0.0.1:{server.ports['postgres-port']}",
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "ARTIFACTS": f"{stack['MMDISTILL_BUCKET']}/mlflow",
        "AWS_ENDPOINT_URL": stack["AWS_ENDPOINT_URL"],
        "MLFLOW_SERVER_ALLOWED_HOSTS": "mlflow.example.org,127.0.0.1:*",
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
    }
    words = ["bash", str(FOLDER / "entrypoint.sh")]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert (done.returncode, "secrets/database is missing or empty" in done.stderr) == (1, True)
    for name, value in values.items():
        (secrets / name).write_text(value)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                requests.get(f"http://127.0.0.1:{port}/health", timeout=2).raise_for_status()
                break
            except requests.RequestException:
                time.sleep(0.2)
        account = ("admin", stack["MLFLOW_TRACKING_PASSWORD"])
        assert requests.get(url, timeout=20).status_code == 401
        assert requests.get(url, auth=account, timeout=20).status_code == 200
        assert requests.get(url, auth=account, headers={"Host": "mlflow.example.org"}, timeout=20).status_code == 200
        assert requests.get(url, auth=account, headers={"Host": "evil.example"}, timeout=20).status_code == 403
        line = subprocess.run(["ps", "-o", "args=", "-g", str(process.pid)], capture_output=True, text=True).stdout
        assert "mlflow" in line
        assert not any(value.strip() in line for name, value in values.items() if name != "session")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.mark.services
def test_databases_are_made_on_a_server_that_is_there(tmp_path):
    """As MLflow's machine in the cloud does at each start: by a `postgres` that is no superuser, as managed servers have it."""
    import psycopg2
    from servers import PostgreSQL

    server = PostgreSQL()
    try:
        connect = {"host": "127.0.0.1", "port": server.port}
        admin = psycopg2.connect(user="postgres", dbname="postgres", **connect)
        admin.autocommit = True
        with admin.cursor() as cursor:
            cursor.execute("CREATE ROLE boss SUPERUSER LOGIN")
        admin.close()
        admin = psycopg2.connect(user="boss", dbname="postgres", **connect)
        admin.autocommit = True
        with admin.cursor() as cursor:
            # The first user of a server stays superuser: `postgres` is made anew beside it.
            cursor.execute("ALTER ROLE postgres RENAME TO first")
            cursor.execute("CREATE ROLE postgres LOGIN CREATEDB CREATEROLE")
        (tmp_path / "database").write_text("a-password\n")
        (tmp_path / "master").write_text("another")
        words = [sys.executable, str(FOLDER / "database.py"), "create", f"127.0.0.1:{server.port}"]
        for _ in range(2):  # the second finds all as it should be
            done = subprocess.run(words, env=os.environ | {"SECRETS": str(tmp_path)}, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "password" not in done.stdout + done.stderr
        for database in ("mlflow", "mlflow_auth"):
            owner = psycopg2.connect(user="mlflow", dbname=database, **connect)
            with owner.cursor() as cursor:
                cursor.execute("CREATE TABLE kept (x int)")
            owner.close()
        admin.close()
    finally:
        server.close()
