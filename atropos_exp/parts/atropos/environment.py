"""`conf/env`: how to start the processes of an Atropos environment, from this project or elsewhere."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from atropos_exp.config.settings import Few, Settings
from atropos_exp.errors import UserError
from atropos_exp.processes.interpreters import missing_modules


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run tells its environments' processes; arguments may refer to a field as {name}."""

    api_url: str
    gateway_url: str  # without /v1
    gateway_token: str  # "x" if the gateway asks for none
    model_name: str
    tokenizer: Path
    run_config: Path
    run_folder: Path
    group_size: int
    max_token_length: int
    uses_wandb: bool


class Environment(Settings):
    """The settings of `conf/env`. The command line is `python command… serve`, then a flag for each of the `Facts`,
    which `arguments` and `server_arguments` may override."""

    name: str
    python: str | None
    command: list[str]
    num_processes: Few
    server_type: Literal["vllm", "sglang", "openai"]
    max_batches_offpolicy: Annotated[int, Field(ge=1, le=10**6, description="0 samples nothing")]
    arguments: dict[str, Any]
    server_arguments: dict[str, Any]

    def preflight(self, *, launches_atropos: bool) -> Iterator[str]:
        """Messages about what is wrong, as far as it can be known before the process is started."""
        if not launches_atropos:
            return
        if not self.command:
            yield "command: got an empty list, expected [path/to/env.py], or [-m, module]"
            return
        if self.python is not None and shutil.which(os.path.expanduser(self.python)) is None:
            yield f"python: got {self.python!r}, which is no program; name the interpreter that it needs"
        script = self.command[0]
        if script.endswith(".py") and not Path(script).expanduser().is_file():
            yield f"command: got {script}, but there is no such file"

    def interpreter_problems(self, *, launches_atropos: bool) -> list[str]:
        """Why `python` cannot run the environment; it is started for a moment."""
        if not launches_atropos or self.python is None:
            return []
        lack = missing_modules(os.path.expanduser(self.python), ())
        return [f"env.python: got {self.python!r}, but {lack}; name the interpreter that it needs"] if lack else []

    def argv(self, facts: Facts, process: int) -> list[str]:
        """The command line of process number `process`. Raises UserError for an unknown {name}."""
        options: dict[str, Any] = {
            "env.rollout_server_url": facts.api_url,
            "env.tokenizer_name": facts.tokenizer,
            "env.group_size": facts.group_size,
            "env.max_token_length": facts.max_token_length,
            "env.max_batches_offpolicy": self.max_batches_offpolicy,
            "env.total_steps": -1,  # as many as the trainer registers
            "env.use_wandb": facts.uses_wandb,
            "openai.base_url": f"{facts.gateway_url}/v1",
            "openai.api_key": facts.gateway_token,
            "openai.model_name": facts.model_name,
            "openai.tokenizer_name": facts.tokenizer,  # else atroposlib takes the model_name for a folder or a hub id
            "openai.server_type": self.server_type,
        }
        places = {**vars(facts), "process_index": process, "num_processes": self.num_processes}
        for prefix, arguments in (("env", self.arguments), ("openai", self.server_arguments)):
            for key, value in arguments.items():
                options[f"{prefix}.{key}"] = _fill(value, places) if isinstance(value, str) else value
        python = sys.executable if self.python is None else os.path.expanduser(self.python)
        command = [os.path.expanduser(word) for word in self.command]
        # One word each: atroposlib takes a value that starts with a dash for the next flag.
        flags = [f"--{key}={_word(value)}" for key, value in options.items() if value is not None]
        return [python, *command, "serve", *flags]


def _fill(text: str, places: Mapping[str, object]) -> str:
    try:
        return text.format_map(places)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"env.arguments: {text!r} has a placeholder {error} that nothing stands for; there are: "
            f"{', '.join(sorted(places))} (double a brace that is meant as such)"
        ) from None


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
