"""Crews: groups of workers that are kept from one training to the next. A crew is one run of Ray Train whose loop takes order after
order, so only its first training waits for processes and imports. When workers are lost, Ray Train restarts all workers of the
crew, and they resume the unfinished orders from their checkpoints.

On a Ray that this process started, workers hold no CPU: one crew serves the whole run, and each of its workers can run a training
alone. On a cluster, a crew holds the CPUs or GPUs that it computes on, serves one training at a time, and ends with the stage.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from workflows.cluster.session import OWN, Workers, before_shutdown, own_ray
from workflows.errors import UserError, seconds_of, training_failed
from workflows.storage.s3 import arrow_filesystem
from workflows.storage.store import delete
from workflows.storage.uri import is_remote, join
from workflows.training.checkpoints import Checkpoints
from workflows.training.events import DOWN, event
from workflows.training.job import Job
from workflows.training.mailbox import CLOSED, Order
from workflows.training.worker import root_cause, train_worker

FAILURES = 3
"""Restarts after lost workers, without a new checkpoint in between. The next loss ends the training."""
RESIZED_EVERY = 60.0
"""Seconds between checks for more nodes, for a training that may grow. MMDISTILL_RESIZED_EVERY overrides it."""
PAUSES = (*[0.05] * 40, 0.2)
"""Seconds between checks for a training's answer: short ones first, for short trainings."""
AWAKE, SOON, LATER = 2.0, 0.02, 0.25
"""A worker without an order asks for one every SOON seconds for AWAKE seconds, and then every LATER seconds."""


def resized_every() -> float:
    """RESIZED_EVERY, or the environment's value. Raises ConfigError."""
    return seconds_of("MMDISTILL_RESIZED_EVERY", RESIZED_EVERY, least=0.1)


@dataclass(frozen=True)
class Shape:
    """What a crew consists of. `storage` is where Ray Train may write files for workers on other machines."""

    workers: Workers
    use_gpu: bool
    threads: int
    storage: str
    holds: bool
    """Whether its workers hold CPUs or GPUs in Ray for as long as they live."""

    @property
    def resources(self) -> dict[str, float]:
        """The Ray resources of each worker."""
        if not self.holds:
            return {OWN: 0.001}
        return {"CPU": float(self.threads)} | ({"GPU": 1.0} if self.use_gpu else {})


class Crew:
    def __init__(self, shape: Shape, orders: Any) -> None:
        """`orders` is the mailbox through which the workers get them."""
        self.shape, self.orders, self.name = shape, orders, f"crew-{uuid.uuid4().hex[:12]}"
        self.busy: set[int | None] = set()
        """The ranks of workers that run an order alone. None: all run one together."""
        self._why = "its workers ended before it"
        self._error: Exception | None = None
        self._finished = 0
        self._storage: dict[str, tuple[str, int]] = {}
        """For each training: where its checkpoints are, and the images of the newest one when the workers got the order."""
        self._numbers = itertools.count(1)
        self._thread = threading.Thread(target=self._lead, daemon=True, name=self.name)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def seat(self, *, together: bool) -> tuple[int | None] | None:
        """Where an order can run: (rank,) of a free worker, or (None,) for all workers `together`. None if they are busy."""
        if together:
            return None if self.busy else (None,)
        free = [rank for rank in range(self.shape.workers.most) if not self.busy & {rank, None}]
        return (free[0],) if free else None

    def train(self, job: Job, rank: int | None, *, mailbox: Any, loop: Callable[[dict[str, Any]], Any]) -> Any:
        """Runs a job on the worker of this rank, or on all. Returns what `loop` returned on the first one. Raises UserError if the
        crew ends without a result.
        """
        import ray

        settings = {"job": asdict(job), "mailbox": mailbox, "alone": rank is not None, "watched": not own_ray()}
        storage, number = join(job.storage, job.name), next(self._numbers)
        self._storage[job.name] = storage, Checkpoints(storage).images()
        try:
            self.orders.post.remote(self.name, Order(number, rank, job.name, mailbox, [ray.put((loop, settings))]))
            for pause in itertools.chain(PAUSES, itertools.repeat(PAUSES[-1])):
                ended = self.ended  # read before the answer, which may arrive as the crew ends
                if answer := ray.get(self.orders.answer.remote(self.name, number)):
                    self._finished += 1
                    return answer[0]
                if ended:
                    raise training_failed(job.name, self._why) from self._error
                time.sleep(pause)
        finally:
            del self._storage[job.name]
            self.orders.withdraw.remote(self.name, number)

    def close(self) -> None:
        """Ends the workers once their orders are done."""
        self.orders.close.remote(self.name)
        self._thread.join()
        if self.shape.holds:
            with suppress(UserError):
                delete(join(self.shape.storage, self.name))

    def _lead(self) -> None:
        """Runs Ray Train for the life of the crew. After a failure it is run again as long as trainings make progress."""
        import ray.train

        while True:
            finished = self._finished
            for name, (storage, _) in list(self._storage.items()):
                self._storage[name] = storage, Checkpoints(storage).images()
            try:
                self._trainer().fit()
            except ray.train.TrainingFailedError as error:
                # Nodes come and go: run again as long as there is progress.
                before = list(self._storage.values())
                if self._finished > finished or any(Checkpoints(s).images() > images for s, images in before):
                    continue
                self._why, self._error = root_cause(error), error
            except ray.exceptions.RayActorError as error:
                self._why, self._error = "the process that leads its workers died", error
            except Exception as error:
                self._why, self._error = root_cause(error), error
            return

    def _trainer(self) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        from workflows.private.ray_train import LocalTrainer, Trainer, WorkersGone
        from workflows.training.trainer import LostWorkers

        orders, name, shape = self.orders, self.name, self.shape

        def tell(*what: Any) -> None:
            orders.tell.remote(name, *what)

        remote, workers = is_remote(shape.storage), shape.workers
        filesystem, path = arrow_filesystem(shape.storage) if remote else (None, shape.storage)
        return (LocalTrainer if own_ray() else Trainer)(
            serve,
            train_loop_config={"crew": name, "orders": orders},
            scaling_config=ScalingConfig(
                num_workers=workers.most if workers.fixed else (workers.fewest, workers.most),  # type: ignore[arg-type]
                use_gpu=shape.use_gpu,
                resources_per_worker=shape.resources,
                elastic_resize_monitor_interval_s=resized_every(),  # type: ignore[call-arg]
            ),
            run_config=RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=FAILURES),
                callbacks=[LostWorkers(tell), WorkersGone(lambda: tell(event(DOWN)))],  # type: ignore[list-item]
            ),
        )


def serve(config: dict[str, Any]) -> None:
    """The loop of each worker of a crew: runs order after order, until there are no more."""
    import gc

    import ray
    import ray.train

    crew, orders = config["crew"], config["orders"]
    rank, number = ray.train.get_context().get_world_rank(), 0
    since = time.monotonic()
    while (order := ray.get(orders.order.remote(crew, rank, number))) != CLOSED:
        if order is None:
            time.sleep(SOON if time.monotonic() < since + AWAKE else LATER)
            continue
        loop, settings = ray.get(order.what[0])
        answer = loop(settings)
        if order.rank is not None or rank == 0:
            ray.get(orders.done.remote(crew, order.number, answer))
        number, since = order.number, time.monotonic()
        del loop, settings, answer
        gc.collect()


class Crews:
    """The crews of this process, for as long as its Ray runs. Any thread may call it."""

    def __init__(self) -> None:
        self._crews: list[Crew] = []
        self._lock = threading.Lock()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def train(
        self,
        job: Job,
        *,
        mailbox: Any,
        workers: Workers,
        use_gpu: bool,
        at_once: int = 1,
        loop: Callable[[dict[str, Any]], Any] = train_worker,
    ) -> Any:
        """Runs the job to its end, recovering from lost workers. Returns what `loop` returned on the first worker. If the fewest
        and most `workers` differ, it uses as many as there is room for. `at_once` is the number of such calls in parallel.

        Raises UserError if the training itself fails.
        """
        together = workers.most > 1 or not own_ray()
        with self._lock:
            crew = self._crew(mailbox, workers, job.threads, job.storage, use_gpu, at_once)
            (rank,) = crew.seat(together=together) or (None,)
            crew.busy.add(rank)
        try:
            return crew.train(job, rank, mailbox=mailbox, loop=loop)
        finally:
            with self._lock:
                crew.busy.discard(rank)

    def expect(self, *, mailbox: Any, workers: Workers, at_once: int) -> None:
        """Announces such trainings. Workers that hold no CPU or GPU are started now, in the background."""
        with self._lock:
            if own_ray():
                self._crew(mailbox, workers, 1, "", False, at_once)

    def rest(self) -> None:
        """The trainings of a stage are over: ends the crews that hold CPUs or GPUs."""
        with self._lock:
            resting = [crew for crew in self._there() if crew.shape.holds]
            self._crews = [crew for crew in self._crews if crew not in resting]
        for crew in resting:
            crew.close()

    def dismiss(self) -> None:
        """Ends all crews at once: Ray is about to be shut down, and no thread may be within a call to it."""
        with self._lock:
            going, self._crews = self._there(), []
        end = time.monotonic() + 20
        while any(not crew.ended for crew in going) and time.monotonic() < end:
            with suppress(Exception):
                abort(kill=True)  # repeated, as a controller may have just started
            time.sleep(0.05)
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _there(self) -> list[Crew]:
        self._crews = [crew for crew in self._crews if not crew.ended]
        return self._crews

    def _crew(self, orders: Any, workers: Workers, threads: int, storage: str, use_gpu: bool, at_once: int) -> Crew:
        """A crew with free workers for such a training, or a new one."""
        own = own_ray()
        holds, together = use_gpu or not own, workers.most > 1 or not own
        if not holds:
            self._scratch = self._scratch or tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            threads, storage = 1, self._scratch.name
        new = Shape(workers if together else Workers(at_once, at_once), use_gpu, threads, storage, holds)
        for crew in self._there():
            has = crew.shape.workers
            enough = has == workers if together else has.fixed and has.most >= at_once
            if enough and crew.shape == replace(new, workers=has) and crew.seat(together=together) is not None:
                return crew
        crew = Crew(new, orders)
        self._crews.append(crew)
        before_shutdown(self.dismiss)
        return crew


CREWS = Crews()
train = CREWS.train


def abort(*, kill: bool = False) -> None:
    """Ends the trainings of this driver at once: `train` raises in its threads. By default a controller ends its workers first.
    `kill` is for one that hangs because it waits for resources. Ray has no public call for either.
    """
    import ray

    from workflows.private.ray import actors_of_this_driver
    from workflows.private.ray_train import CONTROLLERS

    for controller in actors_of_this_driver(*CONTROLLERS):
        ray.kill(controller) if kill else controller.abort.remote()
