"""The live bars, as a terminal shows them."""

import io

import pytest
from rich.console import Console

from workflows.runtime.progress import Screen


@pytest.mark.parametrize("width", [80, 110])
def test_bars_stay_readable_on_a_narrow_terminal(width):
    shown = io.StringIO()
    screen = Screen(Console(file=shown, width=width, force_terminal=True, color_system=None))
    with screen.bars():
        bar = screen.bar("distill-k8", 160_000, unit="images")
        bar.update(38_400, "1.52k img/s  student 0.000458  auxiliary 0.0417  distance 0.152 (best 0.152)")
        screen.progress.refresh()
    line = next(line for line in reversed(shown.getvalue().splitlines()) if "distill-k8" in line and "img/s" in line)
    assert "38.4k/160k images" in line
    assert "━" in line
    assert "…" in line
    assert len(line.strip("\r")) <= width + len("\x1b[2K\x1b[1A")
