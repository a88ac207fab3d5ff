"""The command line: fast to answer, clear about mistakes, two names for one program."""

import os
import subprocess
import sys

import pytest

from workflows.cli.main import main


def run(*arguments):
    """(exit code, stdout, stderr) of a process of its own."""
    done = subprocess.run([sys.executable, "-m", "workflows", *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def inside(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def test_help_names_every_command():
    code, out, _ = run("--help")
    assert code == 0
    for command in ("run", "sweep", "sample", "doctor", "bench", "config", "recipes", "ui", "submit", "jobs"):
        assert command in out


def test_help_loads_nothing_heavy():
    probe = (
        "import sys\nfrom workflows.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'pandas', 'numpy', 'sklearn', 'matplotlib', 'boto3'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


BAD = [
    (("run", "--recipe", "digit"), 2, "there are: cifar10, digits"),
    (("run", "-s", "distill.lrr=3"), 2, "distill.lrr: no such option"),
    (("run", "--force", "taecher"), 2, "--force: 'taecher' is not a stage"),
    (("run", "--until", "end"), 2, "--until: 'end' is not a stage"),
    (("run", "--workers", "300"), 2, "300 workers need teacher.batch of at least 300; it is 128"),
    (("run", "--workers", "3:2"), 2, "should be a number, or fewest:most such as 2:8"),
    (("run", "--checkpoint-every", "10h"), 2, "should be images, such as 64000, or minutes, such as 10m"),
    (("run", "--workers", "0"), 2, "should be a number, or fewest:most"),
    (("run", "--workspace", "/dev/null/x"), 1, "cannot be written"),
    (
        ("run", "-s", "data.extractor=inception", "-s", "data.extractor_weights=/nowhere.pth"),
        1,
        "/nowhere.pth: no such file",
    ),
    (("run", "-s", "evaluate.reference=/nowhere"), 1, "/nowhere holds no statistics"),
    (("sweep", "--space", "steps-and-weigths"), 2, "did you mean steps-and-weights?"),
    (("sweep", "--space", "pairin=grid"), 2, "pairin: no such option; did you mean pairing"),
    (("sweep", "--search", "gird"), 2, "--search: 'gird' is not one of grid, random, tpe"),
    (("sample", "/nowhere"), 1, "not a model folder"),
    (("sample", "/nowhere", "--out", "x.gif"), 2, ".png"),
    (("sample", "/nowhere", "--labels", "3,,5"), 2, "'3,,5' should be classes with commas between, such as 3,5"),
    (("run", "-s", "seed=-1"), 2, "seed: -1 should be greater than or equal to 0"),
    (("run", "-s", "teacher.optimiser.lr=.inf"), 2, "teacher.optimiser.lr: inf should be a finite number"),
    (("run", "-s", "recipe=a/b"), 2, "recipe: 'a/b' can't be a recipe's name"),
    (("run", "--workspace", ""), 2, "workspace: '' is not a folder name"),
    (("run", "--checkpoint-every", "nanm"), 2, "should be images, such as 64000, or minutes, such as 10m"),
    (("run", "--checkpoint-every", "infm"), 2, "should be images, such as 64000, or minutes, such as 10m"),
    (("bench", "everything"), 2, "engine, sampler, start, ray, scaling, tracking, memory, data"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), BAD, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_mistakes_have_a_line_and_a_code(capsys, arguments, code, said):
    got, out, err = inside(capsys, *arguments)
    assert got == code
    assert said in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
    assert out == ""


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("run", "--tracking-wait"),
        ("sweep", "--hours"),
        ("sweep", "--cpus-per-trial"),
        ("sweep", "--gpus-per-trial"),
        ("plan", "--gpu-memory"),
        ("prepare", "--shard-mb"),
    ],
)
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_a_number_that_is_none_is_refused(capsys, command, option, value):
    places = ("a", "b", "--size", "8") if command == "prepare" else ()
    code, _, err = inside(capsys, command, *places, f"{option}={value}")
    assert code == 2
    assert option in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("config", "--foo"), "No such option: --foo"),
        (("confg",), "No such command 'confg'."),
        (("run", "--at-once", "x"), "Invalid value for '--at-once': Input should be a valid integer"),
        (("submit", "run", "--at-once", "0"), "Invalid value for '--at-once'"),
        (("sample",), "Missing argument"),
    ],
)
def test_a_usage_error_is_a_line_and_where_to_look(capsys, monkeypatch, arguments, said):
    monkeypatch.setenv("COLUMNS", "10")
    code, out, err = inside(capsys, *arguments)
    first, second = err.splitlines()
    assert (code, out) == (2, "")
    assert first.startswith(f"error: {said}")
    assert second.startswith("       mmdistill ")
    assert second.endswith("--help shows the usage")


def test_without_arguments_the_help_is_shown(capsys):
    for arguments in ((), ("jobs",)):
        code, out, err = inside(capsys, *arguments)
        assert (code, err) == (2, "")
        assert "Usage: mmdistill" in out


def test_what_breaks_a_line_or_a_stream_is_written_out(capsys, tmp_path):
    assert inside(capsys, "config", "-r", "a\n\x1b[31m.yaml")[2] == "error: recipe: no such file a\\n\\x1b[31m.yaml\n"
    probe = "import workflows.cli.main as c, sys\nc.json\nc.app.registered_commands[:] = []\n"
    probe += (
        "@c.app.command()\ndef one(): print('caf\\xe9 \\udcff')\n@c.app.command()\ndef two(): pass\nc.main(['one'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout) == (0, b"caf\\xe9 \\udcff\n"), done.stderr


@pytest.mark.parametrize("days", ["inf", "nan", "1e300"])
def test_days_that_no_calendar_has(capsys, tmp_path, days):
    assert inside(capsys, "gc", "--keep-days", days, "--workspace", str(tmp_path))[0] == 2


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "soon"])
def test_a_wait_that_is_none_is_refused(monkeypatch, value):
    from workflows.errors import ConfigError
    from workflows.session.options import RunOptions, wait_of
    from workflows.training.crew import resized_every

    monkeypatch.setenv("MMDISTILL_TRACKING_WAIT", value)
    with pytest.raises(ConfigError, match=f"MMDISTILL_TRACKING_WAIT: '{value}' is not a number of seconds"):
        wait_of(RunOptions("."))
    monkeypatch.setenv("MMDISTILL_RESIZED_EVERY", value)
    with pytest.raises(ConfigError, match=f"MMDISTILL_RESIZED_EVERY: '{value}' is not a number of seconds"):
        resized_every()


@pytest.mark.parametrize("name", ["MMDISTILL_TRACKING_WAIT", "MMDISTILL_RESIZED_EVERY"])
def test_the_environment_is_looked_at_before_anything_is_made(monkeypatch, capsys, tmp_path, name):
    monkeypatch.setenv(name, "soon")
    code, _, err = inside(capsys, "run", "--workspace", str(tmp_path / "w"))
    assert (code, err.count("\n")) == (2, 1)
    assert f"error: {name}: 'soon' is not a number of seconds" in err
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback():
    code, _, err = run("run", "--recipe", "digit", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert "ConfigError" in err


def test_a_tracking_server_that_does_not_answer(tmp_path, capsys):
    code, _, err = inside(
        capsys, "run", "--workspace", str(tmp_path), "--tracking-uri", "http://127.0.0.1:9", "--until", "prepare"
    )
    assert code == 1
    assert "tracking: http://127.0.0.1:9 failed" in err
    assert "run the same command again" in err


def test_config_prints_yaml(capsys):
    code, out, _ = inside(capsys, "config", "-s", "seed=5")
    assert code == 0
    assert "seed: 5" in out


def test_recipes_are_listed(capsys):
    _, out, _ = inside(capsys, "recipes")
    assert "\ndigits  " in out


def test_a_workspace_without_a_store_is_told_from_a_model_that_is_not_there(tmp_path, capsys):
    code, _, err = inside(capsys, "sample", "models:/nothing@k8-champion", "--workspace", str(tmp_path))
    assert code == 1
    assert f"{tmp_path}: nothing is registered in this workspace" in err
    assert not list(tmp_path.iterdir())
