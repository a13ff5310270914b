"""The Atropos part of a run: gateway, API, environments and the source that reads them. Rank 0 only."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from atropos_exp.assembly.check import Checked
from atropos_exp.errors import EngineError
from atropos_exp.interfaces import Engine
from atropos_exp.parts.atropos.client import Registration
from atropos_exp.parts.atropos.environment import EVALUATIONS, Facts
from atropos_exp.parts.atropos.evaluations import Evaluations
from atropos_exp.parts.atropos.intake import Intake
from atropos_exp.parts.atropos.launch import UNLIMITED_STEPS, Programs, start_programs
from atropos_exp.parts.atropos.source import AtroposSource
from atropos_exp.parts.gateway.client import GatewayClient
from atropos_exp.parts.gateway.options import ENTRY_TOKENS
from atropos_exp.parts.gateway.ports import Doors
from atropos_exp.parts.logger.wandb import Wandb
from atropos_exp.parts.model.hf_folder import copy_description, vocab_size
from atropos_exp.runs.folder import RunFolder
from atropos_exp.runs.seeds import derive_seed

NO_TOKEN = "x"  # an environment's OpenAI client wants a key, whatever it is


def tracker_group(checked: Checked, folder: RunFolder) -> str:
    """The group that the run and its environments log to; also how the Atropos API recognises this run."""
    return checked.parts.logger.group or "/".join(folder.path.parts[-3:])


@dataclass(frozen=True, kw_only=True)
class Outside:
    """What loads while trainer and engine do: the gateway's ports, the API, the environments."""

    doors: Doors
    programs: Programs


def start_gateway(
    checked: Checked, folder: RunFolder, outside: Outside, engine: Engine, *, model_folder: Path, stack: ExitStack
) -> GatewayClient:
    """The gateway, held until the first weights are proven."""
    run, parts = checked.run, checked.parts
    gateway = parts.gateway.start(
        doors=outside.doors,
        endpoints=[replica.endpoint for replica in engine.replicas],
        model_folder=model_folder,
        model_name=run.name,
        stop_token_ids=parts.model.stop_token_ids(model_folder),
        max_sequence_length=checked.max_sequence_length,
        # What a resumed run samples anew must not repeat what it sampled before.
        seed=derive_seed(run.seed, "gateway", sum(1 for _ in (folder.path / "rollouts").glob("*.parquet"))),
        log_folder=folder.path / "log",
        batch_tokens=run.batch_size * run.group_size * (run.max_response_length + ENTRY_TOKENS),
    )
    stack.callback(gateway.stop)
    gateway.hold()
    return gateway


def start_outside(checked: Checked, folder: RunFolder, *, model_folder: Path, stack: ExitStack) -> Outside | None:
    """API and environments, which load in the background, and the ports that they will ask at. None without Atropos."""
    run, parts = checked.run, checked.parts
    if not parts.rollout.uses_atropos:
        return None
    tokenizer = folder.path / "tokenizer"  # environments may have an older transformers than the run
    copy_description(model_folder, tokenizer)
    wandb = parts.logger.environment_variables(folder.path) if isinstance(parts.logger, Wandb) else {}
    doors = parts.gateway.listen(parts.atropos.extra_ports)
    stack.callback(doors.close)
    programs = start_programs(
        parts.atropos,
        parts.env,
        facts=Facts(
            api_url="",
            gateway_url=doors.address,
            gateway_token=parts.gateway.token or NO_TOKEN,
            model_name=run.name,
            tokenizer=tokenizer.absolute(),
            run_config=folder.path / "config.yaml",
            run_folder=folder.path,
            group_size=run.group_size,
            max_token_length=checked.max_sequence_length,
            uses_wandb=wandb.get("WANDB_MODE", "disabled") != "disabled",
        ),
        variables=wandb,
        log_folder=folder.path / "log",
    )
    stack.callback(programs.client.close)
    stack.callback(programs.supervisor.stop)
    return Outside(doors=doors, programs=programs)


def read_atropos(
    checked: Checked,
    folder: RunFolder,
    outside: Outside,
    gateway: GatewayClient,
    engine: Engine,
    *,
    model_folder: Path,
    stack: ExitStack,
) -> AtroposSource:
    """The source that reads them, with the border in front of it. Registers a new run at once if the API is there."""
    run, parts = checked.run, checked.parts
    longest = checked.max_sequence_length

    def registration(step: int) -> Registration:
        return Registration(
            wandb_group=tracker_group(checked, folder),
            wandb_project=parts.logger.project or run.name,
            batch_size=run.batch_size * run.group_size,
            max_token_len=longest + 1,  # environments drop what is as long or longer
            checkpoint_dir=str(folder.path / "atropos"),
            save_checkpoint_interval=max(2, run.checkpoint.every),  # at 1 an environment never saves
            starting_step=max(0, step - 1),
            num_steps=UNLIMITED_STEPS,
        )

    def watch() -> None:
        """While waiting: an engine that died is the cause, not the API; a gateway that died is started again."""
        engine.check()
        gateway.restart_if_dead()

    def gateway_counters() -> Mapping[str, float]:
        try:
            return {f"gateway/{name}": value for name, value in gateway.counters().items() if value}
        except EngineError:  # it is down: `watch` sees to it when something is waited for
            return {}

    def refusals() -> Mapping[str, str]:
        try:
            return gateway.refusals()
        except EngineError:
            return {}

    source = AtroposSource(
        parts.atropos,
        outside.programs,
        falls_back=checked.falls_back,
        registration=registration,
        intake=Intake(
            gateway,
            vocab_size=vocab_size(model_folder),
            max_tokens=longest,
            group_size=run.group_size,
            stop_token_ids=parts.model.stop_token_ids(model_folder),
            max_version_lag=parts.atropos.max_version_lag,
            max_response=run.max_response_length,
        ),
        watch=watch,
        gateway_counters=gateway_counters,
        evaluations=Evaluations(folder.path / EVALUATIONS).collect,
        refusals=refusals,
        group_size=run.group_size,
        run_folder=folder.path,
    )
    stack.callback(outside.programs.supervisor.stop)  # before the gateway: nobody asks while it goes
    if not folder.resumed:
        source.connect(step=1)
    return source
