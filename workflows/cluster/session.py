"""A run's Ray session: joins the cluster that addresses.py found, or starts one on this machine for the length of the run."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from workflows.cluster.addresses import explained, find_place, ray_folder
from workflows.cluster.check import possible
from workflows.cluster.orphans import end_orphans, noted
from workflows.cluster.stopping import deferred_signals, hangups_kept_from_children
from workflows.errors import UserError
from workflows.storage.s3 import shared_environment

QUIET = {
    # How often Ray Train checks whether its workers live; by default every 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # Workers may be requested on a lost node that Ray has not missed yet. The next attempt counts the nodes again.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's output; the old one is silent at verbosity 0
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # raylets print long coloured texts to stdout; events.py reports them in one line
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # combines the runtime_env that a job was submitted with and ours
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


OWN = "mmdistill"
"""A resource of a Ray that we start. Workers that hold no CPU request it, because Ray Train wants them to request something."""
_own = False


def own_ray() -> bool:
    """Whether this process started its Ray, on this machine and for itself alone."""
    return _own


@contextmanager
def ray_session(
    *, cpus: int | None = None, say: Callable[[str], None] = lambda text: None
) -> Iterator[dict[str, float]]:
    """Ray for the length of the block; yields its resources (`room`). A cluster that ran before is left running. `cpus`:
    always start a Ray, with that many CPUs. `say` shows a line if the cluster may not be the one that the user expects.

    Raises ConfigError or UserError if there is no usable Ray.
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
    if place.notice:
        say(f"ray: {place.notice}")
    with ExitStack() as stack:
        if place.own:
            if ended := end_orphans(ray_folder()):
                say(f"ray: ended {ended} processes that a killed run had left")
            stack.enter_context(noted(ray_folder()))
            # Ray's processes inherit this environment. Passed in runtime_env, it would make each of them start Python twice.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # this machine is not preempted
            options |= {"include_dashboard": False, "num_cpus": cpus, "object_store_memory": 512 * 1024**2}
            options["resources"] = {OWN: 1}
        else:
            options["runtime_env"] = {"env_vars": {name: os.environ[name] for name in QUIET} | shared_environment()}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with hangups_kept_from_children():
                ray.init(place.address, **options)
            if callable(handler) and threading.current_thread() is threading.main_thread():
                # Ray replaced it by one that ends the process with exit code 15.
                signal.signal(signal.SIGTERM, handler)
        except Exception as error:  # Ray raises bare Exceptions too
            raise explained(error, place) from error
        _own = place.own
        try:
            yield room()
        finally:
            with deferred_signals():  # if interrupted here, Ray ends the process itself, with exit code 1
                while _before_shutdown:
                    _before_shutdown.pop()()
                _own = False
                ray.shutdown()


_before_shutdown: list[Callable[[], None]] = []


def before_shutdown(call: Callable[[], None]) -> None:
    """Registers a call that is made once, before Ray is shut down."""
    if call not in _before_shutdown:
        _before_shutdown.append(call)


def room() -> dict[str, float]:
    """The resources that the cluster has, or could have once its autoscaler has added all nodes that it may."""
    import ray

    from workflows.private.ray import most_resources

    # On a cluster started by `ray up`, Ray does not report the latter; the cluster's file has it.
    there, most = ray.cluster_resources(), most_resources() or possible()
    return {name: max(there.get(name, 0.0), float(most.get(name, 0))) for name in {*there, *most}}


def present() -> dict[str, float]:
    """The resources that the cluster has now."""
    import ray

    there: dict[str, float] = ray.cluster_resources()
    return there


def groups() -> set[str]:
    """The names of this driver's placement groups, with which Ray reserves CPUs and GPUs for it."""
    import ray
    from ray.util.placement_group import placement_group_table

    job = ray.get_runtime_context().get_job_id()  # the names of its groups end with it
    return {
        name for name, group in placement_group_table().items() if name.endswith(job) and group["state"] != "REMOVED"
    }


def let_go(names: set[str]) -> None:
    """Removes these placement groups. Without its dashboard, Ray keeps those of a dead controller as long as the driver lives."""
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for name in names:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))


def fits_a_machine(needs: dict[str, float], room: dict[str, float]) -> bool:
    """Whether one machine can have all of `needs`. Ray does not report the size of machines that the autoscaler may still add, so
    while there may be more, the answer is yes.
    """
    import ray

    there = ray.cluster_resources()
    if any(have > there.get(name, 0.0) for name, have in room.items() if needs.get(name)):
        return True
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any(all(machine.get(name, 0.0) >= need for name, need in needs.items()) for machine in machines)


@dataclass(frozen=True)
class Workers:
    """The workers of one training. It can begin and continue with `fewest`, and grows to `most` as there is room."""

    fewest: int
    most: int

    @classmethod
    def of(cls, text: str | int) -> Workers:
        """Parses "8" or "2:8". Raises ValueError."""
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


def require(resources: dict[str, float], *, cpus: float, gpus: float = 0) -> None:
    """Raises UserError if the cluster can't have that many CPUs and GPUs: Ray would wait for them for ever."""
    for name, need, less in (("CPU", cpus, "fewer --workers"), ("GPU", gpus, "fewer --workers, or --no-gpu")):
        if need > resources.get(name, 0):
            raise UserError(
                f"workers: {need:g} {name}s are needed at once, the cluster can have {resources.get(name, 0):g}",
                hint=f"give {less}, or start a larger cluster and name it in RAY_ADDRESS",
            )


def task_options(*, use_gpu: bool) -> dict[str, Any]:
    """Ray's options for a task that computes: one CPU, and with `use_gpu` one GPU.

    Processes are reused, and so keep their models; by default a process with a GPU would end with its task. Its next task may get
    another GPU than the one that its CUDA was initialised with. So Ray is told to leave CUDA_VISIBLE_DEVICES alone, and
    `device_of_task` gives the GPU.
    """
    options: dict[str, Any] = {"num_cpus": 1, "max_retries": 3}
    if use_gpu:
        apart = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
        options |= {"num_gpus": 1, "max_calls": 0, "runtime_env": apart}
    return options


def device_of_task(kind: str) -> str:
    """For use within a task: "cpu" for "cpu"; for "cuda" the torch name of the GPU that Ray gave to the task."""
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
) -> None:
    """Runs the jobs in threads, at most `at_once` at a time. The calling thread meanwhile calls `tick()`, and `done(i)` after job
    i. Raises the first error, after `done` was called for the jobs that had ended before it.
    """
    ended: queue.SimpleQueue[tuple[int, BaseException | None]] = queue.SimpleQueue()
    waiting, left = iter(range(len(jobs))), len(jobs)

    def work(i: int) -> None:
        try:
            jobs[i]()
            ended.put((i, None))
        except BaseException as error:
            ended.put((i, error))

    def start(count: int) -> None:
        for i in islice(waiting, count):
            threading.Thread(target=work, args=(i,), daemon=True).start()

    start(at_once)
    while left:
        tick()
        try:
            i, error = ended.get(timeout=0.2)
        except queue.Empty:
            continue
        if error is None:
            start(1)
        tick()
        if error is not None:
            raise error
        done(i)
        left -= 1
