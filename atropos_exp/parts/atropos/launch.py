"""Starts what `rollout=atropos|auto` needs: finds the API, or launches it and its environments under supervision."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from atropos_exp.parts.atropos.client import ApiDown, AtroposClient
from atropos_exp.parts.atropos.environment import Environment, Facts
from atropos_exp.parts.atropos.script import read_script
from atropos_exp.parts.atropos.settings import AtroposSettings
from atropos_exp.parts.atropos.supervisor import ProgramSupervisor, SupervisedProgram
from atropos_exp.processes.child import Child, child_environment
from atropos_exp.processes.ports import HeldPort

log = logging.getLogger(__name__)

# Environments end when the API has formed this many batches; the trainer decides instead.
UNLIMITED_STEPS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The API that a run uses, and those programs that the run itself started; `supervisor.stop` ends them."""

    client: AtroposClient
    supervisor: ProgramSupervisor
    is_up: bool  # whether the API answered when it was looked for, or is being started


def start_programs(
    settings: AtroposSettings,
    environment: Environment,
    *,
    facts: Facts,
    variables: Mapping[str, str],
    log_folder: Path,
) -> Programs:
    """The API at `settings.api_url` if one answers there; else, if `settings.launch`, a new one with `environment`.

    Returns at once; programs load in the background. `facts.api_url` is filled in here. `variables` are set for the
    environment's processes.
    """
    if settings.api_url is not None:
        client = AtroposClient(settings.api_url, batch_seconds=settings.batch_timeout)
        supervisor = ProgramSupervisor(client, max_restarts=settings.max_restarts)
        try:
            client.check()
            return Programs(client=client, supervisor=supervisor, is_up=True)
        except ApiDown as error:
            if not settings.launch:
                return Programs(client=client, supervisor=supervisor, is_up=False)
            log.warning("%s; an API of this run's own is started instead", error)
            client.close()
    port = HeldPort()  # the API listens on it once it has loaded, and again whenever it is restarted
    client = AtroposClient(f"http://127.0.0.1:{port.number}", batch_seconds=settings.batch_timeout)
    supervisor = ProgramSupervisor(client, max_restarts=settings.max_restarts)
    supervisor.add(SupervisedProgram(name="Atropos API", launch=partial(_start_api, port, log_folder), is_api=True))
    facts = replace(facts, api_url=client.url)
    _warn_of_lengths(environment, facts)
    for number in range(environment.num_processes):
        environment.argv(facts, number)  # raises now if a placeholder does not exist
        name = environment.name if environment.num_processes == 1 else f"{environment.name}_{number}"
        launch = partial(
            _start_environment, environment, facts, number, variables, log_folder / f"environment_{name}.log"
        )
        supervisor.add(SupervisedProgram(name=f"environment {name}", launch=launch))
    supervisor.start()
    return Programs(client=client, supervisor=supervisor, is_up=True)


def _start_api(port: HeldPort, log_folder: Path) -> Child:
    return Child(
        [sys.executable, "-m", "atroposlib.cli.run_api", "--host", "127.0.0.1", "--port", str(port.number)],
        log=log_folder / "atropos_api.log",
        environment=child_environment(None),
    )


def _warn_of_lengths(environment: Environment, facts: Facts) -> None:
    script = environment.script
    own = None if script is None else read_script(script).max_token_length
    if own is not None and own > facts.max_token_length:
        log.warning(
            "environment %s is written for sequences of %d tokens; this run allows %d (max_prompt_length + "
            "max_response_length), and longer prompts are refused",
            environment.name,
            own,
            facts.max_token_length,
        )


def _start_environment(
    environment: Environment, facts: Facts, number: int, variables: Mapping[str, str], log: Path
) -> Child:
    return Child(
        environment.argv(facts, number),
        log=log,
        # An environment may read a hub or log to W&B, like the trainer.
        environment={**child_environment(environment.python, with_secrets=True), "OMP_NUM_THREADS": "1", **variables},
        cwd=environment.folder,
    )
