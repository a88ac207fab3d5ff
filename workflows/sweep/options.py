"""The options of a sweep: search, scheduler, number of trials, resources of a trial."""

from __future__ import annotations

from dataclasses import dataclass, replace

from workflows.cluster.session import fits_a_machine
from workflows.errors import ConfigError, UserError
from workflows.sweep.space import Space

SEARCHES, SCHEDULERS = ("grid", "random", "tpe"), ("none", "asha")


@dataclass(frozen=True)
class SweepOptions:
    """
    search      grid, random or tpe; by default grid if every field has a list of values, else random
    scheduler   none, or asha, which stops trials that lag
    trials      in all, shared evenly among the ks; a grid tries all of its points
    warm_start  students of k steps start from the best of 2k steps
    register    the best student of each k goes through the promotion gate
    hours       after which running trials are interrupted; the next sweep resumes them
    cpus, gpus  of each trial
    reporting   trials are measured in the features that report too. Nothing is chosen by them: they are for tables
    """

    search: str | None = None
    scheduler: str = "none"
    trials: int = 16
    warm_start: bool = False
    register: bool = True
    hours: float | None = None
    cpus: float = 1
    gpus: float = 0
    reporting: bool = False


def check_sweep(space: Space, options: SweepOptions) -> SweepOptions:
    """The options with the default search filled in. Raises ConfigError for options that conflict, UserError without Optuna."""
    search = options.search or ("grid" if space.listed else "random")
    for name, value, known in (("--search", search, SEARCHES), ("--scheduler", options.scheduler, SCHEDULERS)):
        if value not in known:
            raise ConfigError(f"{name}: {value!r} is not one of {', '.join(known)}")
    if search == "grid" and not space.listed:
        law = next(f"{f} ({d.law})" for fields in space.of_k.values() for f, d in fields.items() if d.law != "choice")
        raise ConfigError(f"--search: grid tries lists, and {law} is none; take random or tpe")
    if search != "grid" and options.trials < len(space.ks):
        raise ConfigError(f"--trials: {options.trials} are fewer than the {len(space.ks)} values of k")
    if search == "tpe":
        if "seed" in space.fields:
            raise ConfigError("--space: seed: tpe would take it for a setting; give one seed")
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise UserError("--search: tpe needs Optuna", hint="pip install 'mmdistill[sweep]'") from None
    return replace(options, search=search)


def check_room(options: SweepOptions, resources: dict[str, float]) -> None:
    """Raises UserError if no machine of the cluster can hold a trial: Ray would wait for ever."""
    for option, name, need in (("cpus", "CPU", options.cpus), ("gpus", "GPU", options.gpus)):
        if need > (have := resources.get(name, 0)):
            raise UserError(
                f"--{option}-per-trial: a trial asks for {need:g} {name}s, the cluster has {have:g} in all",
                hint="ask for fewer, or start a larger cluster and name it in RAY_ADDRESS",
            )
    if not fits_a_machine({"CPU": options.cpus, "GPU": options.gpus}, resources):
        gpus = f" and {options.gpus:g} GPUs" if options.gpus else ""
        raise UserError(
            f"--cpus-per-trial: a trial asks for {options.cpus:g} CPUs{gpus} of one machine, and none has them",
            hint="ask for fewer, or start a cluster of larger machines and name it in RAY_ADDRESS",
        )
