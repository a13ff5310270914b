"""Keeps the API and the environments of a run alive: restarts them with growing pauses, and gives up in the end.

An environment ends by itself when its API restarts or is reset, so it is started again; the API keeps a dead
environment's share of every batch until it is deregistered, so it is.
"""

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from atropos_exp.errors import UserError
from atropos_exp.parts.atropos.client import ApiDown, AtroposClient
from atropos_exp.parts.atropos.trouble import first_error
from atropos_exp.processes.child import Child

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
PROBE_SECONDS = 0.5  # between checks whether a starting environment has registered
REGISTER_SECONDS = 120.0  # that a starting environment may keep the next one waiting
LONGEST_BACKOFF = 30.0
STOP_GRACE_SECONDS = 2.0  # that an environment has to end by itself
HEALTHY_SECONDS = 60.0  # after which earlier deaths no longer count


@dataclass(kw_only=True, eq=False)
class SupervisedProgram:
    """One program and its state, which only the supervisor changes."""

    name: str
    launch: Callable[[], Child]
    is_api: bool = False
    child: Child | None = None
    started: float = 0.0
    not_before: float = 0.0  # earliest time of the next start
    num_deaths: int = 0  # in a row
    env_id: int | None = None  # an environment's number at the API, once it has registered
    problem: str | None = None  # why it is not started again

    @property
    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self.child is not None and self.child.poll() is None


class ProgramSupervisor:
    """Owns the programs of a run. From `start` to `stop` a thread watches over them."""

    def __init__(self, client: AtroposClient, *, max_restarts: int, backoff_seconds: float = 1.0) -> None:
        """A program is given up after `max_restarts` restarts in a row without a healthy minute in between."""
        self._client = client
        self._max_restarts = max_restarts
        self._backoff_seconds = backoff_seconds
        self._services: list[SupervisedProgram] = []
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._next_env_id = 0
        self._last_probe = 0.0
        self._api_answers = False
        self.counters: Counter[str] = Counter()

    def add(self, service: SupervisedProgram) -> None:
        """Supervise `service` too. To be called before `start`."""
        self._services.append(service)

    def start(self) -> None:
        """Begin to start and watch the programs, in a thread."""
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End every program, environments first, and deregister them. A second call does nothing."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=30.0)
        with self._lock:
            for service in sorted(self._services, key=lambda service: service.is_api):
                if service.child is not None:
                    service.child.stop(0.0 if service.is_api else STOP_GRACE_SECONDS)
                    self._disconnect(service)

    def problem(self) -> str | None:
        """Why waiting is pointless: the API or every environment has been given up. None otherwise."""
        with self._lock:
            apis = [service.problem for service in self._services if service.is_api]
            environments = [service.problem for service in self._services if not service.is_api]
            for problems in (apis, environments):
                if problems and all(problems):
                    return problems[0]
            return None

    def state(self) -> str:
        """The state of every program in one clause each, for an error message."""
        with self._lock:
            return "; ".join(f"{service.name}: {self._describe(service)}" for service in self._services)

    def restart_environments(self, reason: str) -> None:
        """Restart the environments after the API has forgotten them: each would end at its next request anyway."""
        with self._lock:
            self._next_env_id = 0
            for service in self._services:
                service.env_id = None
                if not service.is_api and service.is_alive:
                    self._plan_restart(service, reason, blame=False)

    def logs(self) -> dict[str, str]:
        """The last lines of each environment's log, by its name."""
        with self._lock:
            return {
                service.name: service.child.log_tail(400)
                for service in self._services
                if service.child is not None and not service.is_api
            }

    def errors(self) -> dict[str, str]:
        """The first error in each environment's log, by its name; those without one are left out."""
        with self._lock:
            logs = {service.name: service.child.log for service in self._services if service.child is not None}
        found = {name: first_error(log) for name, log in logs.items() if name.startswith("environment")}
        return {name: error for name, error in found.items() if error is not None}

    def _run(self) -> None:
        while not self._stopping.wait(POLL_SECONDS):
            with self._lock:
                self.look()

    def look(self) -> None:
        """One round: notice deaths and registrations, and start what is due."""
        for service in self._services:
            if service.child is not None and not service.is_alive:
                self._note_death(service)
        self._note_registration()
        starting = any(self._is_registering(service) for service in self._services)
        for service in self._services:
            if service.child is not None or service.problem is not None or time.monotonic() < service.not_before:
                continue
            # One environment at a time, so that the number that appears at the API next is known to be its.
            if service.is_api or (not starting and self._answers()):
                self._start(service)
                starting = starting or not service.is_api

    def _start(self, service: SupervisedProgram) -> None:
        try:
            service.child = service.launch()
            service.started = time.monotonic()
        except UserError as error:  # it cannot be started at all
            service.problem = f"{service.name} {error}"
            log.error("%s", service.problem)

    def _note_death(self, service: SupervisedProgram) -> None:
        assert service.child is not None
        code, healthy = service.child.poll(), time.monotonic() - service.started > HEALTHY_SECONDS
        service.num_deaths = 1 if healthy else service.num_deaths + 1
        # An environment whose API is gone ends through no fault of its own.
        blame = service.is_api or self._answers()
        self._disconnect(service)
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        self._plan_restart(service, how, blame=blame)
        if service.is_api:
            self._api_answers = False
            self.restart_environments("its API has ended")

    def _plan_restart(self, service: SupervisedProgram, reason: str, *, blame: bool) -> None:
        assert service.child is not None
        if not blame:
            service.num_deaths = max(0, service.num_deaths - 1)
        if service.num_deaths > self._max_restarts:
            error = first_error(service.child.log)
            service.problem = (
                f"{service.name} {reason}, {service.num_deaths} times in a row (atropos.max_restarts="
                f"{self._max_restarts}), so it is not started again; "
                + (f"its first error: {error}; " if error else "")
                + service.child.state()
            )
            log.error("%s", service.problem)
            self.counters["services_given_up"] += 1
        else:
            wait = min(LONGEST_BACKOFF, self._backoff_seconds * 2 ** max(0, service.num_deaths - 1))
            log.warning("%s %s; it is started again in %.0f s (log: %s)", service.name, reason, wait, service.child.log)
            self.counters["api_restarts" if service.is_api else "environment_restarts"] += 1
            service.not_before = time.monotonic() + wait
        service.child.stop()
        service.child = None
        service.env_id = None

    def _note_registration(self) -> None:
        service = next((service for service in self._services if self._is_registering(service)), None)
        if service is None or time.monotonic() - self._last_probe < PROBE_SECONDS:
            return
        self._last_probe = time.monotonic()
        with contextlib.suppress(ApiDown):
            if self._client.environment(self._next_env_id) is not None:
                service.env_id = self._next_env_id
                self._next_env_id += 1
                self.counters["environments_registered"] += 1

    def _is_registering(self, service: SupervisedProgram) -> bool:
        """Whether it has started recently and not registered yet, so that the next one should wait."""
        recent = time.monotonic() - service.started < REGISTER_SECONDS
        return not service.is_api and service.is_alive and service.env_id is None and recent

    def _disconnect(self, service: SupervisedProgram) -> None:
        if service.env_id is not None:
            with contextlib.suppress(ApiDown):  # then it has nothing to forget
                self._client.disconnect(service.env_id)
            service.env_id = None

    def _answers(self) -> bool:
        ask = self._client.status if self._api_answers else self._client.check
        try:
            ask()
            self._api_answers = True
        except ApiDown:
            self._api_answers = False
        return self._api_answers

    def _describe(self, service: SupervisedProgram) -> str:
        if service.problem is not None:
            return "given up"
        if service.is_alive:
            assert service.child is not None
            registered = "" if service.is_api else ", registered" if service.env_id is not None else ", not registered"
            return f"process {service.child.pid}{registered}"
        return f"to be started (died {service.num_deaths} times in a row)" if service.num_deaths else "to be started"
