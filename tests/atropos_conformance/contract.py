"""What the suite needs from a trainer, whichever it is: `adapter.py` gives it for this project."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run of the trainer: 2 groups of 4 sequences a step; sequences of at most 136 tokens, completions of 8; no
    evaluation."""

    folder: Path  # of the run; the same again resumes it
    steps: int
    api_url: str | None = None  # None: the trainer starts API and environments itself
    gateway_port: int | None = None  # where environments find the inference server; None: any
    falls_back: bool = False  # to its own rollouts while the API is silent or gone
    data_timeout: float = 120.0  # seconds without a batch although the API answers
    outage_timeout: float = 4.0  # seconds without the API, before it falls back
    start_timeout: float = 240.0  # seconds until the first batch
    take_over: bool = False  # of an API that serves another run
    max_version_lag: int | None = None
    kl_coef: float = 0.0
    learning_rate: float = 2e-4
    temperature: float = 1.0  # of training rollouts
    keeps_weights: bool = False  # of every step
    environment: Sequence[str] = ()  # command of the environment to be started; (): the trainer's single-turn one
    multi_turn: bool = False  # start the trainer's multi-turn environment instead
    environment_arguments: dict[str, Any] = field(default_factory=dict)  # --env.KEY VALUE
    num_processes: int = 1  # of the environment
    max_restarts: int = 5  # of an environment
    num_ranks: int = 1
    logs_to_wandb: bool = False  # offline


@dataclass(frozen=True, kw_only=True)
class TrainedSequence:
    """One trained sequence. Lists of one length; see the README for the conventions."""

    tokens: list[int]
    trained: list[bool]
    logprobs: list[float] | None  # of the behaviour policy, 0.0 where not trained
    advantages: list[float] | None  # of the environment
    reward: float
    policy_version: int
    zero_advantage: bool
    supervised: bool
    temperature: float | None
    group_id: str
    source: str  # "atropos" or "local"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One update. `losses`: policy, supervised, kl (per trained token), total, grad_norm (before clipping)."""

    step: int
    groups: list[list[TrainedSequence]]
    losses: dict[str, float]
    log: dict[str, float]  # everything else that the trainer logged


class Trainer(Protocol):
    """An adapter. Functions of a module serve as well as methods."""

    EXIT_CODE_REFUSED: int  # of a run that will not take an API from another run
    VOCABULARY: int
    CAUSES: dict[str, str]  # why no batch comes -> a pattern in the trainer's output that says so
    ASSISTANT: int  # token after which the policy speaks, in the multi-turn environment's conversations
    END: int  # and with which it ends
    TOKEN_ADVANTAGES: dict[str, Any]  # arguments that make that environment send token-level advantages
    HOW: dict[str, str]  # name of a test -> how this trainer does it, for the table
    REASONS: dict[str, str]  # kind of bad group (groups.SPOIL) -> the name under which it is dropped

    def command(self, request: Request) -> tuple[list[str], dict[str, str]]:
        """Program and environment variables."""

    def num_steps(self, folder: Path) -> int:
        """How many are complete by now; quick, for it is asked often."""

    def steps(self, folder: Path) -> list[Step]:
        """Those that are complete by now."""

    def num_from_atropos(self, folder: Path) -> int:
        """How many steps so far were trained on groups from the API; quick too."""

    def saved(self, folder: Path, step: int) -> bool:
        """Whether the run can be resumed after `step`."""

    def is_program(self, name: str, command_line: list[str]) -> bool:
        """Whether it is the program `name`: api, environment, or another one that the trainer starts."""

    def wandb_place(self, folder: Path) -> tuple[str, str]:
        """Project and group that the trainer itself logged to (`logs_to_wandb`)."""

    def status(self, folder: Path) -> str:
        """finished | stopped | failed"""

    def dropped(self, folder: Path) -> dict[str, int]:
        """Groups that were dropped so far, by reason."""

    def dropped_rollouts(self, folder: Path) -> dict[str, int]:
        """The same in sequences."""

    def expect_lost_batch(self, url: str, *, seconds: float) -> None:
        """Ask an API once for a batch with this deadline, and fail unless the client says that it is lost."""

    def lost_batches(self, folder: Path) -> int:
        """Batches that left the API and did not arrive."""

    def weights(self, folder: Path, step: int) -> Path:
        """A Hugging Face folder (float32) of the weights that `step` started from."""


def load() -> Any:
    """The adapter that ATROPOS_TRAINER names (a .py file), or this project's."""
    path = Path(os.environ.get("ATROPOS_TRAINER") or HERE / "adapter.py")
    spec = importlib.util.spec_from_file_location("atropos_conformance_adapter", path)
    assert spec is not None and spec.loader is not None, f"ATROPOS_TRAINER: {path} is no Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
