"""Ray itself: joins the cluster that RAY_ADDRESS names, or starts one on this machine for the length of a run (addresses.py)."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from workflows.cluster.addresses import explained, find_place, ray_folder
from workflows.cluster.check import possible
from workflows.cluster.mailbox import Mailbox
from workflows.cluster.orphans import end_orphans, noted
from workflows.cluster.stopping import hangups_kept_from_children, heard_later
from workflows.errors import UserError
from workflows.storage.s3 import told

QUIET = {
    # Ray Train looks so often whether its workers live; by default every 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # Workers are first asked for on a node that is gone and not yet missed; the next try counts the nodes anew.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own screen; the old one is silent at verbosity 0
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # what a raylet has to say at length, in colours, on stdout: events.py tells it in a line
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # what a job was submitted with, and ours beside it
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


OWN = "mmdistill"
"""A resource of a Ray of our own, which workers that hold no CPU ask for: Ray Train wants them to ask for something."""
_own = False


def own_ray() -> bool:
    """Whether this process started its Ray, of this machine alone, for itself alone."""
    return _own


@contextmanager
def ray_session(
    *, cpus: int | None = None, say: Callable[[str], None] = lambda text: None
) -> Iterator[dict[str, float]]:
    """Ray for the length of the block; gives the `room` there is. A cluster that was there before is left running. `cpus`: of one
    that is started in any case. `say` shows a line where it may be another Ray than the user thinks of.

    Raises ConfigError or UserError where there is none to be had.
    """
    global _own
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        yield room()
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    place = find_place(own=cpus is not None)
    if place.said:
        say(f"ray: {place.said}")
    with ExitStack() as stack:
        if place.own:
            if ended := end_orphans(ray_folder()):
                say(f"ray: {ended} processes that a killed run had left were ended")
            stack.enter_context(noted(ray_folder()))
            # Its processes have the environment of this one: to be told it again would cost each another start of Python.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # this machine is not taken from itself
            options |= {"include_dashboard": False, "num_cpus": cpus, "object_store_memory": 512 * 1024**2}
            options["resources"] = {OWN: 1}
        else:
            options["runtime_env"] = {"env_vars": {name: os.environ[name] for name in QUIET} | told()}
        heard = signal.getsignal(signal.SIGTERM)
        try:
            with hangups_kept_from_children():
                ray.init(place.address, **options)
            if callable(heard) and threading.current_thread() is threading.main_thread():
                # Ray has put its own in its place, which ends the process with exit code 15.
                signal.signal(signal.SIGTERM, heard)
        except Exception as error:  # Ray raises bare ones too
            raise explained(error, place) from error
        _own = place.own
        try:
            yield room()
        finally:
            with heard_later():  # cut short, Ray ends the process by itself, with exit code 1
                while _before_shutdown:
                    _before_shutdown.pop()()
                _own = False
                ray.shutdown()


_before_shutdown: list[Callable[[], None]] = []


def before_shutdown(call: Callable[[], None]) -> None:
    """Is called before Ray is shut down, once."""
    if call not in _before_shutdown:
        _before_shutdown.append(call)


def room() -> dict[str, float]:
    """What the cluster has, or could have once its autoscaler has added all nodes that it may."""
    import ray
    from ray._private.state import state

    # Nothing in open Ray tells its state: on a cluster of `ray up` the answer is None.
    there, most = ray.cluster_resources(), state.get_max_resources_from_cluster_config() or possible()
    return {name: max(there.get(name, 0.0), float(most.get(name, 0))) for name in {*there, *most}}


def present() -> dict[str, float]:
    """What the cluster has now."""
    import ray

    there: dict[str, float] = ray.cluster_resources()
    return there


def groups() -> set[str]:
    """Names of the placement groups of this driver, by which Ray holds CPUs and GPUs for it."""
    import ray
    from ray.util.placement_group import placement_group_table

    own = ray.get_runtime_context().get_job_id()  # with it end the names of its groups
    return {
        name for name, group in placement_group_table().items() if name.endswith(own) and group["state"] != "REMOVED"
    }


def let_go(names: set[str]) -> None:
    """Gives back what these placement groups hold: without its dashboard, Ray keeps those of a dead controller for as long as the
    driver is there.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for name in names:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))


def fits_a_machine(needs: dict[str, float], room: dict[str, float]) -> bool:
    """Whether some machine has all of it together. Of those that may yet come Ray does not tell what each has: one of them may."""
    import ray

    there = ray.cluster_resources()
    if any(have > there.get(name, 0.0) for name, have in room.items() if needs.get(name)):
        return True
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any(all(machine.get(name, 0.0) >= need for name, need in needs.items()) for machine in machines)


@dataclass(frozen=True)
class Workers:
    """Of one training: with `fewest` it may begin and go on, and it grows to `most` as there is room."""

    fewest: int
    most: int

    @classmethod
    def of(cls, text: str | int) -> Workers:
        """Of "8", or of "2:8". Raises ValueError."""
        fewest, colon, most = str(text).partition(":")
        workers = cls(int(fewest), int(most if colon else fewest))
        if not 1 <= workers.fewest <= workers.most:
            raise ValueError(text)
        return workers

    @property
    def fixed(self) -> bool:
        return self.fewest == self.most

    def __str__(self) -> str:
        return str(self.most) if self.fixed else f"{self.fewest}:{self.most}"


class Monitor:
    """The driver's end of a `Mailbox`, an actor of no weight."""

    def __init__(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Beside the driver: Ray would as soon put it on a machine that goes away, and the run with it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor: Any = ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote()

    def stop(self) -> None:
        """Asks the workers of all trainings for a checkpoint each, and to end there."""
        self.actor.stop.remote()

    def drain(self) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
        import ray

        out: tuple[list[tuple[str, dict[str, Any]]], list[str]] = ray.get(self.actor.drain.remote())
        return out


def require(resources: dict[str, float], *, cpus: float, gpus: float = 0) -> None:
    """Raises UserError where Ray would wait for ever."""
    for name, need, less in (("CPU", cpus, "fewer --workers"), ("GPU", gpus, "fewer --workers, or --no-gpu")):
        if need > resources.get(name, 0):
            raise UserError(
                f"workers: {need:g} {name}s are needed at once, the cluster can have {resources.get(name, 0):g}",
                hint=f"give {less}, or start a larger cluster and name it in RAY_ADDRESS",
            )


def task_options(*, use_gpu: bool) -> dict[str, Any]:
    """What Ray is to give a task that computes: a CPU, or a GPU beside it. Processes are used again, and so keep their models; by
    default one with a GPU would end with its task. The next time it may be given another GPU than its CUDA began with, so that Ray
    is told to leave CUDA_VISIBLE_DEVICES alone, and `device_of_task` tells which one it is.
    """
    options: dict[str, Any] = {"num_cpus": 1, "max_retries": 3}
    if use_gpu:
        apart = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
        options |= {"num_gpus": 1, "max_calls": 0, "runtime_env": apart}
    return options


def device_of_task(kind: str) -> str:
    """Within a task: "cpu" for "cpu", and for "cuda" the GPU that Ray gave it, as torch names it."""
    if kind == "cpu":
        return kind
    import ray

    (gpu,) = ray.get_gpu_ids()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"cuda:{visible.split(',').index(str(gpu)) if visible else gpu}"


def run_together(
    jobs: list[Callable[[], None]],
    *,
    at_once: int,
    tick: Callable[[], None],
    done: Callable[[int], None],
    interval: float = 0.2,
) -> None:
    """Calls the jobs in threads, at most `at_once` of them. Meanwhile, in the calling thread: `tick()`, and `done(i)` after
    job i. The first error is raised, once the jobs that had ended before it are done.
    """
    ended: queue.SimpleQueue[tuple[int, BaseException | None]] = queue.SimpleQueue()
    slots, stop = threading.Semaphore(at_once), threading.Event()

    def work(i: int) -> None:
        with slots:
            if stop.is_set():
                return
            try:
                jobs[i]()
                ended.put((i, None))
            except BaseException as error:
                stop.set()
                ended.put((i, error))

    for i in range(len(jobs)):
        threading.Thread(target=work, args=(i,), daemon=True).start()
    left = len(jobs)
    try:
        while left:
            tick()
            try:
                i, error = ended.get(timeout=interval)
            except queue.Empty:
                continue
            tick()
            if error is not None:
                raise error
            done(i)
            left -= 1
    except BaseException:
        stop.set()  # those that wait for their turn do not begin
        raise
