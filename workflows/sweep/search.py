"""The search of a sweep, for Ray Tune: whenever there is room, it gives the next point of the largest k that has one left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ray.tune.search import Searcher

from workflows.sweep.space import Domain, Point

Config = dict[str, Any]


class Source(Protocol):
    """The points of one k. Each comes with a ticket, under which its distance is reported back, or None if it has none."""

    def next(self) -> tuple[Any, Point] | None: ...

    def report(self, ticket: Any, distance: float | None) -> None: ...


class Listed:
    """Points that are known in advance."""

    def __init__(self, points: list[Point]) -> None:
        self._points = iter(points)

    def next(self) -> tuple[Any, Point] | None:
        return next(((None, point) for point in self._points), None)

    def report(self, ticket: Any, distance: float | None) -> None:
        pass


class Tpe:
    """Optuna's TPE: suggests each point from the distances of those before it. `begun` holds the points of an earlier run of the
    sweep, which come first, in their order. The seed determines the rest.
    """

    def __init__(self, k: int, fields: dict[str, Domain], trials: int, *, seed: int, begun: list[Point]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._k, self._left = k, trials
        self._fixed = {name: d.values[0] for name, d in fields.items() if len(d.values) == 1}
        self._fields = {name: d for name, d in fields.items() if name not in self._fixed}
        self._distributions = {name: _distribution(d) for name, d in self._fields.items()}
        first = max(2, min(10, trials // 3))
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=first))
        for point in begun[:trials]:
            self._study.enqueue_trial({name: _inward(d, point[name]) for name, d in self._fields.items()})

    def next(self) -> tuple[Any, Point] | None:
        if not self._left:
            return None
        self._left -= 1
        trial = self._study.ask(self._distributions)
        drawn = {name: _outward(self._fields[name], value) for name, value in trial.params.items()}
        return trial, {"k": self._k} | self._fixed | drawn

    def report(self, ticket: Any, distance: float | None) -> None:
        from optuna.trial import TrialState

        self._study.tell(ticket, distance, state=TrialState.FAIL if distance is None else TrialState.COMPLETE)


def _distribution(domain: Domain) -> Any:
    from optuna import distributions as d

    if domain.law == "choice":
        return d.CategoricalDistribution(list(range(len(domain.values))))
    low, high, *step = domain.values
    if domain.law == "randint":
        return d.IntDistribution(low, high - 1)
    return d.FloatDistribution(low, high, log=domain.law == "loguniform", step=step[0] if step else None)


def _inward(domain: Domain, value: Any) -> Any:
    """A field's value as Optuna takes it. A value of a list becomes its index, since it may be of any type."""
    return domain.values.index(value) if domain.law == "choice" else value


def _outward(domain: Domain, value: Any) -> Any:
    return domain.values[value] if domain.law == "choice" else value


class Search(Searcher):
    """
    offer     point -> the configuration of a new trial; for an existing trial its distance, or None while it has none
    may_begin k -> whether trials of that k may begin
    crashed   takes the name of a trial that an error ended
    """

    def __init__(
        self,
        sources: dict[int, Source],
        *,
        offer: Callable[[Point], Config | float | None],
        may_begin: Callable[[int], bool],
        crashed: Callable[[str], None],
    ) -> None:
        super().__init__(metric="score", mode="min")
        self._sources, self._offer, self._may_begin, self._crashed = sources, offer, may_begin, crashed
        self._configs = self._all()
        self._first: Config | None = None
        self._tickets: dict[str, Any] = {}  # by the trial's name
        self._running: dict[str, Config] = {}

    def begin(self) -> bool:
        """Whether there is anything to run."""
        self._first = next((config for config in self._configs if config is not None), None)
        return self._first is not None

    def _all(self) -> Iterator[Config | None]:
        """The trials to run, or None while those that are left may not begin yet."""
        for k, source in self._sources.items():
            while not self._may_begin(k):
                yield None
            while (following := source.next()) is not None:
                ticket, point = following
                offered = self._offer(point)
                if isinstance(offered, dict):
                    self._tickets[offered["name"]] = ticket
                    yield offered
                else:
                    source.report(ticket, offered)

    def suggest(self, trial_id: str) -> Config | None:
        config, self._first = (self._first, None) if self._first else (next(self._configs, {}), None)
        if config is None:
            return None
        if not config:
            return Searcher.FINISHED  # type: ignore[return-value]  # Ray's convention
        self._running[trial_id] = config
        return config

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        config = self._running.pop(trial_id)
        if error:
            self._crashed(config["name"])
        ticket = self._tickets.pop(config["name"])
        self._sources[config["k"]].report(ticket, None if error or not result else result["score"])

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune saves this state, but a sweep never restores it."""
        return {}
