"""submit, but for the cluster: what is checked here, what a job is sent and told, and what it is called."""

import shutil
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from small import ROOT
from stores import PLANTED, free_port

from workflows.cli.main import main
from workflows.config.loading import load_config
from workflows.errors import ConfigError, UserError
from workflows.jobs import client as module
from workflows.jobs import submit as stage
from workflows.jobs.client import STOP_WAIT, Head, Job, address_of, attempt_of, token
from workflows.jobs.package import PACKAGES, source_files, working_directory
from workflows.jobs.submit import Parameter, compose, environment, explain_failure

PLACE = ("--workspace", "s3://bucket/runs")


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch, tmp_path):
    """No head, and no token, but those of the test."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MMDISTILL_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def called(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


BAD = [
    (("walk",), 2, "'walk' is not a stage for a cluster; there are: run, prepare, sweep, ablate, bench"),
    (("run", *PLACE, "--recpie", "digits"), 2, "No such option"),
    (("run", *PLACE, "-s", "distill.lrr=3"), 2, "distill.lrr: no such option"),
    (("run", *PLACE, "--recipe", "digit"), 2, "there are: cifar10, digits"),
    (("run", *PLACE, "--workers", "300"), 2, "need teacher.batch of at least 300"),
    (("run", *PLACE, "--force", "taecher"), 2, "'taecher' is not a stage"),
    (("sweep", *PLACE, "--space", "pairng=grid"), 2, "pairng"),
    (("prepare", "s3://a/b", "s3://c/d"), 2, "--size"),
    (("run",), 2, "--workspace: .mmdistill is a place on this machine"),
    (
        ("run", "--workspace", "s3://a/runs[v2]"),
        2,
        "workspace: s3://a/runs[v2]: a prefix in an object store can't have [ ]",
    ),
    (
        ("prepare", "s3://a/b", "s3://c/d?e", "--size", "8"),
        2,
        "DEST: s3://c/d?e: a prefix in an object store can't have ?",
    ),
    (("run", "--workspace", "runs"), 2, "--workspace: runs is a place on this machine; for a cluster give s3://"),
    (("ablate", *PLACE), 2, "--page: ablation.md is a place on this machine; for a cluster give an absolute path"),
    (("sweep", *PLACE, "--out", "s3://a/rows.json"), 2, "--out: s3:/a/rows.json is a place on this machine"),
    (("prepare", "images", "s3://c/d", "--size", "8"), 2, "SOURCE: images is a place on this machine"),
    (
        ("run", *PLACE, "-s", "data={source: folder, path: here, image_size: 8, num_classes: 2}"),
        2,
        "data.path: here is a place on",
    ),
    (("run", *PLACE, "--env", "AWS_SECRET_ACCESS_KEY"), 2, "AWS_SECRET_ACCESS_KEY: it looks like a secret"),
    (("run", *PLACE, "--env", "NAME=value"), 2, "takes the name of a variable"),
    (("run", *PLACE, "--env", "NOT_SET_ANYWHERE"), 2, "it is not set here"),
    (("run", *PLACE, "--tracking-uri", "https://me:hidden@host"), 2, "there is a password in an address"),
    (
        ("run", *PLACE, "--tracking-uri", "sqlite:///mlflow.db"),
        2,
        "is a file on this machine; for a cluster give a server",
    ),
    (("run", *PLACE, "--id", "a/b"), 2, "--id: 'a/b' should be of letters"),
    (("run", *PLACE), 1, "--address: no head is named"),
    (("run", *PLACE, "--address", "ray://head:10001"), 1, "should read http://HEAD:8265"),
    (("run", *PLACE, "--address", "http://127.0.0.1:9"), 1, "nothing answers at http://127.0.0.1:9"),
]


@pytest.mark.parametrize(("words", "code", "said"), BAD, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_mistakes_are_told_here_in_a_line(capsys, words, code, said):
    got, out, err = called(capsys, "submit", *words)
    assert said in " ".join(err.split()), err
    assert got == code
    assert "Traceback" not in err
    assert "hidden" not in out + err


WHOLE = {
    "run": ("--smoke", *PLACE),
    "prepare": ("s3://a/b", "/shared/set", "--size", "8"),
    "sweep": ("-k", "8", "--space", "seed=0,1", *PLACE),
    "ablate": ("gmm", "--page", "/shared/page.md", *PLACE),
    "bench": ("ray",),
}


@pytest.mark.parametrize("name", stage.STAGES)
def test_a_stage_comes_to_its_check_and_no_further(capsys, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    began = []
    monkeypatch.setattr("workflows.cluster.session.ray_session", lambda *_, **__: began.append("Ray"))
    monkeypatch.setattr("workflows.storage.workspace.Workspace.__init__", lambda *_, **__: began.append("workspace"))
    code, out, err = called(capsys, "submit", name, *WHOLE[name], "--address", f"http://127.0.0.1:{free_port()}")
    assert (code, out, began) == (1, "", [])
    assert "nothing answers at" in err
    assert list(tmp_path.iterdir()) == []


def submitted(monkeypatch, capsys, *words):
    """The Submission that a command line makes."""
    made = []
    monkeypatch.setattr(module, "Head", lambda address: address)
    monkeypatch.setattr(stage, "submit", lambda head, job, screen: made.append(job) or job.name)
    monkeypatch.setattr("workflows.jobs.watch.commands", lambda *_: "")
    main_words = ["submit", *words, "--no-follow"]
    with pytest.raises(SystemExit) as caught:
        main(main_words)
    captured = capsys.readouterr()
    assert caught.value.code in (0, None), captured.err
    assert captured.out.split() == [made[0].name]
    return made[0]


def test_the_same_command_and_configuration_are_the_same_job(monkeypatch, capsys):
    def name(*words):
        return submitted(monkeypatch, capsys, *words).name

    one = name("run", "--recipe", "digits", "-s", "seed=1", "-s", "distill.k=[1,2]", *PLACE)
    assert one.startswith("run-digits-")
    assert name("run", *PLACE, "--set", "distill.k=[1, 2]", "--json", "--set=seed=1", "--address", "x") == one
    monkeypatch.setenv("MMDISTILL_HOME", PLACE[1])
    assert name("run", "-s", "seed=1", "-s", "distill.k=[1,2]") == one
    others = [
        name("run", "-s", "seed=2", "-s", "distill.k=[1,2]", *PLACE),
        name("run", "-s", "seed=1", "-s", "distill.k=[1,2]", "--workspace", "s3://bucket/others"),
        name("run", "-s", "seed=1", "-s", "distill.k=[1,2]", "--until", "teacher", *PLACE),
        name("sweep", "-s", "seed=1", "-s", "distill.k=[1,2]", *PLACE),
    ]
    assert len({one, *others}) == 5
    assert name("run", *PLACE, "--id", "mine") == "mine"


def test_the_command_is_what_was_given(monkeypatch, capsys):
    monkeypatch.setenv("MMDISTILL_HOME", "/shared/runs")
    job = submitted(monkeypatch, capsys, "run", "-r", "digits", "--no-gpu", "-s", "distill.k=[1, 2]", "--address", "x")
    assert job.entrypoint == (
        "python -m workflows run --recipe digits --set 'distill.k=[1, 2]' --workspace /shared/runs --no-gpu"
    )
    job = submitted(monkeypatch, capsys, "prepare", "s3://a/b", "--flip", "/shared/set", "--size", "8")
    assert job.entrypoint == "python -m workflows prepare --size 8 --flip s3://a/b /shared/set"
    job = submitted(monkeypatch, capsys, "ablate", "gmm", "digits", "--page", "/p.md", "-k", "1", "-k", "2", *PLACE)
    assert job.entrypoint.endswith(" -k 1 -k 2 --workspace s3://bucket/runs gmm digits")


def test_small_files_are_sent_along(monkeypatch, capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: digits\nseed: 5\n")
    job = submitted(monkeypatch, capsys, "run", "--recipe", str(recipe), *PLACE)
    (name,) = job.files
    assert f"--recipe {name}" in job.entrypoint
    with working_directory(job.files) as folder:
        assert load_config(str(folder / name)).seed == 5
        assert (folder / "workflows/cli/main.py").is_file()
    assert job.name.startswith("run-mine-")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(recipe, elsewhere)
    assert submitted(monkeypatch, capsys, "run", "-r", str(elsewhere / "mine.yaml"), *PLACE).name == job.name
    recipe.write_text("extends: digits\nseed: 6\n")
    assert submitted(monkeypatch, capsys, "run", "-r", str(recipe), *PLACE).name != job.name
    labels = tmp_path / "labels.json"
    names = []
    for text in ("{}", '{"a": 1}'):
        labels.write_text(text)
        job = compose("prepare", [Parameter("labels", "--labels", (str(labels),), ("--labels", str(labels)))], None)
        names.append(job.name)
    assert len(set(names)) == 2, "what a file holds is part of the job"
    labels.write_text(" " * 2**21)
    with pytest.raises(ConfigError, match=r"labels.json: 2.0 MiB is too large to send along"):
        compose("prepare", [Parameter("labels", "--labels", (str(labels),), ("--labels", str(labels)))], None)


def test_a_recipe_is_sent_with_those_that_it_extends(monkeypatch, capsys, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "base.yaml").write_text("extends: digits\nseed: 5\ndistill: {images: 19200}\n")
    (tmp_path / "own/mine.yaml").write_text("extends: ../base.yaml\ndistill: {overrides: {4: {eta: 0.5}}}\n")
    monkeypatch.chdir(tmp_path / "own")
    job = submitted(monkeypatch, capsys, "run", "--recipe", "mine.yaml", *PLACE)
    (name,) = job.files
    here = load_config("mine.yaml")
    (tmp_path / "base.yaml").unlink()
    with working_directory(job.files) as folder:
        there = load_config(str(folder / name))
    assert (there.seed, there.distill.for_k(4).images, there.distill.for_k(4).eta) == (5, 19_200, 0.5)
    assert there == here


def test_what_this_machine_does_not_see_may_be_there_on_the_cluster(monkeypatch, capsys):
    words = ("run", "-s", "data.source=dataset:///shared/never-here", *PLACE)
    job = submitted(monkeypatch, capsys, *words)
    assert job.name.startswith("run-")
    with pytest.raises(SystemExit):
        main(["submit", *words, "--no-follow"])
    assert "not checked here: /shared/never-here: no data set" in capsys.readouterr().err


def test_the_environment_has_what_is_named_and_no_secret(monkeypatch):
    told = {"AWS_ENDPOINT_URL": "http://store:9000", "AWS_REGION": "eu-west-1"}
    kept = {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": PLANTED, "MMDISTILL_CACHE": "/home/me", "MINE": "1"}
    for name, value in (told | kept).items():
        monkeypatch.setenv(name, value)
    found = environment([])
    assert told.items() <= found.items()
    assert not set(kept) & set(found)
    assert found[STOP_WAIT] == "120"
    assert environment(["MINE"])["MINE"] == "1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{PLANTED}@host")
    with pytest.raises(ConfigError, match="there is a password in it") as caught:
        environment(["MLFLOW_TRACKING_URI"])
    assert PLANTED not in str(caught.value)


SECRETS = [
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "HF_TOKEN",
]
SECRETS += ["WANDB_API_KEY", "RAY_AUTH_TOKEN", "DB_PASS", "MY_SECRETS", "APITOKEN", "MLFLOW_FLASK_SERVER_SECRET_KEY"]


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_refused_by_name(monkeypatch, name):
    monkeypatch.setenv(name, PLANTED)
    with pytest.raises(ConfigError, match=f"--env {name}: it looks like a secret"):
        environment([name])


def test_harmless_names_are_not(monkeypatch):
    for name in ("TOKENIZERS_PARALLELISM", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "PASSAGE", "KEYBOARD"):
        monkeypatch.setenv(name, "x")
        assert environment([name])[name] == "x"


@pytest.fixture
def planted(tmp_path):
    """A copy of this checkout, in use: with data, a workspace, an environment and secrets in it."""
    copy = tmp_path / "checkout"
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True).stdout
    for name in (*filter(None, tracked.split("\0")), ".rayignore"):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    for name in (
        ".env", ".git/config", ".venv/lib/x.py", ".mmdistill/mlflow.db", "data/images/a.png", "key.pem", "id_rsa",
        "infra/mlflow/.env", "infra/mlflow/secrets/admin", "auth_token", "workflows/.env", "workflows/token.yaml",
        "workflows/config/recipes/secrets.yaml", "mmdistill_core/weights.safetensors", "workflows/__pycache__/x.pyc", ".ray/x",
        "shards.parquet", "credentials.json",
    ):  # fmt: skip
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(PLANTED)
    (copy / "workflows/config/recipes/mine.yaml").write_text("extends: digits\n")
    return copy


def test_the_source_is_sent_and_nothing_that_lies_beside_it(planted):
    names = source_files(planted)
    assert not [name for name in names if PLANTED in (planted / name).read_text()]
    assert {
        "workflows/cli/main.py",
        "workflows/config/recipes/mine.yaml",
        "workflows/rendering/templates/report.html",
        "pyproject.toml",
    } <= {*names}
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", *PACKAGES], capture_output=True, text=True)
    assert {name for name in tracked.stdout.split() if (ROOT / name).is_file()} <= {*source_files(ROOT)}
    assert sum((planted / name).stat().st_size for name in names) < 2e6


def test_plain_ray_job_submit_sends_no_more_than_it_needs(planted, tmp_path):
    """As Ray packs `--working-dir .`: by .gitignore and .rayignore."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    target = tmp_path / "package.zip"
    create_package(str(planted), target, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(target) as package:
        names = set(package.namelist())
        assert not [name for name in names if PLANTED.encode() in package.read(name)]
    assert {"workflows/cli/main.py", "mmdistill_core/artifact.py", "workflows/config/recipes/digits.yaml"} <= names
    assert not [name for name in names if name.startswith(("docs/", "tests/", "infra/", "."))]
    assert target.stat().st_size < 2e6


@pytest.mark.parametrize(
    ("given", "environment", "address"),
    [
        ("http://head:8265/", {"RAY_API_SERVER_ADDRESS": "http://other:1"}, "http://head:8265"),
        ("head:8265", {}, "http://head:8265"),
        (None, {"RAY_API_SERVER_ADDRESS": "https://head", "RAY_ADDRESS": "http://other:1"}, "https://head"),
        (None, {"RAY_ADDRESS": "http://head:8265"}, "http://head:8265"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, None),
        ("http://me:hidden@head:8265", {}, None),
        ("ftp://head", {}, None),
    ],
)
def test_the_head_is_the_one_that_is_named(monkeypatch, given, environment, address):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if address:
        assert address_of(given) == address
    else:
        with pytest.raises(UserError, match="--address") as caught:
            address_of(given)
        assert "hidden" not in str(caught.value)


def test_the_token_is_found_where_ray_looks(monkeypatch, tmp_path):
    assert token()[0] is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("of home\n")
    assert token() == ("of home", str(tmp_path / ".ray/auth_token"))
    (tmp_path / "file").write_text(" of file ")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert token() == ("of file", str(tmp_path / "file"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the environment")
    assert token() == ("of the environment", "RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert token()[0] is None
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH: there is no file"):
        token()


@contextmanager
def server(status, body):
    """The address of one that answers all the same."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    there = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=there.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{there.server_address[1]}"
    finally:
        there.shutdown()
        there.server_close()


@pytest.mark.parametrize(("status", "body"), [(200, "[]"), (200, "<html>"), (404, ""), (400, "")])
def test_another_server_is_told_from_a_dashboard(status, body):
    with server(status, body) as address, pytest.raises(UserError, match="is not Ray's dashboard"):
        Head(address)


def test_a_head_that_asks_for_no_token_is_known(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another cluster")
    with server(200, '{"version": "4", "ray_version": "2.60.0"}') as address:
        assert Head(address).needs_no_token()


def job(**values):
    known = {"id": "j", "status": "FAILED", "entrypoint": "", "message": "", "exit_code": 1, "began": 1.0, "over": 2.0}
    return Job(**(known | values))


def test_attempts_are_counted():
    ids = (
        "run-digits-1f",
        "run-digits-1f-2",
        "run-digits-1f-12",
        "run-digits-1f-0",
        "run-digits-1fa",
        "run-digits-1f-2-2",
    )
    assert [attempt_of(i, "run-digits-1f") for i in ids] == [1, 2, 12, 0, 0, 0]


@pytest.mark.parametrize(
    ("values", "log", "said"),
    [
        ({}, "ModuleNotFoundError: No module named 'torch'", "has no package torch"),
        (
            {},
            "x\nModuleNotFoundError: No module named 'mlflow.tracking'; 'mlflow' is not a package\n",
            "has no package mlflow",
        ),
        ({}, "/usr/bin/python: No module named workflows", "has no package workflows"),
        ({"exit_code": 127}, "/bin/sh: 1: python: not found", "has no `python`"),
        ({"exit_code": None, "message": "runtime_env setup failed: x\ny"}, "", "runtime_env setup failed: x"),
        ({}, "error: distill: something of its own", None),
    ],
)
def test_a_head_without_what_it_needs_is_told_in_a_line(values, log, said):
    found = explain_failure(job(**values), log)
    assert (str(found) if found else None) == said or said in str(found)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"status": "SUCCEEDED", "exit_code": 0}, 0),
        ({"exit_code": 2}, 2),
        ({"exit_code": -9}, 137),
        ({"exit_code": None}, 1),
        ({"status": "STOPPED", "exit_code": None}, 143),
    ],
)
def test_exit_codes_are_the_jobs(values, code):
    assert job(**values).code == code


def test_the_commit_is_told_to_a_job(monkeypatch, tmp_path):
    """Its folder is no checkout."""
    for name in source_files(ROOT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    script = "from workflows.storage.code import git_commit; print(git_commit())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "MMDISTILL_COMMIT": "abc+"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == ["abc+"], done.stderr
