"""Rollouts from an Atropos API: one batch an update. It tells an API that is down from one that forgot this run and
one that is silent, and says which."""

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from atropos_exp.errors import SourceUnavailable
from atropos_exp.interfaces import JSON
from atropos_exp.parts.atropos.client import ApiDown, ApiLost, BatchLost, Registration
from atropos_exp.parts.atropos.intake import Intake
from atropos_exp.parts.atropos.launch import Programs
from atropos_exp.parts.atropos.registration import ForeignRun, register
from atropos_exp.parts.atropos.settings import AtroposSettings
from atropos_exp.parts.atropos.stall import Stall
from atropos_exp.parts.atropos.waiting import Wait, dropped_groups
from atropos_exp.processes import stopping
from atropos_exp.types import Dropped, RolloutGroup

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between two requests for a batch
PATIENCE = 6  # the pause is the wait so far divided by this: a batch lies ready for a twelfth of the wait on average
WATCH_SECONDS = 5.0  # between checks of the engine while waiting
HOPELESS_SECONDS, HOPELESS_REQUESTS = 20.0, 8  # a wait in which every request was too long ends after so many of both
PROBE_SECONDS = 1.0  # between checks of an API that was given up
MAX_ENVIRONMENTS = 256  # that an explanation looks at


class AtroposSource:
    """A `RemoteSource` for rank 0."""

    def __init__(
        self,
        settings: AtroposSettings,
        programs: Programs,
        *,
        falls_back: bool,
        registration: Callable[[int], Registration],
        intake: Intake,
        watch: Callable[[], None],
        gateway_counters: Callable[[], Mapping[str, float]],
        evaluations: Callable[[], Mapping[str, float]],
        refusals: Callable[[], Mapping[str, str]],
        group_size: int,
        run_folder: Path,
    ) -> None:
        """`registration(step)` is what to register with when `step` is trained next. `watch` raises if waiting is
        pointless, for instance because the engine died. `gateway_counters` are metrics of the gateway, `evaluations`
        those that environments measured since they were last asked for, and `refusals` what the gateway told the first
        request of each kind that it refused.

        The first batch is waited for `start_timeout` seconds, since programs may still be starting, and later ones
        `data_timeout`. With `falls_back`, local rollouts replace the API while it is gone: then an outage is waited out
        for `timeout` only, and an API that was not there at the start not at all.
        """
        self._client = programs.client
        self._registration = registration
        self._intake = intake
        self._supervisor = programs.supervisor
        self._watch = watch
        self._gateway_counters = gateway_counters
        self._evaluations = evaluations
        self._refusals = refusals
        self._run_folder = run_folder
        self._group_size = group_size
        first = settings.start_timeout if programs.is_up else (0.0 if falls_back else settings.data_timeout)
        outage = settings.timeout if falls_back else settings.data_timeout
        self._timeouts = {"first": first, "outage": outage, "data": settings.data_timeout}
        self._take_over = settings.take_over
        self._batches: list[list[RolloutGroup]] = []  # oldest weights first
        self._connected = False
        self._api_step = 0
        self._phase = "first"  # first | outage | data: which of the deadlines runs
        self._since: float | None = None  # when it began
        self._next_watch = self._next_probe = 0.0
        self._counters: Counter[str] = Counter()
        self._lost_to = ""  # why the last batch was lost

    def take(self, num_groups: int, *, step: int) -> tuple[list[RolloutGroup], Dropped]:
        """The groups of one batch, whatever their number. Raises SourceUnavailable when a deadline passes.

        Raises ForeignRun, a UserError, if another run has the API when this one starts; later it counts as an outage.
        """
        if self._since is None or self._phase == "data":
            self._since = time.monotonic()
        wait = Wait(step, self._run_folder, self._totals())
        while not (groups := self._next(step)):
            reason = self._ask(step, refuse_foreign=self._phase == "first")
            if self._batches:
                continue
            if time.monotonic() >= self._next_watch:
                self._watch()
                self._next_watch = time.monotonic() + WATCH_SECONDS
                wait.tell(log.warning, partial(self._why, reason, wait), self._totals(), self._intake.dropped_rollouts)
            try:
                self._give_up_in_time(step, reason, wait)
            except SourceUnavailable:
                wait.tell(log.warning, str, self._totals(), self._intake.dropped_rollouts)
                raise
            pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, wait.seconds / PATIENCE))
            stopping.sleep(pause * random.uniform(0.75, 1.25))
        wait.end()
        self._phase = "data"
        dropped = Dropped(reasons=dict(self._intake.dropped_rollouts))
        self._intake.dropped_rollouts.clear()
        return groups, dropped

    def _next(self, step: int) -> list[RolloutGroup]:
        """The oldest batch at hand, less what has grown too old by now; [] without one."""
        while self._batches:
            if groups := self._intake.not_stale(self._batches.pop(0), policy_version=step - 1):
                return groups
        return []

    def _give_up_in_time(self, step: int, reason: str | None, wait: Wait) -> None:
        """Raise SourceUnavailable if the deadline has passed, or if nothing can come."""
        assert self._since is not None
        if time.monotonic() - self._since > self._timeouts[self._phase]:
            raise SourceUnavailable(self._why(reason, wait))
        if problem := self._supervisor.problem():
            raise SourceUnavailable(problem)
        if self._phase == "first" and wait.seconds > HOPELESS_SECONDS and not self._counters["batches"]:
            counted = self._gateway_counters()
            if not counted.get("gateway/completions") and counted.get("gateway/refused_length", 0) >= HOPELESS_REQUESTS:
                raise SourceUnavailable(self._why(reason, wait))

    def _why(self, reason: str | None, wait: Wait) -> str:
        return reason or self._explain(wait)

    def is_ready(self, *, step: int) -> bool:
        """Whether a batch is at hand, after at most one request to the API. Failures of the API raise nothing."""
        if not self._batches and time.monotonic() >= self._next_probe:
            self._next_probe = time.monotonic() + PROBE_SECONDS
            self._ask(step)
        return bool(self._batches)

    def connect(self, *, step: int) -> str | None:
        """Register now, so that environments can register too. Return None, or why it failed. Raises ForeignRun, a
        UserError, if another run has the API."""
        try:
            self._connect(step)
        except ApiDown as error:
            return str(error)
        return None

    def counters(self) -> Mapping[str, float]:
        totals = self._totals() + self._supervisor.counters
        return {f"atropos/{name}": float(value) for name, value in totals.items()} | {
            "atropos/api_step": float(self._api_step),
            **self._gateway_counters(),
            **self._evaluations(),
        }

    def _totals(self) -> Counter[str]:
        return self._counters + self._intake.counters

    def state(self) -> JSON:
        return {}  # the API keeps no position that could be returned to

    def restore(self, state: JSON) -> None: ...

    def _ask(self, step: int, *, refuse_foreign: bool = False) -> str | None:
        """Try once to get a batch into `_batches`. Return None if the API works, else what is wrong with it."""
        try:
            if not self._connected:
                self._connect(step)
            self._fetch(step)
        except (ApiDown, ForeignRun) as error:
            if refuse_foreign and isinstance(error, ForeignRun):
                raise
            self._lose(str(error))
            return str(error)
        except ApiLost as error:
            self._lose(f"the Atropos API at {self._client.url} has forgotten this run ({error})")
            self._counters["registrations_lost"] += 1
            self._supervisor.restart_environments("its API has forgotten it")
            return f"the Atropos API at {self._client.url} had forgotten this run and has sent nothing since"
        except BatchLost as error:
            self._counters["lost_batches"] += 1
            self._lost_to = str(error)
            if (lost := self._counters["lost_batches"]) & (lost - 1) == 0:  # 1, 2, 4, 8, …
                log.warning("a batch from Atropos is lost, number %d: %s", lost, error)
            if self._is_forgotten():
                self._lose(str(error))
        return None

    def _connect(self, step: int) -> None:
        self._client.check()
        registration = self._registration(step)
        how = register(self._client, registration, take_over=self._take_over)
        if how == "reset":
            self._supervisor.restart_environments("its API was reset")
        self._counters["registrations"] += 1
        self._connected = True
        self._api_step = self._client.status()[0]
        log.info("registered with Atropos at %s (%s), step %d", self._client.url, how, self._api_step)
        self._fetch(step)  # only after a trainer asks for a batch does the API let environments in

    def _fetch(self, step: int) -> None:
        """Fetch all batches that the API has formed. When it has none, it forms as many as its queue allows and hands
        out the newest first; so all are fetched, and sorted by age."""
        before = self._api_step
        batch = self._client.batch(self._intake.read)
        if batch is None:
            return
        batches = [batch]
        try:
            self._api_step = self._client.status()[0]
            if self._api_step < before:
                raise ApiLost(f"its step went back from {before} to {self._api_step}")
            while len(batches) < self._api_step - before and (another := self._client.batch(self._intake.read)):
                batches.append(another)
        finally:  # what has arrived is used, whatever became of the rest
            self._counters["batches"] += len(batches)
            accepted = [self._intake.accept(batch, policy_version=step - 1) for batch in batches]
            self._batches += [groups for groups in accepted if groups]
            self._batches.sort(key=_mean_version)

    def _lose(self, reason: str) -> None:
        self._connected = False
        if self._phase == "data":
            log.warning("%s", reason)
            self._phase, self._since = "outage", time.monotonic()
            self._counters["outages"] += 1

    def _is_forgotten(self) -> bool:
        try:
            return self._client.registered().nobody
        except ApiDown:
            return True

    def _explain(self, wait: Wait) -> str:
        happened = wait.happened(self._totals())
        registration = self._registration(0)
        try:
            queued = self._client.status()[1]
            environments: list[Mapping[str, Any]] = []
            while len(environments) < MAX_ENVIRONMENTS and (one := self._client.environment(len(environments))):
                environments.append(one)
        except ApiDown as error:
            return str(error)
        return Stall(
            seconds=wait.seconds,
            num_lost=happened["lost_batches"],
            lost_to=self._lost_to,
            num_received=happened["groups_received"],
            dropped=dropped_groups(happened),
            examples=self._intake.examples,
            gateway=self._gateway_counters(),
            refusals=self._refusals(),
            errors=self._supervisor.errors(),
            batch_size=registration.batch_size,
            group_size=self._group_size,
            queued_groups=queued,
            num_environments=len(environments),
            has_minimum=any(one["unallocated_fraction"] < 1 for one in environments),
            silent=[number for number, one in enumerate(environments) if one["self_queue_size"] == 0],
            services=self._supervisor.state(),
            logs=self._supervisor.logs(),
            max_token_len=registration.max_token_len,
        ).explain()


def _mean_version(groups: list[RolloutGroup]) -> float:
    return float(np.mean([rollout.policy_version for group in groups for rollout in group.rollouts]))
