"""What a training's events tell of its interruptions: how far it was, what was trained again, and for how long it stood."""

from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from workflows.rendering.plots import Timeline, timeline
from workflows.rendering.screen import Screen
from workflows.session.stage import training_listener
from workflows.storage import jsonl as lines
from workflows.training.events import AT, Events, interruptions


def row(name, seconds, **more):
    return {"event": name, "time": 1_000_000 + int(seconds * 1000)} | more


@pytest.fixture
def events(tmp_path):
    events = Events(tmp_path / "events.jsonl")
    events.take(row("begun", 0, n_images=0, workers=3))
    events.take(row("checkpoint", 10, n_images=1000, stalled=0.1, written=0.4))
    return events


def test_a_lost_worker(events):
    events.reached(1600, 1_016_000)
    events.take(row(AT, 17, n_images=1700))
    events.reached(1000, 1_018_000)  # said again
    events.take(row("lost", 20, why="its node died"))
    assert events.take(row("begun", 26, n_images=1000, workers=2)) == row(
        "begun", 26, n_images=1000, workers=2, cause="lost", reached=1700, again=700, away=9.0
    )
    events.take(row("checkpoint", 40, n_images=2500, stalled=0.1, written=0.4))
    events.take(row("begun", 50, n_images=2500, workers=3))
    kept = list(lines.read(events.path))
    assert kept == events.rows
    assert [one["event"] for one in kept] == ["begun", "checkpoint", "lost", "begun", "checkpoint", "begun"]
    assert kept[-1]["cause"] == "resized"
    sums = {"times": 2, "again": 700, "most_again": 700, "away": 19.0, "between_checkpoints": 1500}
    assert interruptions(kept) == sums


def test_what_is_said_again_and_again_is_kept_once(events):
    lost = row("lost", 20, why="its node died")
    assert not events.repeated(lost)
    events.take(lost)
    assert events.repeated(row("lost", 21, why="its node died"))
    assert not events.repeated(row("failed", 21, why="another"))
    events.take(row("begun", 26, n_images=1000, workers=2))
    assert not events.repeated(row("lost", 30, why="its node died"))


def test_a_driver_that_was_killed_and_one_that_was_stopped(events):
    events.take(row(AT, 12, n_images=1200))
    later = Events(events.path)  # what was said and not kept is lost with the driver
    later.reached(1100, 1_011_000)  # of the metrics
    assert later.take(row("begun", 500, n_images=1000, workers=3))["cause"] == "driver"
    assert later.rows[-1]["again"] == 100
    later.take(row("checkpoint", 510, n_images=1300, stalled=0.1, written=0.4))
    later.take(row("stopped", 510, n_images=1300))
    last = Events(events.path).take(row("begun", 900, n_images=1300, workers=1))
    assert (last["cause"], last["again"]) == ("stopped", 0)
    assert interruptions([*later.rows, last])["away"] == 0, "nobody was waiting"


def test_lost_before_its_first_checkpoint(tmp_path):
    events = Events(tmp_path / "events.jsonl")
    events.take(row("begun", 0, n_images=0, workers=2))
    events.take(row(AT, 5, n_images=300))
    events.take(row("lost", 6, why="killed"))
    assert events.take(row("begun", 9, n_images=0, workers=2))["again"] == 300


def test_half_a_line_stays_by_itself(events):
    with events.path.open("a") as file:
        file.write('{"event": "los')
    again = Events(events.path)
    again.take(row("stopped", 30, n_images=1000))
    assert [one["event"] for one in lines.read(events.path)] == ["begun", "checkpoint", "stopped"]


def test_the_course_of_a_training_drops_where_it_was_lost(events):
    events.take(row(AT, 17, n_images=1700))
    events.take(row("lost", 20, why="its node died"))
    events.take(row("begun", 26, n_images=1000, workers=2))
    points = [(500, 1_005_000), (1500, 1_015_000), (2000, 1_036_000)]
    course = Timeline(points, events.rows)
    (_, before, after), (_, rest, end) = course.stretches()
    assert before == [(0, 1_000_000), (500, 1_005_000), (1500, 1_015_000), (1700, 1_017_000)]
    assert rest == [(1000, 1_026_000), (2000, 1_036_000)]
    assert (after, end) == (events.rows[-1], None)
    assert timeline({"teacher": course, "distill-k8": course}).startswith("<svg")


def test_the_screen_tells_of_it_whatever_gloo_has_to_say(events):
    out = StringIO()
    screen = Screen(Console(file=out, width=200))
    run = SimpleNamespace(
        record_event=events.take,
        log=lambda *_: None,
        folder=SimpleNamespace(name="teacher"),
        context=SimpleNamespace(screen=screen),
    )
    updates = []
    hear = training_listener(run, SimpleNamespace(update=lambda n, *_: updates.append(n)))
    metrics = [{"n_images": n, "images_per_second": 100.0, "time": 1_000_000 + 10 * n} for n in (500, 1500, 2500)]
    for one in metrics[:2]:
        hear(one)
    hear(row(AT, 17, n_images=1700))
    hear(row("lost", 20, why="[/__w/pytorch/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.3]:1"))
    hear(row("begun", 26, n_images=1000, workers=2))
    hear(row("checkpoint", 30, n_images=2000, stalled=0.1, written=0.4))
    for one in (metrics[0], metrics[2]):  # the first is said again, from the checkpoint
        hear(one)
    assert updates == [500, 1500, 1000, 2500]
    hear = training_listener(run, SimpleNamespace(update=lambda n, *_: updates.append(n)))  # of the next command
    hear(row("begun", 50, n_images=2000, workers=2))
    for one in metrics:
        hear(one)
    assert updates[4:] == [2000, 2500], "the time left is estimated from where it resumed"
    first, second, _ = out.getvalue().splitlines()
    assert first.endswith(
        "workers were lost: [/__w/pytorch/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.3]:1"
    )
    assert second.endswith(
        "continues from 1k images with 2 workers (workers were lost, 700 images again, 9 s without training)"
    )
