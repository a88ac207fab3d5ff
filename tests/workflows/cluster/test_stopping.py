"""Signals that ask a run to stop, sent for real."""

import os
import signal
import subprocess
import sys
import time

import pytest
import typer
from small import ROOT

from workflows.cli.options import errors
from workflows.cluster.stopping import Stopped, deferred_signals, hangups_kept_from_children, listening

ALL = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


@pytest.mark.parametrize("number", ALL)
def test_the_first_is_noted_and_the_second_ends_the_wait(number):
    with listening() as stopping:
        with stopping.waits():
            os.kill(os.getpid(), number)
            assert stopping.asked
            with pytest.raises(Stopped) as caught:
                os.kill(os.getpid(), number)
        assert caught.value.number == number
        with pytest.raises(Stopped):
            stopping.end()


@pytest.mark.parametrize("number", ALL)
def test_where_nothing_waits_one_is_enough(number):
    with listening(), pytest.raises(Stopped):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ALL)
def test_what_is_ignored_stays_ignored(number):
    """As of nohup, and of a command in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with listening() as stopping, stopping.waits():
            os.kill(os.getpid(), number)
            assert not stopping.asked
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_children_do_not_hear_of_a_lost_terminal():
    words = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(20)"]
    with hangups_kept_from_children():
        deaf = subprocess.Popen(words, stdout=subprocess.PIPE)
    hears = subprocess.Popen(words, stdout=subprocess.PIPE)
    try:
        for child in (deaf, hears):
            child.stdout.readline()
            child.send_signal(signal.SIGHUP)
        assert hears.wait(10) == -signal.SIGHUP
        assert deaf.poll() is None
    finally:
        for child in (deaf, hears):
            child.kill()
            child.communicate()


LOST = """
import sys, time
from workflows.cluster.stopping import listening
with listening() as stopping, stopping.waits():
    print("up", flush=True)
    while not stopping.asked:
        time.sleep(0.01)
    print("stopping", flush=True)  # to nobody
    open(sys.argv[1], "w").write("saved")
"""


def test_a_lost_terminal_is_no_error_of_what_is_said_to_it(tmp_path):
    import pty

    own, others = pty.openpty()
    words = [sys.executable, "-c", LOST, str(tmp_path / "saved")]
    process = subprocess.Popen(
        ["setsid", "--ctty", *words], stdin=others, stdout=others, stderr=others,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(others)
    assert b"up" in os.read(own, 100)
    os.close(own)
    assert process.wait(20) == 0
    assert (tmp_path / "saved").read_text() == "saved"


@pytest.mark.parametrize("number", ALL)
def test_a_command_hears_from_its_beginning_to_its_end(capsys, number):
    """Before a run listens itself, and when it does no more: as to a second signal while Ray is shut down."""
    before = signal.getsignal(number)

    def work(ended):
        with errors(False, continues=True):
            if ended:
                with listening():
                    pass
            os.kill(os.getpid(), number)
            time.sleep(5)

    for ended in (False, True):
        with pytest.raises(typer.Exit) as caught:
            work(ended)
        assert caught.value.exit_code == 128 + number
        assert "run the same command again to continue from there" in capsys.readouterr().err
        assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", ALL)
def test_what_must_not_be_cut_is_not(number):
    done = []

    def work():
        with listening(), deferred_signals():
            os.kill(os.getpid(), number)
            time.sleep(0.1)
            done.append(number)

    with pytest.raises(Stopped) as caught:
        work()
    assert caught.value.number == number
    assert done == [number]
