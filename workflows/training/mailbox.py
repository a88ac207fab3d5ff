"""The actor between the driver and its workers. Rows and notes go to the driver, orders go to the workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from workflows.training.events import LOST, event

CLOSED = "closed"
"""A worker gets this in place of an order when no more will come."""


@dataclass
class Order:
    """A training for the workers of a crew (crew.py). `rank` is the worker that runs it alone, or None for all together. Its rows
    go to `mailbox` under `topic`. `what` is a reference to its loop and settings, which only the workers read.
    """

    number: int
    rank: int | None
    topic: str
    mailbox: Any
    what: list[Any]
    answer: list[Any] = field(default_factory=list)


class Mailbox:
    """Rows are metrics or events (events.py)."""

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
        rows, self.rows = self.rows, []
        notes, self.notes = self.notes, []
        return rows, notes

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
        """The next order after number `after` that is for this worker and not done, None while there is none, or CLOSED."""
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
        """[the result] of an order, or [] while it is not done."""
        return next((order.answer for order in self.orders.get(crew, []) if order.number == number), [])

    def tell(self, crew: str, row: dict[str, Any], of_rank: dict[int, dict[str, Any]] | None = None) -> None:
        """Sends an event of a crew's workers to each training that they run. `of_rank` holds the events of single workers. A worker
        that trains alone and has no event was only restarted with the others.
        """
        for order in self.orders.get(crew, []):
            if order.answer:
                continue
            sent = row
            if of_rank is not None and order.rank is not None:
                sent = of_rank.get(order.rank) or event(LOST, why="a worker beside it ended, and all begin again")
            order.mailbox.push.remote(order.topic, sent)


class Monitor:
    """The driver's end of a `Mailbox`, an actor that holds no CPU."""

    def __init__(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # On the driver's node: another machine might go away, and the run would end.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor: Any = ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote()

    def stop(self) -> None:
        """Asks the workers of every training to write a checkpoint and end."""
        self.actor.stop.remote()

    def drain(self) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
        import ray

        out: tuple[list[tuple[str, dict[str, Any]]], list[str]] = ray.get(self.actor.drain.remote())
        return out
