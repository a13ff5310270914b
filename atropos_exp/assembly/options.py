"""What the options of a group have in common: what the rest of the program reads and calls of a settings object.

`interfaces.py` says what a part does during a run; this file what its settings offer before one, above all a `start`
that makes it. An option of one's own satisfies the Protocol of its group (docs/extending.md).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from atropos_exp.config.lora import LoraSettings
from atropos_exp.interfaces import Engine, Logger, PromptLoader, RemoteSource, Reward, RolloutSource
from atropos_exp.parts.data.settings import PrepareSettings
from atropos_exp.runs.sweep_backend import Backend
from atropos_exp.runs.sweep_folder import SweepFolder
from atropos_exp.types import Prompt, RunDescription


class DataPart(Protocol):
    """`conf/data`: which prompts a run trains on and which it holds out."""

    @property
    def prepare(self) -> PrepareSettings | None: ...  # the data set that is built before the run, if any
    @property
    def format(self) -> str: ...  # how a prompt becomes tokens: chat (the tokenizer's template) or plain
    @property
    def has_eval(self) -> bool: ...  # whether `eval_prompts` has something to return

    def loader(
        self,
        tokenizer: Any,
        *,
        seed: int,
        max_prompt_length: int,
        max_response_length: int,
        run_folder: Path,
        prepared_folder: Path | None,
    ) -> PromptLoader:
        """Read, check and tokenise the training prompts. Raises UserError with file, row and reason."""

    def eval_prompts(
        self, tokenizer: Any, *, num_prompts: int, max_prompt_length: int, prepared_folder: Path | None
    ) -> list[Prompt]:
        """At most `num_prompts` held-out prompts, the same for every seed."""


class RewardPart(Reward, Protocol):
    """`conf/reward`: how an answer is scored, and in how many processes."""

    @property
    def num_workers(self) -> int: ...
    @property
    def timeout_seconds(self) -> float: ...  # of one answer, which then counts as not scored


class RolloutPart(Protocol):
    """`conf/rollout`: where scored groups come from."""

    @property
    def uses_atropos(self) -> bool: ...
    @property
    def falls_back(self) -> bool: ...  # local rollouts take over while Atropos gives none
    @property
    def mask_truncated(self) -> bool: ...  # a truncated completion only counts in its group's baseline

    def choose(self, *, local: RolloutSource, remote: RemoteSource | None) -> RolloutSource:
        """The source of the run. `remote` is there exactly if `uses_atropos`."""


class EnginePart(Protocol):
    """`conf/engine`: the sampler."""

    @property
    def dtype(self) -> str: ...  # of the served weights: auto | float32 | bfloat16 | float16
    @property
    def colocate(self) -> bool: ...  # the engine gives its memory to the trainer during an update
    @property
    def lora(self) -> str: ...  # how it serves LoRA: merged into the base, or adapter: matrices beside it
    @property
    def max_restarts(self) -> int: ...  # how often a run replaces a server that died or hangs

    def start(
        self,
        *,
        model_folder: Path,
        device: str,
        log_folder: Path,
        max_sequence_length: int,
        lora: LoraSettings,
        twin: Path | None,
        trust_remote_code: bool,
    ) -> Engine:
        """Start its servers on a Hugging Face folder and wait for their first token. Raises EngineError.

        `max_sequence_length`: the most tokens that a prompt and its answer have together. `lora`: the adapter that the
        model is trained with (rank 0: none), for an engine that serves it beside the base. `twin`: the folder of a
        small model of the same architecture, for an engine that tries what it may do; None if there is none.
        `trust_remote_code`: Python code that comes with the model is run.
        """


class JobQueue(Protocol):
    """A cluster that takes jobs, instead of running ranks here and now."""

    @property
    def dry_run(self) -> bool: ...  # a submission only prints what it would submit

    def submit_run(self, *, name: str, arguments: Sequence[str], run_folder: Path) -> int:
        """Submit one run, follow it if the settings say so, and return the exit code. `arguments` follow the
        interpreter in the command line of one rank."""

    def sweep_backend(self, sweep: SweepFolder, settings: object) -> Backend:
        """What executes the runs of a sweep as jobs."""


class ClusterPart(Protocol):
    """`conf/cluster`: where the processes run."""

    @property
    def num_processes(self) -> int: ...  # trainer ranks on all nodes
    @property
    def target_device(self) -> str | None: ...  # cpu or cuda of the machines it runs on; None: of this one
    @property
    def queue(self) -> JobQueue | None: ...  # where jobs are submitted; None: ranks are started at once, by `launch`

    def launch(self, command: Sequence[str]) -> int | None:
        """Run all ranks of `command` to their end and return the exit code; None: this process is itself the rank."""


class LoggerPart(Protocol):
    """`conf/logger`: the experiment tracker."""

    @property
    def project(self) -> str | None: ...  # the tracker's project; None where nothing is tracked outside the run folder
    @property
    def group(self) -> str | None: ...  # the tracker's group of runs; None: none was chosen

    def start(self, run: RunDescription) -> Logger: ...
