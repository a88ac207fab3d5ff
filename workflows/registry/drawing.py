"""Draws the lineage as inline SVG: boxes in five columns, from data to exports, without scripts or external files."""

from __future__ import annotations

import textwrap
from html import escape
from typing import Any

from workflows.registry.lineage import measured

COLUMNS = (("data", 140), ("teacher", 225), ("students", 225), ("evaluations", 280), ("exports", 210))
GAP, LINE, PAD, BETWEEN, TOP = 26, 15, 9, 12, 26
COLOUR = {"teacher": "#2b6f9e", "students": "#d1495b"}
BOLD, DIM = 'font-weight="600"', 'fill="#68707a"'
LETTER = 6.5
"""Maximum width of a letter, by which lines are wrapped."""


class Sheet:
    """The drawing under construction, filled from the top. `y` is where the next row begins."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.y = float(TOP)

    @property
    def width(self) -> int:
        return sum(width for _, width in COLUMNS) + GAP * (len(COLUMNS) - 1) + 2

    def box(self, column: int, lines: list[str], middle: float) -> float:
        """Draws a box of text lines, the first one bold, centred vertically on `middle`. Returns `middle`."""
        name, width = COLUMNS[column]
        x, height = self.left(column), height_of(lines)
        edge = COLOUR.get(name, "#b8bdc4")
        texts = "".join(
            f'<text x="{x + PAD}" y="{middle - height / 2 + PAD + 11 + i * LINE:.1f}" {BOLD if i == 0 else DIM}>'
            f"{escape(line)}</text>"
            for i, line in enumerate(lines)
        )
        self.parts.append(
            f'<g><title>{escape(chr(10).join(lines))}</title><rect x="{x}" y="{middle - height / 2:.1f}" width="{width}" '
            f'height="{height}" rx="7" fill="#f6f7f9" stroke="{edge}"/>{texts}</g>'
        )
        return middle

    def left(self, column: int) -> int:
        return 1 + sum(width + GAP for _, width in COLUMNS[:column])

    def join(self, column: int, here: float, there: float) -> None:
        """Draws a curve from the right edge of a box to the left edge of a box in the next column."""
        x, end = self.left(column) + COLUMNS[column][1], self.left(column + 1)
        bend = (x + end) / 2
        self.parts.append(
            f'<path d="M{x} {here:.1f}C{bend} {here:.1f} {bend} {there:.1f} {end} {there:.1f}" fill="none" stroke="#8a8f98"/>'
        )


def height_of(lines: list[str]) -> float:
    return 2 * PAD + LINE * len(lines) - 2


def _wrapped(column: int, lines: list[str]) -> list[str]:
    most = int((COLUMNS[column][1] - 2 * PAD) / LETTER)
    return [part for line in lines for part in textwrap.wrap(line, most, break_on_hyphens=False)]


def draw(graph: dict[str, Any]) -> str:
    """The result of `lineage_of` as an <svg> element."""
    sheet = Sheet()
    heads = "".join(
        f'<text x="{sheet.left(i)}" y="13" fill="#68707a">{name}</text>' for i, (name, _) in enumerate(COLUMNS)
    )
    for data in graph["data"]:
        count = [f"{int(data['count']):,} images {data['shape'] or ''}".rstrip()] if data["count"] else []
        lines = _wrapped(0, [data["source"] or "data", data["fingerprint"], *count])
        top, middles = sheet.y, [_teacher(sheet, teacher) for teacher in data["teachers"]]
        here = _beside(sheet, lines, top, middles)
        sheet.box(0, lines, here)
        for middle in middles:
            sheet.join(0, here, middle)
    label = "Lineage: data, teacher, students, evaluations, exports"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" viewBox="0 0 {sheet.width} {sheet.y:.0f}" '
        f'font-family="system-ui, sans-serif" font-size="11.5" fill="#22262b">{heads}{"".join(sheet.parts)}</svg>'
    )


def _teacher(sheet: Sheet, teacher: dict[str, Any]) -> float:
    """Draws a teacher and its students. The teacher's evaluation is in its own box. Returns the middle of that box."""
    gone = [] if teacher["registered"] else ["no longer in the registry"]
    lines = _wrapped(1, [f"{teacher['name']} v{teacher['version']}", *_aliases(teacher), *measured(teacher)[:1], *gone])
    top, middles = sheet.y, [_student(sheet, student) for student in teacher["students"]]
    here = _beside(sheet, lines, top, middles)
    sheet.box(1, lines, here)
    for middle in middles:
        sheet.join(1, here, middle)
    return here


def _student(sheet: Sheet, student: dict[str, Any]) -> float:
    start = [f"starts from {student['start'].removeprefix('models:/').replace('/', ' v')}"] if student["start"] else []
    lines = [f"{student['name']} v{student['version']}", f"k = {student['k']}, {student['method']}"]
    lines = _wrapped(2, [*lines, *_aliases(student), *start])
    figures = _wrapped(3, measured(student))
    copies = [_wrapped(4, [e["format"], e["where"], f"sha256 {e['sha256'][:12]}"]) for e in student["exports"]]
    tall = sum(height_of(c) + BETWEEN for c in copies) - BETWEEN if copies else 0.0
    height = max([height_of(lines), height_of(figures) if figures else 0.0, tall])
    here = sheet.y + height / 2
    sheet.box(2, lines, here)
    if figures:
        sheet.join(2, here, sheet.box(3, figures, here))
    top = here - tall / 2
    for copy in copies:
        sheet.join(3 if figures else 2, here, sheet.box(4, copy, top + height_of(copy) / 2))
        top += height_of(copy) + BETWEEN
    sheet.y += height + BETWEEN
    return here


def _aliases(node: dict[str, Any]) -> list[str]:
    return ["@" + ", @".join(node["aliases"])] if node["aliases"] else []


def _beside(sheet: Sheet, lines: list[str], top: float, middles: list[float]) -> float:
    """The middle of a box that is placed next to `middles` and not above `top`. Moves the next row below the box."""
    half = height_of(lines) / 2
    here = max((middles[0] + middles[-1]) / 2 if middles else 0.0, top + half)
    sheet.y = max(sheet.y, here + half + BETWEEN)
    return here
