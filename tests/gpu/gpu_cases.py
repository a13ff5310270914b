"""What the processes of `test_trainer.py` run: every case, results to files.

    [RANK=0 WORLD_SIZE=2 ...] python gpu_cases.py FOLDER cuda|cpu NAME...

NAME is a way to run: `whole` (one rank), `data` (the batch is shared between two), `sequence` (each sequence is),
`resumed_NAME` (continue the checkpoint that NAME has saved), `exact` (like `whole`, all in float32).
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from atropos_exp.parts.trainer import logprob_head
from atropos_exp.types import TrainBatch
from tests.helpers.scored_groups import clipped_loss
from tests.helpers.trainer_cases import (
    Lora,
    Model,
    WeightedLoss,
    full_weights,
    make_batch,
    split,
    start,
    write_model,
)
from tests.parts.trainer.ranks import mixed_batch

# Two updates each. Adam divides small gradients by themselves, which enlarges rounding errors; epsilon bounds that.
ADAM = {"learning_rate": 0.01, "adam_epsilon": 1e-3, "max_grad_norm": 1.0}
BF16 = Model(dtype="bfloat16")
LORA = Lora(rank=4, target_modules=["q_proj", "v_proj", "down_proj"])
OFFLOAD = {"offload_parameters": True, "offload_optimizer": True}
# A few sequences, so small steps, and in bfloat16 one update: later ones clip other tokens than float32 does.
MIXED = {"mixed": True, "num_mini_batches": 2, "learning_rate": 0.001}
# name -> (model folder, model, settings). The settings of `trainer_cases` show the gradient itself in the first step.
CASES: dict[str, tuple[str, Model, dict[str, Any]]] = {
    "fp32": ("tied", Model(), {"num_updates": 1}),
    "fp32_adam": ("tied", Model(), ADAM),
    "fp32_offload": ("tied", Model(), {**ADAM, **OFFLOAD}),
    "fp32_lora": ("untied", Model(lora=LORA), ADAM),
    "fp32_mixed": ("untied", Model(), {**ADAM, **MIXED}),
    "bf16": ("tied", BF16, {"num_updates": 1}),
    "bf16_untied": ("untied", BF16, {"num_updates": 1, "max_tokens_per_micro_batch": 600}),
    "bf16_window": ("window", BF16, {"num_updates": 1}),
    "bf16_checkpointing": ("tied", Model(dtype="bfloat16", gradient_checkpointing=True), {"num_updates": 1}),
    "bf16_adam": ("tied", BF16, ADAM),
    "bf16_offload": ("tied", BF16, {**ADAM, **OFFLOAD}),
    "bf16_lora": ("untied", Model(dtype="bfloat16", lora=LORA, gradient_checkpointing=True), ADAM),
    "bf16_mixed": ("untied", BF16, {**ADAM, **MIXED, "num_updates": 1, "reshard_after_forward": False}),
}
SAVED = ("fp32_offload", "fp32_lora", "bf16_adam")
SIZES: dict[str, Any] = {"hidden_size": 128, "num_layers": 3, "max_position_embeddings": 256, "initializer_range": 0.08}


def write_models(folder: Path) -> None:
    """Heads of size 32, two query heads to a key-value head."""
    write_model(folder / "tied", **SIZES)
    write_model(folder / "untied", tied=False, **SIZES)
    window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0}
    write_model(folder / "window", **SIZES, **window)


def long_batch(seed: int) -> TrainBatch:
    """About 2,500 tokens in sequences of 3 to 200."""
    return make_batch(seed=seed, num_sequences=24, longest=200, temperature=0.9)


def run(folder: Path, way: str, name: str, device: str) -> dict[str, Any]:
    """Start, update and measure one case. Rank 0 writes the weights."""
    model_folder, model, given = CASES[name]
    options = dict(given)
    num_updates, mixed = options.pop("num_updates", 2), options.pop("mixed", False)
    if way == "exact":
        model = dataclasses.replace(model, dtype="float32")
    loss = clipped_loss(kl_coef=0.3) if mixed else WeightedLoss()
    sp_size = 2 if way == "sequence" else 1
    trainer = start(
        folder / model_folder,
        folder / "dumps",
        model=model,
        loss=loss,
        device=device,
        sequence_parallel_size=sp_size,
        **options,
    )
    if way.startswith("resumed_"):
        trainer.load(folder / f"{way.removeprefix('resumed_')}_{name}")
        batches = [long_batch(num_updates)]
    else:
        batches = [mixed_batch() if mixed else long_batch(seed) for seed in range(num_updates)]
    stats = [trainer.update(batch) for batch in batches]
    weights = {key: tensor.cpu() for key, tensor in full_weights(trainer).items()}
    if dist.get_rank() == 0:
        save_file(weights, folder / f"{way}_{name}.safetensors")
    if name in SAVED and not way.startswith("resumed_"):
        trainer.save(folder / f"{way}_{name}")
        stats.append(trainer.update(long_batch(num_updates)))  # what the resumed run must repeat
    sequences = [part["token_ids"].numpy() for part in split(long_batch(9))]
    return {
        "stats": [dataclasses.asdict(part) for part in stats],
        "logprobs": [score.tolist() for score in trainer.logprobs(sequences, temperature=0.8)],
        "devices": sorted({parameter.device.type for parameter in trainer._backend.module.parameters()}),
        "dtypes": sorted({str(parameter.dtype) for parameter in trainer._backend.module.parameters()}),
    }


def main(folder: Path, device: str, ways: list[str]) -> None:
    logprob_head.MAX_CHUNK_LOGITS = 64 * 48  # 64 tokens a chunk, so that there are many
    for way in ways:
        names = SAVED if way.startswith("resumed_") else tuple(CASES)
        results: dict[str, dict[str, Any]] = {}
        for name in names:
            print(way, name, flush=True)  # the log says where it stopped
            try:
                results[name] = run(folder, way, name, device)
            except Exception:  # its test fails with this; the other cases are still worth running
                results[name] = {"error": traceback.format_exc()}
                print(results[name]["error"], flush=True)
        (folder / f"{way}_{device}_{dist.get_rank()}.json").write_text(json.dumps(results))
    if device == "cuda":
        torch.cuda.synchronize()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
