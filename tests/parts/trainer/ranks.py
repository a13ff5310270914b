"""What the ranks of `test_ranks.py` run: every case in one group of processes, results to files.

Started as `RANK=0 WORLD_SIZE=2 ... python ranks.py FOLDER`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from safetensors.torch import save_file

from atropos_exp.errors import UserError
from tests.helpers.plain_grpo import make_group, make_rollout
from tests.helpers.scored_groups import clipped_loss, multi_turn, packed
from tests.helpers.trainer_cases import Lora, Model, WeightedLoss, make_batch, split, start

# Adam divides small gradients by themselves and so enlarges rounding errors; a larger epsilon bounds that
ADAM = {"learning_rate": 0.01, "adam_epsilon": 1e-3, "max_grad_norm": 1.0}
# name -> (model folder, model, settings): test_ranks.py runs the same with one rank
CASES: dict[str, tuple[str, Model, dict[str, Any]]] = {
    "tied": ("tied", Model(), {}),
    "untied": ("untied", Model(), {"max_tokens_per_micro_batch": 40, "reshard_after_forward": False}),
    "adam": ("tied", Model(), {**ADAM, "num_mini_batches": 2}),
    "lora": ("tied", Model(lora=Lora(rank=4)), ADAM),
    "reference": ("untied", Model(), {**ADAM, "kl_coef": 0.3}),
    "few": ("tied", Model(), {"num_sequences": 1}),  # a rank without sequences
    "sp": ("tied", Model(), {"sequence_parallel_size": 2, "max_tokens_per_micro_batch": 40}),
    "sp_untied": ("untied", Model(gradient_checkpointing=True), {**ADAM, "sequence_parallel_size": 2}),
    "sp_few_heads": ("one_kv_head", Model(), {"sequence_parallel_size": 2}),
    "mixed": ("tied", Model(), {**ADAM, "num_mini_batches": 2, "mixed": True, "kl_coef": 0.3}),
    "sp_mixed": ("tied", Model(), {**ADAM, "sequence_parallel_size": 2, "mixed": True, "kl_coef": 0.3}),
}


def run(folder: Path, name: str, *, num_updates: int, changes: dict[str, Any] | None = None) -> tuple[Any, list[Any]]:
    """The trainer after its updates, and their stats."""
    model_folder, model, options = CASES[name]
    options = options | (changes or {})
    mixed, kl_coef = options.pop("mixed", False), options.pop("kl_coef", 0.0)
    loss = clipped_loss(kl_coef=kl_coef) if mixed else WeightedLoss(kl_coef=kl_coef)
    num_sequences = options.pop("num_sequences", 13)
    trainer = start(folder / model_folder, folder / "dumps", model=model, loss=loss, **options)
    batches = [
        make_batch(seed=seed, num_sequences=max(2, num_sequences), temperature=0.9) for seed in range(num_updates)
    ]
    if num_sequences == 1:
        batches = [first_sequence(batch) for batch in batches]
    if mixed:
        batches = [mixed_batch()] * num_updates
    return trainer, [trainer.update(batch) for batch in batches]


def mixed_batch() -> Any:
    """Two temperatures beside the run's, an example, and reference logprobs for one of the sequences."""
    first, second = multi_turn()
    warm = dataclasses.replace(first.rollouts[0], temperature=1.5)
    known, other = second.rollouts
    reference = np.where(known.trained, np.float32(-3.0), np.float32(0.0))
    known = dataclasses.replace(known, reference_logprobs=reference, temperature=0.6)
    example = make_rollout("ppaataaa", 0.0, seed=40, supervised=True)
    return packed([make_group(warm, *first.rollouts[1:]), make_group(example, known, other)], 0.8)


def first_sequence(batch: Any) -> Any:
    size = int(batch.lengths_N[0])
    parts = {f"{name}_S": values for name, values in split(batch)[0].items()}
    per_sequence = {part.name: getattr(batch, part.name)[:1] for part in dataclasses.fields(batch) if "_N" in part.name}
    return dataclasses.replace(
        batch,
        **parts,
        **per_sequence,
        num_trained_tokens=int(batch.trained_S[:size].sum()),
    )


def scores_of(trainer: Any) -> list[list[float]]:
    sequences = [part["token_ids"].numpy() for part in split(make_batch(seed=9))]
    return [score.tolist() for score in trainer.logprobs(sequences, temperature=0.8)]


def main(folder: Path) -> None:
    rank, results = -1, {}
    for name in CASES:
        trainer, stats = run(folder, name, num_updates=2)
        rank = dist.get_rank()
        tensors = dict(trainer.parameters())
        results[name] = {
            "stats": [dataclasses.asdict(part) for part in stats],
            "logprobs": scores_of(trainer),
            "empty": all(tensor.numel() == 0 for tensor in tensors.values()),
        }
        if rank == 0:
            save_file(tensors, folder / f"{name}.safetensors")
        if name == "lora":
            matrices = dict(trainer.adapter(with_base=False))
            results[name]["empty"] &= all(tensor.numel() == 0 for tensor in matrices.values())
            if rank == 0:
                save_file(matrices, folder / "adapter.safetensors")
        if name in ("adam", "lora"):
            trainer.save(folder / f"{name}_saved_by_two")
            trainer.load(folder / f"{name}_saved_by_one")
            stats = [trainer.update(make_batch(seed=5))]
            results[f"{name}_continued"] = {"stats": [dataclasses.asdict(part) for part in stats]}
            tensors = dict(trainer.parameters())
            if rank == 0:
                save_file(tensors, folder / f"{name}_continued.safetensors")
    try:
        trainer.load(folder / "nowhere")
    except UserError as error:
        results["refused"] = str(error)
    (folder / f"results_{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    main(Path(sys.argv[1]))
