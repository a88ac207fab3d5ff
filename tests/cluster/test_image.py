"""infra/docker/: what can be seen of the image without an engine to build it."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from fnmatch import fnmatch

import pytest
from services import ROOT

tomllib = pytest.importorskip("tomllib", reason="Python 3.11, as the image has")
FOLDER = ROOT / "infra/docker"
TEXT = (FOLDER / "Dockerfile").read_text()
LINES = [line for line in TEXT.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
STEPS = [line.split(maxsplit=1) for line in LINES]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def of(kind):
    return [words for step, words in STEPS if step == kind]


def constraints():
    """Name -> the lines that pin it."""
    out: dict[str, list[str]] = {}
    for line in (ROOT / "infra/constraints.txt").read_text().splitlines():
        if found := re.match(r"([A-Za-z0-9._-]+)==", line):
            out.setdefault(found[1].lower().replace("_", "-"), []).append(line)
    return out


def test_it_installs_what_pyproject_needs(tmp_path):
    """By the image's own line: the dependencies, the text encoders, and what `ray up` needs on a head at Google."""
    (line,) = [words for words in of("RUN") if "tomllib" in words]
    script = shlex.split(line.split(" > ")[0])
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    done = subprocess.run([sys.executable, *script[1:]], cwd=tmp_path, capture_output=True, text=True, check=True)
    extras = PROJECT["optional-dependencies"]
    assert done.stdout.splitlines() == PROJECT["dependencies"] + extras["text"] + extras["gcp"]


def test_everything_is_pinned():
    pinned = constraints()
    extras = PROJECT["optional-dependencies"]
    for requirement in PROJECT["dependencies"] + extras["text"] + extras["gcp"]:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower()
        assert name in pinned, f"{name} is not in infra/constraints.txt"
    assert pinned["torch"] == ["torch==2.13.0"], "without a build: an index decides between CPU and CUDA"
    installs = [words for words in of("RUN") if "pip install" in words]
    assert len(installs) == 3
    for words in installs:
        assert "--no-cache-dir" in words
        assert "--constraint constraints.txt" in words or "--no-deps" in words
    (base,) = of("FROM")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm", base)


def test_no_secret_and_nobody_is_root():
    assert of("USER")[-1] == "1000:1000", "as `ubuntu` on the machines, whose token file has mode 600"
    useradd = [words for words in of("RUN") if "useradd" in words]
    assert "--uid 1000" in useradd[0]
    assert not of("ADD"), "nothing is fetched but by pip and apt"
    assert "curl" not in TEXT
    named = " ".join(of("ENV") + of("ARG"))
    assert not re.search("PASSWORD|SECRET|ACCESS_KEY|AUTH_TOKEN", named)
    environment = dict(word.split("=", 1) for words in of("ENV") for word in shlex.split(words))
    assert environment["RAY_AUTH_MODE"] == "token", "no node starts without a token"
    assert environment["HOME"] == "/home/mmdistill", "Ray's launcher looks for it in the image's environment"


def test_the_launchers_programs_are_in_it():
    """`ray up` brings files into a container by rsync; the head's container reaches the workers by ssh."""
    (apt,) = [words for words in of("RUN") if "apt-get install" in words]
    assert {"openssh-client", "rsync"} <= set(apt.split())
    assert "rm -rf /var/lib/apt/lists/*" in apt


def test_what_is_copied_is_there_and_not_ignored():
    rules = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {source for words in of("COPY") for source in words.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    for pattern in packages:
        assert any(fnmatch(source, pattern) for source in copied), f"{pattern} is not in the image"
    assert not any(re.search("secret|token|key|.env$", source) for source in copied)


def test_what_changes_often_comes_last():
    words = ["apt-get install", "${TORCH}", "--requirement requirements.txt", "COPY workflows", "--no-deps"]
    text = "\n".join(LINES)
    places = [text.index(word) for word in words]
    assert places == sorted(places)


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """A program of that name that writes down what it is told."""
    program = tmp_path / "docker"
    program.write_text(f'#!/bin/bash\nprintf "%s|" "$@" >>{tmp_path}/told\necho >>{tmp_path}/told\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "told"


def build(*words, **more):
    return subprocess.run([str(FOLDER / "build.sh"), *words], capture_output=True, text=True, env=os.environ | more)


def test_build_makes_the_names_that_clusters_have(docker):
    version = PROJECT["version"]
    done = build("--push", "registry.example", TORCH_CPU="https://index.example/cpu")
    assert done.returncode == 0, done.stderr
    told = docker.read_text()
    for name in (f"mmdistill:{version}-gpu", f"mmdistill:{version}-cpu", "mmdistill-mlflow:3.17.2"):
        assert f"--tag|{name}|" in told
        assert f"push|registry.example/{name}|" in told
    assert "--build-arg|TORCH=torch --index-url https://index.example/cpu|" in told
    assert told.count("--build-arg") == 1
    variables = (ROOT / "infra/terraform/variables.tf").read_text()
    assert re.search(r'variable "mlflow_image" {[^}]*default\s+= "3.17.2"', variables)


def test_build_refuses_what_it_does_not_know(docker):
    done = build("gpus")
    assert (done.returncode, done.stderr) == (1, "build.sh: gpus: gpu, cpu or mlflow\n")
    assert not docker.exists()
