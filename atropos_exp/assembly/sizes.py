"""Sizes that follow from the configuration, and what refuses to fit together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from atropos_exp.assembly.options import ClusterPart
from atropos_exp.config.root import RunConfig
from atropos_exp.config.typed import Mistake
from atropos_exp.interfaces import AdvantageEstimator
from atropos_exp.parts.trainer.settings import TrainerSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of one step."""

    device: str  # cpu | cuda
    world_size: int  # trainer processes
    data_parallel: int  # of them, those with sequences of their own
    prompts: int
    sequences: int
    sequences_per_rank: int
    tokens_per_sequence: int  # at most, prompt and response
    trained_tokens: int  # at most
    tokens_per_micro_batch: int  # at most, per rank
    num_mini_batches: int  # optimizer steps
    micro_batches: int  # at most, per rank


def check_sizes(
    run: RunConfig,
    cluster: ClusterPart | None,
    trainer: TrainerSettings | None,
    advantage: AdvantageEstimator | None,
    *,
    device: str,
    environ: Mapping[str, str],
    mistakes: list[Mistake],
) -> Sizes:
    """Derived sizes; appends to `mistakes` what does not divide or fit.

    A part is None where its own settings are wrong already; what depends on it is not judged then.
    """

    def wrong(path: str, message: str) -> None:
        mistakes.append(Mistake(path=path, message=message))

    longest = run.max_prompt_length + run.max_response_length
    world_size = int(environ.get("WORLD_SIZE", cluster.num_processes if cluster else 1))  # torchrun, srun set it
    per_sequence = max(1, trainer.sequence_parallel_size) if trainer else 1
    num_mini_batches = max(1, trainer.num_mini_batches) if trainer else 1
    budget = trainer.max_tokens_per_micro_batch if trainer else longest
    if world_size % per_sequence:
        message = f"got {per_sequence}, which does not divide the {world_size} trainer processes"
        wrong("trainer.sequence_parallel_size", message)
    data_parallel = max(1, world_size // per_sequence)
    sequences = run.batch_size * run.group_size
    if sequences % (data_parallel * num_mini_batches):
        mini_batches = f" x {num_mini_batches} mini-batches (trainer.num_mini_batches)" if num_mini_batches > 1 else ""
        wrong(
            "batch_size",
            f"{run.batch_size} prompts x {run.group_size} rollouts (group_size) = {sequences} sequences do not divide "
            f"over {data_parallel} ranks{mini_batches}; "
            + _nearest(run.batch_size, run.group_size, data_parallel * num_mini_batches),
        )
    if advantage is not None and run.group_size < advantage.min_group_size:
        wrong(
            "group_size",
            f"got {run.group_size}, but {type(advantage).__name__} (advantage) compares the rollouts of a group: "
            f"expected at least {advantage.min_group_size}",
        )
    if longest > budget:
        wrong(
            "trainer.max_tokens_per_micro_batch",
            f"got {budget}, but one sequence may have max_prompt_length + max_response_length = "
            f"{run.max_prompt_length} + {run.max_response_length} = {longest} tokens; raise it or shorten them",
        )
    per_rank = -(-sequences // data_parallel)
    return Sizes(
        device=device,
        world_size=world_size,
        data_parallel=data_parallel,
        prompts=run.batch_size,
        sequences=sequences,
        sequences_per_rank=per_rank,
        tokens_per_sequence=longest,
        trained_tokens=sequences * run.max_response_length,
        tokens_per_micro_batch=budget,
        num_mini_batches=num_mini_batches,
        micro_batches=num_mini_batches * -(-per_rank // num_mini_batches // max(1, budget // longest)),
    )


def describe(sizes: Sizes) -> str:
    """The table that a run prints when it starts."""
    rows = [
        ("device", sizes.device),
        ("trainer processes", f"{sizes.world_size:,} (data-parallel {sizes.data_parallel:,})"),
        ("prompts a step", f"{sizes.prompts:,}"),
        ("sequences a step", f"{sizes.sequences:,} ({sizes.sequences_per_rank:,} a rank)"),
        ("tokens a sequence", f"{sizes.tokens_per_sequence:,} at most"),
        ("trained tokens a step", f"{sizes.trained_tokens:,} at most"),
        ("tokens a micro-batch", f"{sizes.tokens_per_micro_batch:,} at most"),
        ("optimizer steps a step", f"{sizes.num_mini_batches:,}"),
        ("micro-batches a rank", f"{sizes.micro_batches:,} at most"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _nearest(batch_size: int, group_size: int, ranks: int) -> str:
    """The nearest values of either key that divide, such as "use batch_size=6 or 8, or group_size=4"."""

    def around(value: int, factor: int) -> list[int]:
        step = ranks // math.gcd(ranks, factor)
        below = (value - 1) // step * step
        return [n for n in (below, below + step) if n > 0]

    batches = " or ".join(map(str, around(batch_size, group_size)))
    groups = " or ".join(map(str, around(group_size, batch_size)))
    return f"use batch_size={batches}, or group_size={groups}"
