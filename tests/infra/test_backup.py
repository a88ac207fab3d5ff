"""A backup of a running server, restored into a server that never saw the first."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from services import Server, command, free_ports
from stores import forget_clients, use

from workflows.storage import s3

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]  # a fixture starts a whole stack
WORDS = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
)


def contents(env, monkeypatch):
    """All that a client sees: runs with parameters, tags and the whole history of each metric; models, versions, aliases."""
    from mlflow import MlflowClient

    for name in WORDS:
        monkeypatch.setenv(name, env[name])
    client = MlflowClient(tracking_uri=env["MLFLOW_TRACKING_URI"], registry_uri=env["MLFLOW_TRACKING_URI"])
    runs = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            history = {
                key: [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run.info.run_id, key)]
                for key in run.data.metrics
            }
            runs[run.info.run_id] = (experiment.name, run.info.status, run.data.params, run.data.tags, history)
    models = {m.name: dict(m.aliases) for m in client.search_registered_models()}
    versions = {(v.name, v.version): (v.run_id, v.source, dict(v.tags)) for v in client.search_model_versions()}
    return runs, models, versions


@pytest.fixture(scope="module")
def written(stack, tmp_path_factory):
    """(backup, the run, its artifact's bytes): something of each kind was logged to the shared stack before."""
    from mlflow import MlflowClient
    from mlflow.server.auth.client import AuthServiceClient

    data = os.urandom(6_000_000)
    before = {name: os.environ.get(name) for name in WORDS}
    os.environ.update({name: stack[name] for name in WORDS})
    try:
        client = MlflowClient(tracking_uri=stack["MLFLOW_TRACKING_URI"], registry_uri=stack["MLFLOW_TRACKING_URI"])
        run = client.create_run(
            client.create_experiment(f"backup-{os.urandom(4).hex()}"), tags={"stage": "distill"}
        ).info
        client.log_param(run.run_id, "k", 8)
        for step in range(20):
            client.log_metric(run.run_id, "loss", 1 / (step + 1), step=step)
        folder = tmp_path_factory.mktemp("weights")
        (folder / "weights").write_bytes(data)
        client.log_artifact(run.run_id, str(folder / "weights"), "a folder")
        client.set_terminated(run.run_id)
        name = f"student-{os.urandom(4).hex()}"
        client.create_registered_model(name)
        for _ in range(2):
            version = client.create_model_version(name, run.artifact_uri, run.run_id, tags={"k": "8"})
        client.set_registered_model_alias(name, "champion", version.version)
        user = f"ada-{os.urandom(4).hex()}"
        AuthServiceClient(stack["MLFLOW_TRACKING_URI"]).create_user(user, "ada's own password")
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return run.run_id, data, user


@pytest.fixture(scope="module")
def backup(server, written, tmp_path_factory):
    out = tmp_path_factory.mktemp("backups") / "tonight"
    done = command("mlflow/backup.sh", server.dir, out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"backup: {out}, ")
    return out


@pytest.fixture(scope="module")
def fresh():
    one = Server("stack.sh", "--s3-store", "memory", "--s3-tls-port", str(free_ports(1)[0]))
    try:
        one.start()
        yield one
    finally:
        one.remove()


def test_a_fresh_server_has_everything_afterwards(stack, written, backup, fresh, monkeypatch, tmp_path):
    import mlflow
    from mlflow.server.auth.client import AuthServiceClient

    run, data, user = written
    env = fresh.environment()
    done = command("mlflow/restore.sh", fresh.dir, backup)
    assert done.returncode == 0, done.stderr
    assert fresh.environment() == env, "the administrator's password stays this server's"
    before = contents(stack, monkeypatch)
    assert run in before[0]
    assert contents(env, monkeypatch) == before
    uri = env["MLFLOW_TRACKING_URI"]
    back = mlflow.artifacts.download_artifacts(
        f"runs:/{run}/a folder/weights", dst_path=str(tmp_path), tracking_uri=uri
    )
    with open(back, "rb") as file:
        assert file.read() == data
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "ada's own password")
    assert AuthServiceClient(env["MLFLOW_TRACKING_URI"]).get_user(user).username == user

    again = command("mlflow/restore.sh", fresh.dir, backup)
    assert again.returncode == 1
    assert "--replace puts the backup in their place" in again.stderr
    assert len(again.stderr.splitlines()) == 1


def test_the_s3_store_through_the_proxy(fresh, tmp_path):
    """For workers on other machines: TLS verified by the same CA, in boto3 and s3fs, uploads in parts included."""
    import boto3
    import s3fs
    from botocore.config import Config
    from botocore.exceptions import SSLError

    env = fresh.environment()
    assert env["AWS_ENDPOINT_URL"].startswith("https://127.0.0.1:")
    words = {
        "endpoint_url": env["AWS_ENDPOINT_URL"],
        "aws_access_key_id": env["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": env["AWS_SECRET_ACCESS_KEY"],
        "region_name": env["AWS_REGION"],
    }
    config = Config(request_checksum_calculation=env["AWS_REQUEST_CHECKSUM_CALCULATION"])
    client = boto3.client("s3", verify=env["AWS_CA_BUNDLE"], config=config, **words)
    data = os.urandom(20_000_000)
    (tmp_path / "shard").write_bytes(data)
    client.upload_file(str(tmp_path / "shard"), "mmdistill", "data/shard")
    assert client.get_object(Bucket="mmdistill", Key="data/shard")["Body"].read() == data
    fs = s3fs.S3FileSystem(
        key=env["AWS_ACCESS_KEY_ID"],
        secret=env["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=env["AWS_ENDPOINT_URL"],
        client_kwargs={"verify": env["AWS_CA_BUNDLE"], "region_name": env["AWS_REGION"]},
        skip_instance_cache=True,
    )
    assert fs.cat("mmdistill/data/shard") == data
    with pytest.raises(SSLError):
        boto3.client("s3", verify=True, **words).list_buckets()


def test_storage_trusts_the_ca_that_is_named_and_no_other(fresh, tmp_path, monkeypatch):
    from workflows.errors import UserError
    from workflows.storage import store as storage

    env = fresh.environment()
    use(
        monkeypatch, **{"endpoint" if name == "AWS_ENDPOINT_URL" else name: env[name] for name in env if "AWS_" in name}
    )
    place = "s3://mmdistill/trusted"
    storage.check(place)
    storage.write(f"{place}/a", b"hello")
    (tmp_path / "large").write_bytes(data := os.urandom(s3.PART * 2 + 1))
    storage.upload(tmp_path / "large", f"{place}/large")
    storage.download(f"{place}/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert storage.put_if(f"{place}/held", b"1", None)
    assert storage.put_if(f"{place}/held", b"2", None) is None
    monkeypatch.delenv("AWS_CA_BUNDLE")
    forget_clients()
    for use_it in (
        lambda: storage.check(place),
        lambda: storage.read(f"{place}/a"),
        lambda: storage.read_tagged(f"{place}/held"),
    ):
        with pytest.raises(UserError, match="certificate is not trusted") as caught:
            use_it()
        assert "--s3-ca" in caught.value.hint


def test_replacing_keeps_what_was_there(backup, written, fresh, monkeypatch):
    from mlflow import MlflowClient

    env = fresh.environment()
    for name in WORDS:
        monkeypatch.setenv(name, env[name])
    client = MlflowClient(tracking_uri=env["MLFLOW_TRACKING_URI"])
    later = client.create_run(client.create_experiment(f"later-{os.urandom(4).hex()}")).info.run_id
    done = command("mlflow/restore.sh", fresh.dir, backup, "--replace")
    assert done.returncode == 0, done.stderr
    runs = contents(env, monkeypatch)[0]
    assert written[0] in runs
    assert later not in runs
    (kept,) = (fresh.dir / "backups").glob("before-restore-*")
    listing = subprocess.run(
        ["pg_restore", "--data-only", "-t", "runs", "-f", "-", kept / "mlflow.dump"], capture_output=True
    )
    assert later.encode() in listing.stdout


@pytest.mark.parametrize("damage", ["mlflow.dump", "objects.jsonl", "an object", "no object"])
def test_a_damaged_backup_changes_nothing(backup, fresh, monkeypatch, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(backup, copy)
    target = next(iter((copy / "objects").iterdir())) if "object" in damage.split() else copy / damage
    if damage == "no object":
        target.unlink()
    else:
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 1
        target.write_bytes(data)
    env = fresh.environment()
    before = contents(env, monkeypatch)
    done = command("mlflow/restore.sh", fresh.dir, copy, "--replace")
    assert done.returncode == 1
    assert "is damaged" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert contents(env, monkeypatch) == before


def test_a_listing_names_every_object(server, written, backup, tmp_path):
    done = command("mlflow/backup.sh", server.dir, tmp_path / "list", "--listing")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "list/objects").exists()
    assert (tmp_path / "list/objects.jsonl").read_text() == (backup / "objects.jsonl").read_text()


def test_a_backup_is_there_whole_or_not_at_all(server, backup, tmp_path):
    """The store can't be read: no folder is left; nor is one that is there overwritten."""
    said = command("mlflow/backup.sh", server.dir, backup)
    assert (said.returncode, said.stderr) == (1, f"backup.sh: {backup}: is there already; name another folder\n")
    environment = server.dir / "secrets/mlflow.env"
    text = environment.read_text()
    try:
        environment.write_text(text.replace(str(server.ports["s3-port"]), "1"))
        done = command("mlflow/backup.sh", server.dir, tmp_path / "out")
    finally:
        environment.write_text(text)
    assert done.returncode == 1
    assert "the artifacts could not be read" in done.stderr
    assert list(tmp_path.iterdir()) == []
