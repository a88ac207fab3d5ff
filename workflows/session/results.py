"""The table of an evaluation: finds the row of a student, and the row of the teacher that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Results:
    """`rows` is the table of the evaluate stage. Students are compared with the teacher under its sampler `compared_by`."""

    rows: list[dict[str, Any]]
    compared_by: str

    @classmethod
    def of(cls, result: dict[str, Any]) -> Results:
        """From the result of the evaluate stage."""
        return cls(result["rows"], result["compared_by"])

    def student(self, k: int) -> dict[str, Any]:
        return self._students()[k]

    def teacher(self, k: int) -> dict[str, Any]:
        return self._teachers()[k]

    @property
    def longest(self) -> dict[str, Any]:
        """The teacher's row with the most steps."""
        rows = self._teachers()
        return rows[max(rows)]

    @property
    def best_of_teacher(self) -> dict[str, Any]:
        """The teacher's row with the lowest distance, under any sampler."""
        return min((row for row in self.rows if row["who"] == "teacher"), key=lambda row: float(row["frechet"]["mean"]))

    @property
    def teacher_steps(self) -> list[int]:
        return sorted(self._teachers())

    def _students(self) -> dict[int, dict[str, Any]]:
        return {row["k"]: row for row in self.rows if row["who"] == "student" and row["plain"]}

    def _teachers(self) -> dict[int, dict[str, Any]]:
        plain = (row for row in self.rows if row["who"] == "teacher" and row["plain"])
        return {row["k"]: row for row in plain if row["sampler"] == self.compared_by}
