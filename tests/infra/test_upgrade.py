"""An MLflow server over databases of another release: an older one's are kept and upgraded, a newer one's are refused."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from services import Server

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]  # a fixture starts a whole stack

TRACKING_2 = "0584bdc529eb"  # the last schema of MLflow 2: no logged models, traces of before
AUTH_2 = "8606fa83a998"  # the first revision of the accounts' schema; MLflow 2 had no table that says so

# MLflow's own migrations from its first schema on, up to a revision of long ago, and rows as a server of that time wrote them.
OLD = f"""
import os, time, sqlalchemy as sa
from alembic import command
from mlflow.store.db.utils import _get_alembic_config
from mlflow.store.tracking.dbmodels.initial_models import Base
from mlflow.server.auth.db import utils as auth
from werkzeug.security import generate_password_hash

engine = sa.create_engine(os.environ["MLFLOW_BACKEND_STORE_URI"])
Base.metadata.create_all(engine)
config = _get_alembic_config(str(engine.url))
with engine.begin() as connection:
    config.attributes["connection"] = connection
    command.upgrade(config, "{TRACKING_2}")
with engine.begin() as c:
    say = lambda text, **values: c.execute(sa.text(text), values)
    for number, name in enumerate(("Default", "old")):
        say("insert into experiments (experiment_id, name, artifact_location, lifecycle_stage) values (:i, :n, :a, 'active')",
            i=number, n=name, a=f"mlflow-artifacts:/{{number}}")
    say("select setval('experiments_experiment_id_seq', 1)")
    say("insert into runs (run_uuid, name, status, start_time, lifecycle_stage, experiment_id, artifact_uri, source_type, user_id)"
        " values ('{"a" * 32}', 'digits', 'FINISHED', 1, 'active', 1, 'mlflow-artifacts:/1/x/artifacts', 'LOCAL', 'ada')")
    for step in range(3):
        say("insert into metrics (key, value, timestamp, run_uuid, step, is_nan) values"
            " ('loss', :v, 5, '{"a" * 32}', :s, false)", v=1 / (step + 1), s=step)
    say("insert into latest_metrics (key, value, timestamp, step, is_nan, run_uuid) values"
        " ('loss', :v, 5, 2, false, '{"a" * 32}')", v=1 / 3)
    say("insert into params (key, value, run_uuid) values ('k', '8', '{"a" * 32}')")
    say("insert into registered_models (name, creation_time, last_updated_time) values ('student', 1, 1)")
    say("insert into model_versions (name, version, creation_time, last_updated_time, current_stage, source, run_id, status)"
        " values ('student', 1, 1, 1, 'None', 'mlflow-artifacts:/1/x', '{"a" * 32}', 'READY')")
    say("insert into registered_model_aliases (name, alias, version) values ('student', 'champion', 1)")
engine = sa.create_engine(os.environ["AUTH_DATABASE_URI"])
auth.migrate(engine, "{AUTH_2}")
with engine.begin() as c:
    say = lambda text, **values: c.execute(sa.text(text), values)
    say("drop table alembic_version_auth")
    for name in ("admin", "ada"):
        password = os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"] if name == "admin" else "ada's own password"
        say("insert into users (username, password_hash, is_admin) values (:n, :p, :a)",
            n=name, p=generate_password_hash(password), a=name == "admin")
"""


def inside(server, words, **options):
    """A command with the environment that MLflow's server has."""
    line = '. "$0/secrets/mlflow.env" && exec "$@"'
    return subprocess.run(
        ["bash", "-c", line, server.dir, *words], capture_output=True, text=True, timeout=120, **options
    )


def sql(server, text, database="postgres"):
    words = ["psql", "-h", "127.0.0.1", "-p", str(server.ports["postgres-port"]), "-U", "postgres", "-d", database]
    done = inside(server, [*words, "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1"], input=text)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def old(stack):
    """A server that was started once, with both databases of it put back to an old release's; stopped."""
    server = Server("mlflow/serve.sh", "--bucket", stack["MMDISTILL_BUCKET"], env=stack)
    try:
        server.start()
        for name in ("mlflow", "mlflow_auth"):
            sql(server, f"drop database {name} with (force);")
            sql(server, f"create database {name} owner mlflow;")
        done = inside(server, [sys.executable, "-c", OLD])
        assert done.returncode == 0, done.stderr
        server.stop()
        yield server
    finally:
        server.remove()


def test_an_older_releases_databases_are_kept_and_upgraded(old, monkeypatch):
    from mlflow import MlflowClient

    done = old("start")
    assert done.returncode == 0, done.stderr
    assert "mlflow: an older release's databases, kept in " in done.stdout
    env = old.environment()
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    client = MlflowClient(tracking_uri=env["MLFLOW_TRACKING_URI"], registry_uri=env["MLFLOW_TRACKING_URI"])
    run = client.get_run("a" * 32)
    assert (run.info.run_name, run.data.params, run.data.metrics) == ("digits", {"k": "8"}, {"loss": 1 / 3})
    assert [(m.step, m.value) for m in client.get_metric_history("a" * 32, "loss")] == [(0, 1), (1, 1 / 2), (2, 1 / 3)]
    assert client.get_model_version_by_alias("student", "champion").run_id == "a" * 32
    assert client.create_run(client.create_experiment(f"new-{time.time()}")).info.status == "RUNNING"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "ada's own password")
    assert client.get_run("a" * 32).data.params == {"k": "8"}, "accounts of before still come in"

    (kept,) = (old.dir / "backups").glob("before-upgrade-*")
    sql(old, "create database look;")
    with (kept / "mlflow.dump").open("rb") as dump:
        words = ["pg_restore", "-h", "127.0.0.1", "-p", str(old.ports["postgres-port"]), "-U", "postgres", "-d", "look"]
        line = '. "$0/secrets/mlflow.env" && exec "$@"'
        subprocess.run(["bash", "-c", line, old.dir, *words], stdin=dump, check=True, capture_output=True)
    assert sql(old, "select version_num from alembic_version;", "look") == TRACKING_2
    assert sql(old, "select count(*) from metrics;", "look") == "3"
    sql(old, "drop database look;")
    assert (kept / "mlflow_auth.dump").stat().st_size > 1000

    old.stop()
    assert "older release" not in old("start").stdout, "it is upgraded once"


@pytest.mark.parametrize(
    ("database", "table"), [("mlflow", "alembic_version"), ("mlflow_auth", "alembic_version_auth")]
)
def test_a_newer_releases_databases_are_refused(old, database, table):
    """And PostgreSQL, which was up by then, is stopped again."""
    old.start()
    revision = sql(old, f"select version_num from {table};", database)
    sql(old, f"update {table} set version_num = 'ffffffffffff';", database)
    old.stop()
    done = old("start")
    assert done.returncode == 1
    assert "was written by a newer MLflow than" in done.stderr.splitlines()[0]
    assert "up " not in old("status").stdout
    assert len(list((old.dir / "backups").iterdir())) <= 1
    put_back(old, database, table, revision)
    old.start()


def put_back(server, database, table, revision):
    """With PostgreSQL alone, as MLflow does not start."""
    words = ["postgres", "-D", str(server.dir / "postgres/data"), "-p", str(server.ports["postgres-port"])]
    words += ["-c", "unix_socket_directories="]
    bins = subprocess.run("ls -d /usr/lib/postgresql/*/bin", shell=True, capture_output=True, text=True).stdout.split()
    owner = (server.dir / "postgres/data").stat()
    drop = (
        [] if owner.st_uid == 0 else ["setpriv", f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups"]
    )
    process = subprocess.Popen(
        [*drop, f"{bins[-1]}/{words[0]}", *words[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            try:
                sql(server, f"update {table} set version_num = '{revision}';", database)
                break
            except AssertionError:
                time.sleep(0.2)
        else:
            raise AssertionError("PostgreSQL did not come up")
    finally:
        process.send_signal(2)
        process.wait(60)


def test_a_part_that_ends_while_it_starts(old):
    """The proxy can't read its configuration: what had been started before it is stopped again, and the log is named."""
    old.stop()
    wrong = old.dir / "nginx/server-wrong.conf"
    wrong.write_text("no_such_word;")
    wrong.chmod(0o644)
    done = old("start")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == f"serve.sh: proxy ended while it started: see {old.dir}/log/proxy.log"
    assert {"postgres: stopped", "mlflow: stopped"} <= set(done.stderr.splitlines())
    assert "no_such_word" in (old.dir / "log/proxy.log").read_text()
    assert [line.split()[1] for line in old("status").stdout.splitlines()] == ["down"] * 3
    wrong.unlink()
    old.start()


def test_an_operators_own_name_and_certificate(old, tmp_path, monkeypatch):
    """Signed by another CA, for a name of its own: MLflow answers to it, and clients come in by that CA."""
    from mlflow import MlflowClient

    name = "localhost"
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-days", "30"]
    words += ["-subj", "/CN=operator", "-addext", f"subjectAltName=DNS:{name}", "-keyout", key, "-out", certificate]
    subprocess.run(words, check=True, capture_output=True)
    old.stop()
    options = ["--certificate", str(certificate), "--key", str(key), "--ca", str(certificate)]
    wrong = old("start", "--name", "other.localhost", *options)
    assert f"{certificate}: is not for other.localhost" in wrong.stderr
    done = old("start", "--name", name, *options)
    assert done.returncode == 0, done.stderr
    env = old.environment()
    assert env["MLFLOW_TRACKING_URI"] == f"https://{name}:{old.ports['port']}"
    for word, value in env.items():
        monkeypatch.setenv(word, value)
    assert MlflowClient(tracking_uri=env["MLFLOW_TRACKING_URI"]).get_run("a" * 32).data.params == {"k": "8"}
