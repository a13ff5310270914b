"""From settings to a trainer in working order. Imports verl, so only called when a run really starts."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from atropos_exp.errors import UserError
from atropos_exp.parts.trainer import attention
from atropos_exp.parts.trainer.distributed import join_process_group
from atropos_exp.parts.trainer.settings import ModelChoice, TrainerSettings, require_ranks

if TYPE_CHECKING:
    from atropos_exp.interfaces import PolicyLoss
    from atropos_exp.parts.trainer.policy_trainer import FSDP2Trainer


def start(
    settings: TrainerSettings,
    *,
    model_folder: Path,
    model: ModelChoice,
    loss: PolicyLoss,
    seed: int,
    device: str,
    dump_folder: Path,
) -> FSDP2Trainer:
    """See `TrainerSettings.start`."""
    implementation = settings.attention(model.attn_implementation)
    dtype = model.compute_dtype(device)
    torch_device = join_process_group(device, timeout_s=settings.timeout_s)
    config_file = Path(model_folder) / "config.json"
    if not config_file.is_file():
        raise UserError(f"model_folder={model_folder}: no config.json there; give a Hugging Face model folder")
    if device == "cpu":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of verl's dependencies, at import
            from atropos_exp.parts.trainer import platform_cpu
        platform_cpu.install()
    attention.register()
    if settings.sequence_parallel_size > 1:
        require_ranks(dist.get_world_size(), settings.sequence_parallel_size, _head_counts(model_folder, model))

    random.seed(seed)
    np.random.seed(seed % 2**32)  # the global stream is what verl and its dependencies draw from
    torch.manual_seed(seed)  # LoRA's first weights

    from atropos_exp.parts.trainer.engine import EngineOptions, build_engine
    from atropos_exp.parts.trainer.policy_trainer import FSDP2Trainer
    from atropos_exp.parts.trainer.self_check import check_packing

    def options(*, frozen: bool) -> EngineOptions:
        return EngineOptions(
            model_folder=Path(model_folder),
            compute_dtype=dtype,
            attn_implementation=implementation,
            gradient_checkpointing=model.gradient_checkpointing,
            trust_remote_code=model.trust_remote_code,
            lora_rank=model.lora.rank,
            lora_alpha=model.lora.alpha,
            lora_target_modules=list(model.lora.target_modules),
            learning_rate=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            epsilon=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            sequence_parallel_size=settings.sequence_parallel_size,
            offload_parameters=settings.offload_parameters,
            offload_optimizer=settings.offload_optimizer,
            reshard_after_forward=settings.reshard_after_forward,
            frozen=frozen,
        )

    engine = build_engine(options(frozen=False))
    check_packing(engine, torch_device)
    uses_reference = getattr(loss, "kl_coef", 0.0) != 0
    # With LoRA the reference is the model without its adapters: no second copy.
    reference = build_engine(options(frozen=True)) if uses_reference and not model.lora.rank else None
    return FSDP2Trainer(
        settings,
        engine=engine,
        reference=reference,
        uses_reference=uses_reference,
        loss=loss,
        device=torch_device,
        dump_folder=Path(dump_folder),
    )


def _head_counts(model_folder: Path, model: ModelChoice) -> tuple[int, int]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_folder, trust_remote_code=model.trust_remote_code).get_text_config()
    return config.num_attention_heads, config.num_key_value_heads
