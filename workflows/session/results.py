"""The table of an evaluation, with the rows that students and teacher are compared by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """`rows` is the whole table. `students` and `teachers` hold its plain rows by k, the teacher's under the sampler that students
    are compared with.
    """

    rows: list[Row]
    students: dict[int, Row]
    teachers: dict[int, Row]

    @classmethod
    def of(cls, result: dict[str, Any]) -> Results:
        """From the result of the evaluate stage."""
        plain = [row for row in result["rows"] if row["plain"]]
        teachers = [row for row in plain if row["who"] == "teacher" and row["sampler"] == result["compared_by"]]
        return cls(
            rows=result["rows"],
            students={row["k"]: row for row in plain if row["who"] == "student"},
            teachers={row["k"]: row for row in teachers},
        )

    @property
    def longest(self) -> Row:
        """The teacher's row with the most steps."""
        return self.teachers[max(self.teachers)]

    @property
    def best_of_teacher(self) -> Row:
        """The teacher's row with the lowest distance, under any sampler."""
        return min((row for row in self.rows if row["who"] == "teacher"), key=lambda row: float(row["frechet"]["mean"]))
