"""Jobs on a real head with token authentication: followed, left, joined, stopped, gone on with; and nothing secret in them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from heads import TOKEN, ray_head
from small import ROOT
from stores import KEYS, PLANTED, bucket

from workflows.errors import UserError
from workflows.jobs.client import NAME, Head
from workflows.jobs.submit import COMMAND, Submission, environment, submit
from workflows.rendering.screen import Screen

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SHORT = ("run", "--smoke", "-s", "distill.k=[1]")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, moto_server):
    """A head whose machine has the keys of a store; its clients know only where that is."""
    scratch = tmp_path_factory.mktemp("cluster")
    own = KEYS | {"AWS_SECRET_ACCESS_KEY": PLANTED, "MMDISTILL_CACHE": str(scratch / "cache")}
    with ray_head(scratch, **own) as head:
        head.environment |= {"AWS_ENDPOINT_URL": moto_server, "AWS_REGION": "us-east-1"}
        yield head


@pytest.fixture
def jobs(cluster, monkeypatch):
    """The head, as this process sees it."""
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, cluster.environment[name])
    return Head(None)


def raw(cluster, path):
    """What the head answers to anybody with the token."""
    from urllib.request import Request, urlopen

    request = Request(f"{cluster.address}{path}", headers={"Authorization": f"Bearer {TOKEN}"})
    with urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def test_a_run_outlives_its_submitter_is_joined_stopped_and_gone_on_with(cluster, jobs, moto_server):
    """And of the keys, the token and the client's password nothing is seen by those who look at the cluster."""
    workspace = bucket(moto_server, "jobs") + "/runs"
    hidden = {"MLFLOW_TRACKING_PASSWORD": "PLANTEDPASSWORD", "AWS_SECRET_ACCESS_KEY": PLANTED + "X"}
    first = cluster.begin("submit", *SHORT, "--workspace", workspace, **hidden)
    name = first.until(r"submitted (run-digits-smoke-\w+)")[1]
    first.until("✓ prepare", 180)
    first.process.send_signal(signal.SIGKILL)
    first.wait()

    joined = cluster.begin("submit", "run", "--workspace", workspace, "--set=distill.k=[1]", "--smoke", **hidden)
    joined.until(f"joined {name}, which is already running")
    joined.until("✓ prepare")
    stopped = cluster.call("jobs", "stop", name)
    assert stopped.returncode == 0, stopped.stderr
    assert f"{name}  stopped after" in stopped.stderr
    assert joined.wait() == 143, joined.err
    assert cluster.call("jobs", "status", name).stdout.split() == ["stopped"]

    again = cluster.call("submit", *SHORT, "--workspace", workspace, **hidden)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"submitted {name}-2" in again.stderr
    assert "✓ prepare  reused" in again.stdout
    assert "✓ report" in again.stdout
    assert [job.id for job in jobs.attempts(name)] == [name, f"{name}-2"]
    assert [job.status for job in jobs.attempts(name)] == ["STOPPED", "SUCCEEDED"]
    assert jobs.newest(name).id == f"{name}-2"
    assert jobs.newest(f"{name}-1").id == name
    listed = cluster.call("jobs", "list")
    assert re.search(rf"{name}-2 +succeeded .* python -m workflows run --set 'distill.k=\[1\]' --smoke", listed.stdout)

    seen = [raw(cluster, "/api/jobs/"), raw(cluster, f"/api/jobs/{name}-2/logs"), listed.stdout, first.out + first.err]
    seen += [joined.out + joined.err, again.stdout + again.stderr, stopped.stdout + stopped.stderr]
    logs = [path.read_bytes() for path in cluster.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    for secret in (PLANTED, "PLANTEDPASSWORD", TOKEN):
        assert not [text for text in seen if secret in text]
        assert not [text for text in logs if secret.encode() in text]
    details = json.loads(raw(cluster, f"/api/jobs/{name}-2"))
    assert details["runtime_env"]["env_vars"]["AWS_ENDPOINT_URL"] == moto_server
    assert not any("KEY" in key or "PASS" in key for key in details["runtime_env"]["env_vars"])


def test_plain_ray_job_submit_runs_a_checkout(cluster, tmp_path):
    """As docs/jobs.md has it, of a checkout in use; and the run joins the cluster that it is on."""
    copy = tmp_path / "checkout"
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True).stdout
    for name in filter(None, (*tracked.split("\0"), ".rayignore")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    for name in (".env", ".git/config", ".venv/x", ".mmdistill/mlflow.db", "data/a.png", "key.pem"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("PLANTEDBESIDE")
    words = "ray job submit --submission-id plain --working-dir . -- python -m workflows run --recipe digits --smoke"
    done = subprocess.run(
        [*words.split(), "--until", "prepare", "--workspace", str(tmp_path / "w")], cwd=copy,
        env=cluster.environment | {"RAY_AUTH_MODE": "token", "PYTHONPATH": ""}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✓ prepare" in done.stdout
    details = [job for job in json.loads(raw(cluster, "/api/jobs/")) if job["submission_id"] == "plain"]
    assert details[0]["driver_info"]["node_ip_address"], "its driver is one of this cluster"
    for path in cluster.folder.rglob("*"):
        assert not path.is_file() or path.is_symlink() or b"PLANTEDBESIDE" not in path.read_bytes(), path


def test_a_name_that_looks_like_another_attempt_is_kept_apart(jobs):
    screen, slow = Screen(), {"entrypoint": "sleep 300", "folder": None, "env": {}}
    jobs.submit("exp-2", **slow, metadata={NAME: "exp-2", COMMAND: "of exp-2"})
    first = Submission("exp", "of exp", "true", {})
    assert submit(jobs, first, screen) == "exp"
    end = time.monotonic() + 120
    while not jobs.job("exp").ended:
        assert time.monotonic() < end
        time.sleep(0.2)
    assert submit(jobs, first, screen) == "exp-3", "exp-2 is another's, though it runs"
    assert [job.id for job in jobs.attempts("exp")] == ["exp", "exp-3"]
    assert jobs.newest("exp-2").id == "exp-2"
    with pytest.raises(UserError, match="--id exp-2: another command is running under this name: sleep 300"):
        submit(jobs, Submission("exp-2", "of exp", "true", {}), screen)
    assert jobs.stop("exp-2")


TICKS = "import time\nfor n in range(14):\n    print('tick', n, flush=True)\n    time.sleep(0.5)"


class Tunnel:
    """Between a client and the head: `cut` ends all connections, and takes no more until `mend`."""

    def __init__(self, port):
        self._port, self._open, self._pairs = port, True, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self._open:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._port))
            self._pairs += [client, server]
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(one, other):
        try:
            while data := one.recv(65536):
                other.sendall(data)
        except OSError:
            pass
        finally:
            for end in (one, other):
                end.close()

    def cut(self):
        self._open = False
        for end in self._pairs:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._pairs.clear()

    def mend(self):
        self._open = True

    def close(self):
        self.cut()
        self._listener.close()


def test_a_log_is_followed_over_a_connection_that_drops(jobs):
    jobs.submit("ticks", entrypoint=f'{sys.executable} -c "{TICKS}"', folder=None, env={}, metadata={})
    tunnel = Tunnel(int(jobs.address.rpartition(":")[2]))
    shown, said = [], []

    def show(text):
        shown.append(text)
        if "tick 3" in text:
            tunnel.cut()

    def say(text):
        said.append(text)
        if text.endswith("trying again"):
            tunnel.mend()

    try:
        job = Head(tunnel.address).follow("ticks", show, say)
    finally:
        tunnel.close()
    assert re.findall(r"tick (\d+)", "".join(shown)) == [str(n) for n in range(14)], "each line once, in order"
    assert job.status == "SUCCEEDED"
    assert [text.endswith("trying again") for text in said] == [True, False]


SAVES = "import signal, sys, time\ndef save(*_):\n    time.sleep(4)\n    print('saved', flush=True)\n    sys.exit(0)\n"
SAVES += "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(120)"


def test_a_stop_waits_for_the_checkpoint(cluster, jobs, tmp_path):
    """Ray's own would kill it after 3 seconds."""
    (tmp_path / "saves.py").write_text(SAVES)
    command = f"{sys.executable} {tmp_path}/saves.py"
    jobs.submit("saves", entrypoint=command, folder=None, env=environment([]), metadata={})
    end = time.monotonic() + 60
    while "ready" not in jobs.log("saves"):
        assert time.monotonic() < end
        time.sleep(0.2)
    done = cluster.call("jobs", "stop", "saves")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["saved"], "what it said while it ended"
    assert "saves  stopped after" in done.stderr
    again = cluster.call("jobs", "stop", "saves")
    assert (again.returncode, again.stdout) == (0, "")


def test_ctrl_c_lets_go_of_the_job(cluster, jobs):
    jobs.submit("long", entrypoint="sleep 60", folder=None, env={}, metadata={})
    client = cluster.begin("jobs", "logs", "long", "--follow")
    client.until("Running entrypoint")
    client.process.send_signal(signal.SIGINT)
    assert client.wait(30) == 130
    assert "detached: long keeps running" in client.err
    assert "mmdistill jobs stop long --address" in client.err
    assert jobs.job("long").status == "RUNNING"
    jobs.stop("long")


def test_two_who_submit_at_once_have_one_job(cluster, jobs, tmp_path):
    words = ("submit", *SHORT, "--until", "prepare", "--workspace", str(tmp_path / "w"), "--no-follow")
    both = [cluster.begin(*words) for _ in range(2)]
    assert [client.wait(60) for client in both] == [0, 0], both[0].err + both[1].err
    assert both[0].out == both[1].out
    assert len(jobs.attempts(both[0].out.strip())) == 1
    assert sorted("submitted" in client.err for client in both) == [False, True]
    jobs.stop(both[0].out.strip())


def test_more_workers_than_there_are_end_the_job_in_a_line(cluster, tmp_path):
    done = cluster.call("submit", *SHORT, "--workers", "8", "--workspace", str(tmp_path / "w"))
    assert done.returncode == 1, done.stdout
    assert re.search(r"error: .*workers.*8 .*2", done.stdout)
    assert "Traceback" not in done.stdout + done.stderr
    assert "failed after" in done.stderr
    assert ", exit 1" in done.stderr


def test_a_head_without_the_packages_ends_in_a_line(cluster, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    path = f"{tmp_path}/bare/bin:{os.environ['PATH']}"
    words = ("submit", *SHORT, "--workspace", str(tmp_path / "w"), "--env", "PATH")
    done = cluster.call(*words, PATH=path)
    assert done.returncode == 1
    assert re.search(r"error: job run-\S+: the head's Python has no package \w+\n +run the pinned image", done.stderr)


def test_a_wrong_token_and_none_are_a_line(cluster, tmp_path):
    (tmp_path / "wrong").write_text("fedcba9876543210" * 2)
    cases = {
        f"refuses the token of {tmp_path}/wrong": {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")},
        "wants Ray's token, and there is none in RAY_AUTH_MODE=disabled": {"RAY_AUTH_MODE": "disabled"},
    }
    for said, more in cases.items():
        began = time.monotonic()
        done = cluster.call("submit", *SHORT, "--workspace", "/shared/w", **more)
        assert done.returncode == 1
        assert f"error: head: {cluster.address} {said}\n       set RAY_AUTH_TOKEN_PATH" in done.stderr
        assert "fedcba" not in done.stdout + done.stderr
        assert time.monotonic() - began < 30


def test_a_job_that_is_not_there(jobs):
    with pytest.raises(UserError, match="knows no such job"):
        jobs.newest("never")
    with pytest.raises(UserError, match="Job never does not exist"):
        jobs.follow("never", print, print)
    assert not jobs.needs_no_token()
