"""Between the driver and its workers: rows and notes go up, orders go down. An actor of no weight, that holds nothing but these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from workflows.training.events import LOST, event

CLOSED = "closed"
"""What a worker is told in the place of an order when there will be no more."""


@dataclass
class Order:
    """A training for workers of a crew. `rank`: of the one that does it by itself, None for all of them together; `topic`: of its
    rows, which go to `mailbox`; `what`: a reference to the rest, which is the workers' alone.
    """

    number: int
    rank: int | None
    topic: str
    mailbox: Any
    what: list[Any]
    answer: list[Any] = field(default_factory=list)


class Mailbox:
    """Rows are metrics, or events (events.py)."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, dict[str, Any]]] = []
        self.notes: list[str] = []
        self.asked_to_stop = False
        self.orders: dict[str, list[Order]] = {}
        self.closed: set[str] = set()

    # Up

    def push(self, topic: str, row: dict[str, Any]) -> None:
        self.rows.append((topic, row))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def drain(self) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
        out = self.rows, self.notes
        self.rows, self.notes = [], []
        return out

    # Stopping

    def stop(self) -> None:
        self.asked_to_stop = True

    def stopping(self, topic: str, row: dict[str, Any]) -> bool:
        self.push(topic, row)
        return self.asked_to_stop

    # Orders

    def post(self, crew: str, order: Order) -> None:
        self.orders.setdefault(crew, []).append(order)

    def withdraw(self, crew: str, number: int) -> None:
        self.orders[crew] = [order for order in self.orders[crew] if order.number != number]

    def close(self, crew: str) -> None:
        self.closed.add(crew)

    def order(self, crew: str, rank: int, after: int) -> Order | str | None:
        """The next one after number `after` that is for this worker and not done; None: there is none yet."""
        if crew in self.closed:
            return CLOSED
        for order in self.orders.get(crew, []):
            if order.number > after and not order.answer and order.rank in (None, rank):
                return order
        return None

    def done(self, crew: str, number: int, answer: Any) -> None:
        for order in self.orders.get(crew, []):
            if order.number == number:
                order.answer = [answer]

    def answer(self, crew: str, number: int) -> list[Any]:
        """[what came of it], or [] while it is not done."""
        return next((order.answer for order in self.orders.get(crew, []) if order.number == number), [])

    def tell(self, crew: str, row: dict[str, Any], of_rank: dict[int, dict[str, Any]] | None = None) -> None:
        """An event of a crew's workers, to each training that they are at. `of_rank`: what happened to single ones; those that
        train by themselves beside them were only started again with them.
        """
        for order in self.orders.get(crew, []):
            if order.answer:
                continue
            own = row
            if of_rank is not None and order.rank is not None:
                own = of_rank.get(order.rank) or event(LOST, why="a worker beside it ended, and all begin again")
            order.mailbox.push.remote(order.topic, own)
