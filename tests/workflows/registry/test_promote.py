"""Gates: what passes, what is refused in which words, what is compared at all; every move is recorded, also of those who race."""

import contextlib
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from registered import STUDENT, Shelf, student_tags
from small import ROOT

from workflows.cli.main import main
from workflows.config.loading import load_config
from workflows.config.schema import Gate
from workflows.errors import ConfigError, UserError
from workflows.registry.promote import judge, promote, run_promote, user
from workflows.registry.versions import Version

ALIAS = "k8-champion"
UNJUDGED = "it has no metrics to judge: register it again with `mmdistill run`"


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path)


def version(number: int = 1, **figures) -> Version:
    return Version(STUDENT, str(number), student_tags(**figures))


def without(found: Version, tag: str) -> Version:
    """The version as one of before this tag was."""
    return replace(found, tags={name: v for name, v in found.tags.items() if name != tag})


def move(shelf, version, **options):
    return promote(shelf.registry, version, ALIAS, **({"who": "ada", "why": "a test"} | options))


GATES = {
    "passes": (Gate(), {}, ()),
    "at the bound": (Gate(teacher_ratio=0.2, recall=0.8, frechet=0.1), {}, ()),
    "teacher": (Gate(teacher_ratio=0.19), {}, ("distance 0.1 is 0.2 of its teacher's 0.5 at 8 steps, at most 0.19 passes",)),
    "absolute": (Gate(frechet=0.09), {}, ("distance 0.1 is above 0.09",)),
    "recall": (Gate(recall=0.81), {}, ("recall 0.8 is below 0.81",)),
    "both": (Gate(frechet=0.09, recall=0.9), {}, ("distance 0.1 is above 0.09", "recall 0.8 is below 0.9")),
    "no gate": (Gate(teacher_ratio=None, recall=0), {"teacher_frechet": "0.01", "recall": "0"}, ()),
    "recall that is not a number": (Gate(), {"recall": "nan"}, ("recall nan is below 0.3",)),
    "distance that is not a number": (Gate(), {"frechet": "nan"}, (UNJUDGED,)),
    "other steps": (Gate(), {"k": "4"}, ("it has 4 steps, k8-champion is for 8",)),
}  # fmt: skip


@pytest.mark.parametrize("case", GATES)
def test_the_gate(case):
    gate, tags, refusals = GATES[case]
    assert judge(version(gate=gate, **tags), None, ALIAS).refusals == refusals


def test_a_version_of_before_gates_is_not_judged():
    verdict = judge(without(version(), "gate"), None, ALIAS)
    assert "register it again" in verdict.refusals[0]


@pytest.mark.parametrize(
    ("frechet", "spread", "passes", "is_better"),
    [(0.09, 0.01, True, True), (0.1, 0.01, True, False), (0.114, 0.01, True, False), (0.1142, 0.01, False, False),
     (0.101, 0.0, True, False), (0.111, 0.0, False, False)],
)  # fmt: skip
def test_against_the_champion_by_the_spread_over_seeds(frechet, spread, passes, is_better):
    champion, new = version(1, frechet=0.1, spread=0.01), version(2, frechet=frechet, spread=spread)
    assert (not judge(new, champion, ALIAS).refusals) == passes
    assert (not judge(new, champion, ALIAS, better=True).refusals) == is_better


@pytest.mark.parametrize("tag", ["samples", "reference", "data_fingerprint"])
def test_what_was_measured_otherwise_is_not_compared(tag):
    champion, new = version(1), version(2, frechet=0.001, **{tag: "50000"})
    (said,) = judge(new, champion, ALIAS).refusals
    assert said.startswith("it can't be compared with version 1")
    assert f"50000 against {champion.tags[tag]}" in said


def test_moves_are_recorded_with_all_that_they_were(shelf):
    first, worse, better = shelf.student(), shelf.student(frechet=0.3), shelf.student(frechet=0.05)
    assert move(shelf, first).moved
    said = move(shelf, worse)
    assert not said.moved
    assert "distance 0.3 against 0.1 of version 1 is higher by more than the seeds' spread 0.014" in said.text
    assert shelf.registry.alias(first.name, ALIAS) == "1"
    assert move(shelf, worse, force=True, who="bob", why="a demonstration").moved
    assert move(shelf, better, why="").moved
    assert not move(shelf, better).moved
    moves = shelf.registry.moves(first.name)
    assert [(m.version, m.before, m.who, m.by, m.done) for m in moves] == [
        ("1", None, "ada", "gate", True),
        ("2", "1", "bob", "forced", True),
        ("3", "2", "ada", "gate", True),
    ]
    assert moves[1].why.startswith("a demonstration; against: distance 0.3")
    assert all(m.when.endswith("+00:00") for m in moves)


def test_a_long_why_leaves_room_for_what_the_gate_had_against_it(shelf):
    assert move(shelf, shelf.student(gate=Gate(frechet=0.09)), force=True, why="x" * 1000).moved
    (recorded,) = shelf.registry.moves(STUDENT)
    assert recorded.why.startswith("xxx")
    assert recorded.why.endswith("x; against: distance 0.1 is above 0.09")
    assert len(recorded.why) == 1000


@pytest.mark.parametrize("gate", ['{"frechet": 1, "of tomorrow": 2}', "no json"])
def test_a_gate_that_is_not_known_here_refuses(shelf, gate):
    student = replace(version(), tags=version().tags | {"gate": gate})
    (said,) = judge(student, None, ALIAS).refusals
    assert "its gate can't be read" in said


def test_the_record_outlives_its_version(shelf):
    shelf.student()
    move(shelf, shelf.student(frechet=0.05))
    shelf.tracker.client.delete_model_version(shelf.registry.names()[0], "2")
    assert [m.version for m in shelf.registry.moves(shelf.registry.names()[0])] == ["2"]


def test_two_who_race_lose_no_move_and_the_last_knows_what_it_replaced(shelf):
    """Both decide on the same champion, and only then move."""
    old, a, b = (shelf.student(frechet=f) for f in (0.1, 0.05, 0.051))
    move(shelf, old)
    state = shelf.registry.alias_state(old.name, ALIAS)
    shelf.registry.move(a, ALIAS, state, who="a", why="", by="gate")
    last = shelf.registry.move(b, ALIAS, state, who="b", why="", by="gate")
    assert last.before == a.version
    assert [(m.version, m.before) for m in shelf.registry.moves(old.name)] == [("1", None), ("2", "1"), ("3", "2")]


@pytest.mark.parametrize(("rival", "stays"), [(0.02, "rival"), (0.05, "mine")])
def test_a_better_champion_set_in_the_meantime_is_put_back(shelf, monkeypatch, rival, stays):
    old, mine, other = shelf.student(), shelf.student(frechet=0.05), shelf.student(frechet=rival)
    move(shelf, old)
    decide, raced = shelf.registry.move, []

    def late(*arguments, **named):
        if not raced:  # between this promoter's decision and its move
            raced.append(True)
            state = shelf.registry.alias_state(old.name, ALIAS)
            decide(other, ALIAS, state, who="other", why="", by="gate")
        return decide(*arguments, **named)

    monkeypatch.setattr(shelf.registry, "move", late)
    outcome = move(shelf, mine)
    assert outcome.moved == (stays == "mine")
    assert shelf.registry.alias(old.name, ALIAS) == (mine if stays == "mine" else other).version
    moves = shelf.registry.moves(old.name)
    assert [m.version for m in moves[:3]] == ["1", "3", "2"]
    assert [m.version for m in moves[3:]] == ([] if stays == "mine" else ["3"])
    assert all("put back" in m.why for m in moves[3:])


def test_many_at_once_leave_a_record_each(shelf):
    versions = [shelf.student(frechet=0.1 - 0.001 * i) for i in range(6)]
    threads = [threading.Thread(target=move, args=(shelf, v), kwargs={"force": True}) for v in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    moves = shelf.registry.moves(versions[0].name)
    assert sorted(m.version for m in moves) == sorted(v.version for v in versions)
    assert all(m.done for m in moves)
    assert shelf.registry.alias(versions[0].name, ALIAS) in {m.version for m in moves}


@pytest.mark.parametrize(("failures", "ends"), [(3, True), (4, False)])
def test_an_alias_that_two_create_at_once_is_tried_again(shelf, monkeypatch, failures, ends):
    """What MLflow says to the second of them, before it does what it should."""
    from mlflow.exceptions import MlflowException

    new, client, left = shelf.student(), shelf.tracker.client, list(range(failures))
    sets = client.set_registered_model_alias

    def late(*words):
        if left:
            left.pop()
            raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: registered_model_aliases.alias")
        return sets(*words)

    monkeypatch.setattr(client, "set_registered_model_alias", late)
    with contextlib.nullcontext() if ends else pytest.raises(UserError, match="UNIQUE constraint"):
        move(shelf, new)
    assert shelf.registry.alias(new.name, ALIAS) == ("1" if ends else None)
    assert [m.done for m in shelf.registry.moves(new.name)] == [ends]


def test_promote_needs_no_workspace_and_says_what_it_did(shelf, tmp_path):
    shelf.student()
    shelf.student(frechet=0.6)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def command(*words):
        words = [sys.executable, "-m", "workflows", "promote", *words, "--tracking-uri", shelf.uri]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MMDISTILL_USER": "grace"}
        return subprocess.run(words, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120)

    done = command("models:/mmdistill-tiny-student/1", "--alias", ALIAS, "--why", "first")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout == f"{ALIAS}: moved to version 1: distance 0.1, 0.2 of its teacher's 0.5 at 8 steps, recall 0.8\n"
    )
    done = command("models:/mmdistill-tiny-student/2", "--alias", ALIAS)
    assert done.returncode == 1
    assert "distance 0.6 is 1.2 of its teacher's 0.5 at 8 steps, at most 1 passes" in done.stderr
    assert "--force" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(elsewhere.iterdir())
    (recorded,) = shelf.registry.moves("mmdistill-tiny-student")
    assert (recorded.who, recorded.why) == ("grace", "first")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["models:/mmdistill-tiny-student", "--alias", ALIAS], 1, "has versions 1 to 2; which?"),
        (["models:/mmdistill-tiny-student/9", "--alias", ALIAS], 1, "has no version 9"),
        (["models:/mmdistill-tiny-studen/1", "--alias", ALIAS], 1, "did you mean mmdistill-tiny-student?"),
        (["models:/mmdistill-tiny-student/1", "--alias", "latest"], 2, "--alias: 'latest'"),
        (["models:/mmdistill-tiny-student/1", "--alias", "a.b"], 2, "--alias: 'a.b'"),
        (["models:/mmdistill-tiny-student/1", "--alias", "a\n"], 2, "--alias: 'a\\n'"),
        (["models:/mmdistill-tiny-student/1", "--alias", "a" * 101], 2, "should be at most 100 letters"),
        (["models:/mmdistill-tiny-student/1", "--alias", ALIAS, "--why", "x" * 1001], 2, "at most 1000 are kept"),
    ],
)
def test_mistakes(shelf, capsys, words, code, said):
    shelf.student()
    shelf.student()
    with pytest.raises(SystemExit) as caught:
        main(["promote", *words, "--tracking-uri", shelf.uri])
    shown = capsys.readouterr().err
    assert caught.value.code == code
    assert said in shown
    assert shelf.registry.moves("mmdistill-tiny-student") == []


def test_who(monkeypatch):
    for name in ("MMDISTILL_USER", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USER", "ada")
    assert user() == "ada"
    monkeypatch.setenv("MMDISTILL_USER", "grace")
    assert user() == "grace"
    assert user("by hand") == "by hand"


def test_a_gate_holds_for_its_k():
    config = load_config("digits", ["gate.recall=0.5", "gate.overrides.1.recall=0.2"])
    assert [config.gate.for_k(k).recall for k in (1, 2)] == [0.2, 0.5]
    with pytest.raises(ConfigError, match=r"gate.overrides.1.recal: no such option; did you mean recall"):
        load_config("digits", ["gate.overrides.1.recal=0.2"])
    assert load_config("digits", smoke=True).gate.teacher_ratio is None


def test_a_version_whose_champion_was_deleted_is_judged_by_the_gate_alone(shelf):
    first, second = shelf.student(frechet=0.01), shelf.student(frechet=0.2)
    move(shelf, first)
    shelf.tracker.client.delete_model_version(first.name, first.version)
    assert move(shelf, second).moved
    said = run_promote(shelf.registry, second.uri, alias=ALIAS, why="", who=None, force=False)
    assert said.endswith(f"{ALIAS} already points to {second.title}")


def test_a_champion_without_a_distance_is_not_compared():
    assert "that one has no distance" in judge(version(2), without(version(1), "frechet"), ALIAS).refusals[0]
