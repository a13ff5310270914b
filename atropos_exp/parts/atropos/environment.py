"""`conf/env`: how to start the processes of an Atropos environment, from this project or elsewhere."""

import json
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
from atropos_exp.parts.atropos.script import read_script
from atropos_exp.processes.interpreters import missing_modules

EVALUATIONS = "environments"  # folder of the run with what environments evaluated, one folder a process
SERVERS = "environment_servers.yaml"  # file of the run


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
    cwd: str | None
    num_processes: Few
    server_type: Literal["vllm", "sglang", "openai"]
    max_batches_offpolicy: Annotated[int, Field(ge=1, le=10**6, description="0 samples nothing")]
    fallback: bool
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
        if self.cwd is not None and not Path(self.cwd).expanduser().is_dir():
            yield f"cwd: got {self.cwd}, but there is no such folder"
        script = self.script
        if script is not None and not script.is_file():
            yield f"command: got {self.command[0]}, but there is no such file"

        weight = self.arguments.get("inference_weight", 1.0)
        if not _is_above_zero(weight):
            yield (
                f"arguments: inference_weight is {weight}, expected a number above 0: with other weights the Atropos "
                "API answers no environment"
            )

    @property
    def script(self) -> Path | None:
        """The file that is run, if it is one: relative to the folder in which the run is started, or else to `cwd`."""
        if not self.command or not self.command[0].endswith(".py"):
            return None
        path = Path(self.command[0]).expanduser()
        if self.cwd is not None and not path.is_file():
            path = Path(self.cwd).expanduser() / path
        return path.absolute()

    @property
    def folder(self) -> Path | None:
        """The working directory of its processes; None: that of the run."""
        return None if self.cwd is None else Path(self.cwd).expanduser().absolute()

    def interpreter_problems(self, *, launches_atropos: bool) -> list[str]:
        """Why `python` cannot run the environment; it is started for a moment."""
        if not launches_atropos or self.python is None:
            return []
        lack = missing_modules(os.path.expanduser(self.python), ())
        return [f"env.python: got {self.python!r}, but {lack}; name the interpreter that it needs"] if lack else []

    def argv(self, facts: Facts, process: int) -> list[str]:
        """The command line of process number `process`. Raises UserError for an unknown {name}.

        An environment that ignores `--openai` flags gets its servers from a file, which is written here."""
        options: dict[str, Any] = {
            "env.rollout_server_url": facts.api_url,
            "env.wandb_name": self.name,  # the API refuses an environment without a name
            "env.tokenizer_name": facts.tokenizer,
            "env.group_size": facts.group_size,
            "env.max_token_length": facts.max_token_length,
            "env.max_batches_offpolicy": self.max_batches_offpolicy,
            "env.total_steps": -1,  # as many as the trainer registers
            "env.use_wandb": facts.uses_wandb,
            "env.data_dir_to_save_evals": facts.run_folder.absolute() / EVALUATIONS / f"{self.name}_{process}",
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
        if os.sep in python:
            python = os.path.abspath(python)
        command = [os.path.expanduser(word) for word in self.command]
        if self.script is not None:
            command[0] = str(self.script)
            if read_script(self.script).wants_server_list:
                options["config"] = _write_servers(facts.run_folder.absolute() / SERVERS, options)
        # One word each: atroposlib takes a value that starts with a dash for the next flag.
        flags = [f"--{key}={_word(value)}" for key, value in options.items() if value is not None]
        return [python, *command, "serve", *flags]


def _write_servers(path: Path, options: dict[str, Any]) -> Path:
    """Move the `openai.` options into a file. Two equal servers: atroposlib takes no other list from a file."""
    own = [key for key in options if key.startswith("openai.")]
    server = {key.removeprefix("openai."): options.pop(key) for key in own}
    server = {key: str(value) if isinstance(value, Path) else value for key, value in server.items()}
    path.write_text(json.dumps({"openai": [server, server]}, indent=1) + "\n", encoding="utf-8")  # which is YAML too
    path.chmod(0o600)  # it holds the gateway's token
    return path


def _fill(text: str, places: Mapping[str, object]) -> str:
    try:
        return text.format_map(places)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"env.arguments: {text!r} has a placeholder {error} that nothing stands for; there are: "
            f"{', '.join(sorted(places))} (double a brace that is meant as such)"
        ) from None


def _is_above_zero(value: Any) -> bool:
    try:
        return float(value) > 0
    except (TypeError, ValueError):  # a placeholder; the environment says what is wrong with other text
        return True


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
