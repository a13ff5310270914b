"""How the weights are trained: the settings of `trainer=fsdp2`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from atropos_exp.errors import UserError
from atropos_exp.parts.trainer.schedule import SCHEDULERS
from atropos_exp.types import LoraSettings

MAX_CHUNK_LOGITS = 1 << 26  # float32 logits alive at once: 256 MiB, and the same again for their gradient


class ModelChoice(Protocol):
    """The settings of `conf/model` that the trainer reads."""

    @property
    def attn_implementation(self) -> str: ...
    @property
    def gradient_checkpointing(self) -> bool: ...
    @property
    def trust_remote_code(self) -> bool: ...
    @property
    def lora(self) -> LoraSettings: ...
    def compute_dtype(self, device: str) -> str: ...


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """The settings of `conf/trainer`, whose YAML explains each. One process per device; weights, gradients and Adam's
    moments are sharded over all of them."""

    max_steps: int
    num_mini_batches: int
    max_tokens_per_micro_batch: int
    learning_rate: float
    scheduler: str
    warmup_steps: int
    min_lr_ratio: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    weight_decay: float
    max_grad_norm: float
    importance_cap: float | None
    sequence_parallel_size: int
    offload_parameters: bool
    offload_optimizer: bool
    reshard_after_forward: bool
    max_bad_steps: int
    timeout_s: float

    def __post_init__(self) -> None:
        self._at_least(
            1, "max_steps", "num_mini_batches", "max_tokens_per_micro_batch", "sequence_parallel_size", "max_bad_steps"
        )
        self._at_least(0, "learning_rate", "warmup_steps", "min_lr_ratio", "weight_decay")
        self._above_zero("adam_epsilon", "max_grad_norm", "timeout_s")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"trainer.{name} must lie in [0, 1); got {getattr(self, name)}")
        if self.min_lr_ratio > 1:
            raise UserError(f"trainer.min_lr_ratio is a part of the peak, so at most 1; got {self.min_lr_ratio}")
        if self.scheduler not in SCHEDULERS:
            raise UserError(f"trainer.scheduler must be one of {', '.join(SCHEDULERS)}; got {self.scheduler!r}")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise UserError(f"trainer.importance_cap must be positive, or null for none; got {self.importance_cap}")

    def _at_least(self, bound: int, *names: str) -> None:
        for name in names:
            if not getattr(self, name) >= bound:
                raise UserError(f"trainer.{name} must be at least {bound}; got {getattr(self, name)}")

    def _above_zero(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise UserError(f"trainer.{name} must be positive; got {getattr(self, name)}")

    def attention(self, requested: str) -> str:
        """transformers' name of the attention for `model.attn_implementation`; our own for `auto` and `packed`.

        Raises UserError for one that sequence parallelism would silently get wrong: verl trades heads for sequence
        in flash attention only, any other sees the shard of its own rank.
        """
        from atropos_exp.parts.trainer.attention import NAME, ULYSSES_SAFE

        name = NAME if requested in ("auto", "packed", NAME) else requested
        if self.sequence_parallel_size > 1 and name not in ULYSSES_SAFE:
            raise UserError(
                f"trainer.sequence_parallel_size={self.sequence_parallel_size} with "
                f"model.attn_implementation={requested} would attend to a part of each sequence only. "
                "Choose model.attn_implementation=packed, or trainer.sequence_parallel_size=1."
            )
        return name


def require_ranks(world_size: int, sequence_parallel_size: int, head_counts: Sequence[int]) -> None:
    """Raise UserError unless ranks and attention heads divide by the sequence-parallel size."""
    if world_size % sequence_parallel_size:
        raise UserError(
            f"trainer.sequence_parallel_size={sequence_parallel_size} does not divide the {world_size} "
            "trainer processes"
        )
    query_heads, key_value_heads = head_counts
    fits = key_value_heads % sequence_parallel_size == 0 or sequence_parallel_size % key_value_heads == 0
    if query_heads % sequence_parallel_size or not fits:
        raise UserError(
            f"trainer.sequence_parallel_size={sequence_parallel_size} does not divide the attention heads of the model "
            f"({query_heads} query heads, {key_value_heads} key-value heads)"
        )
