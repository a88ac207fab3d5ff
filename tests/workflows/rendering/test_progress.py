"""Progress bars and tables, as terminals of any width show them."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from workflows.rendering.screen import Screen, show_table
from workflows.stages.report import last_screen
from workflows.sweep import table as sweep_table


def screen_of(width):
    shown = io.StringIO()
    return Screen(Console(file=shown, width=width, force_terminal=True, color_system=None, soft_wrap=True)), shown


@pytest.mark.parametrize("width", [80, 110])
def test_bars_stay_readable_on_a_narrow_terminal(width):
    screen, shown = screen_of(width)
    with screen.bars():
        bar = screen.bar("distill-k8", 160_000, unit="images")
        bar.update(38_400, "1.52k img/s  student 0.000458  auxiliary 0.0417  distance 0.152 (best 0.152)")
        screen.progress.refresh()
    line = next(line for line in reversed(shown.getvalue().splitlines()) if "distill-k8" in line and "img/s" in line)
    assert "38.4k/160k images" in line
    assert "━" in line
    assert "…" in line
    assert len(line.strip("\r")) <= width + len("\x1b[2K\x1b[1A")


@pytest.mark.parametrize("width", [24, 40, 60])
def test_a_bar_on_a_small_terminal_has_its_name_and_how_far_it_is(width):
    screen, shown = screen_of(width)
    with screen.bars():
        bar = screen.bar("distill-k8", 160_000, unit="images")
        bar.update(40_000, "1.52k img/s  student 0.000458")
        screen.progress.refresh()
    line = next(line for line in reversed(shown.getvalue().splitlines()) if "distill-k8" in line)
    assert "25 %" in line
    assert "…" not in line
    assert len(line) <= width + len("\x1b[2K")


SUMMARY = {
    "seeds": 3,
    "features": "classifier",
    "counts": "1,797 samples against 1,797 images",
    "floor": 0.01,
    "floor_of": "the training images",
    "warnings": ["few [rows]"],
    "seconds": 99,
    "report": "/w[v2]/report.html",
    "report_here": "/w[v2]/report.html",
    "tracking": "sqlite:////w[v2]/mlflow.db",
    "teacher_best": {"frechet": 0.04, "sampler": "ddim", "k": 64},
    "teacher_longest": {"k": 256, "frechet": 0.042},
    "students": [
        {"k": k, "frechet": 0.984 / k, "frechet_spread": 0.003, "teacher_frechet_same_k": 3.5, "seconds": 333}
        | {"model_uri": "models:/mmdistill-digits-student/1"}
        for k in (1, 8)
    ],
}


@pytest.mark.parametrize("width", [20, 24, 60, 79, 80, 120])
def test_every_figure_of_the_last_screen_is_there_at_every_width(width):
    screen, shown = screen_of(width)
    last_screen(SUMMARY, screen, "/w[v2]", None)
    text = shown.getvalue()
    for figure in ("0.984", "0.123 ± 0.003" if width > 20 else "0.123", "3.500", "0.281", "2.93", "5:33"):
        assert figure in text
    assert ("┃" in text) == (width >= 80)
    assert "…" not in text
    table = text.partition("Frechet distance in")[0]
    assert max(map(len, table.splitlines())) <= width
    assert "Report: /w[v2]/report.html" in text
    assert "--workspace '/w[v2]'" in text
    assert "few [rows]" in text


@pytest.mark.parametrize("width", [24, 120])
def test_every_figure_of_a_sweep_is_there_at_every_width(width):
    points = [{"k": 8, "pairing": pairing, "optimiser.lr": 0.001} for pairing in ("grid", "uniform")]
    figures = {"frechet": 0.125, "recall": 0.5, "seconds": 33, "outcome": "ended"}
    screen, shown = screen_of(width)
    sweep_table.show([{"point": point} | figures for point in points], screen)
    text = shown.getvalue()
    for cell in ("pairing=grid", "pairing=uniform", "0.125", "0.500", "33"):
        assert cell in text
    assert ("┃" in text) == (width == 120)


def test_a_long_path_goes_on_in_the_next_line():
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("OK", "python", "3.11.7 on Linux")
    table.add_row("OK", "workspace", "/" + "y" * 100)
    screen, shown = screen_of(60)
    show_table(screen.console, table)
    assert shown.getvalue().count("y") == 101  # and that of python
    assert "python" in next(line for line in shown.getvalue().splitlines() if "3.11.7" in line)


def test_a_table_without_headers_or_with_a_long_cell_is_whole_on_a_small_terminal():
    table = Table(title="a title", show_header=False)
    table.add_column()
    table.add_column("what", no_wrap=True)
    table.add_row("[green]OK[/]", "x" * 50)
    screen, shown = screen_of(24)
    show_table(screen.console, table)
    text = shown.getvalue()
    assert text.count("x") == 50
    assert text.index("a title") < text.index("OK") < text.index("what")
