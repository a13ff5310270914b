"""`trainer=fsdp2`: training with verl's FSDP2 backend, one process per device."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from atropos_exp.errors import UserError
from atropos_exp.interfaces import PolicyLoss
from atropos_exp.parts.trainer.settings import ModelChoice, TrainerSettings, require_ranks

if TYPE_CHECKING:
    from atropos_exp.parts.trainer.exactness import Choice
    from atropos_exp.parts.trainer.layouts import Layout
    from atropos_exp.parts.trainer.policy_trainer import FSDP2Trainer


class VerlFSDP2(TrainerSettings):
    """The settings of `conf/trainer/fsdp2.yaml`, with `start`, which makes a trainer of them."""

    def choose_layout(self, twin: Path, *, model: ModelChoice, device: str) -> Choice:
        """The fastest layout that is exact for a model, found out with its small `twin` (a Hugging Face folder).

        Raises UserError if there is none. Imports torch and transformers.
        """
        import torch

        from atropos_exp.parts.trainer import attention, exactness

        attention.register()
        self.attention(model.attn_implementation)
        return exactness.choose_layout(
            twin,
            exactness.candidates(
                kind=self.layout, attention=model.attn_implementation, sp_size=self.sequence_parallel_size
            ),
            device=torch.device(device),
            trust_remote_code=model.trust_remote_code,
            gradient_checkpointing=model.gradient_checkpointing,
            compute_dtype=model.compute_dtype(device),
        )

    def untried_layout(self, model: ModelChoice) -> Layout:
        """The layout that the settings name; packed for `auto`."""
        from atropos_exp.parts.trainer.layouts import Layout

        if self.layout == "auto" or self.layout == "packed":
            return Layout(kind="packed", attention=self.attention(model.attn_implementation))
        attention = model.attn_implementation
        return Layout(kind=self.layout, attention="eager" if attention in ("auto", "packed") else attention)

    def start(
        self,
        *,
        model_folder: Path,
        model: ModelChoice,
        loss: PolicyLoss,
        seed: int,
        device: str,
        dump_folder: Path,
        layout: Layout | None = None,
    ) -> FSDP2Trainer:
        """Join the ranks, load the model and return the `PolicyTrainer`. Collective.

        `layout` is what `choose_layout` chose; None is packed, untried. `device` is cpu or cuda; batches that had to be
        skipped are written to `dump_folder`. A reference model (the weights of `model_folder`) is loaded only if
        `loss.kl_coef` is not 0. Imports torch and verl. Raises UserError if ranks, model and attention do not fit
        together.
        """
        import numpy as np
        import torch
        import torch.distributed as dist

        from atropos_exp.parts.trainer import attention
        from atropos_exp.parts.trainer.distributed import join_process_group

        layout = layout or self.untried_layout(model)
        dtype = model.compute_dtype(device)
        torch_device = join_process_group(device, timeout_s=self.timeout_s)
        if not (model_folder / "config.json").is_file():
            raise UserError(f"model_folder={model_folder}: no config.json there; give a Hugging Face model folder")
        if device == "cpu":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of verl's dependencies, at import
                from atropos_exp.parts.trainer import platform_cpu
            platform_cpu.install()
        attention.register()
        if self.sequence_parallel_size > 1:
            require_ranks(dist.get_world_size(), self.sequence_parallel_size, _head_counts(model_folder, model))

        random.seed(seed)
        np.random.seed(seed % 2**32)  # the global stream is what verl and its dependencies draw from
        torch.manual_seed(seed)  # LoRA's first weights

        # Only now: verl reads the device at import.
        from atropos_exp.parts.trainer.policy_trainer import FSDP2Trainer
        from atropos_exp.parts.trainer.self_check import check_layout
        from atropos_exp.parts.trainer.verl_backend import BackendOptions, build_backend

        options = BackendOptions(
            settings=self,
            model=model,
            model_folder=model_folder,
            compute_dtype=dtype,
            layout=layout,
            frozen=False,
        )
        backend = build_backend(options)
        check_layout(backend, torch_device)
        # With LoRA the reference is the model without its adapters: no second copy.
        has_reference = loss.kl_coef != 0 and not model.lora.rank
        return FSDP2Trainer(
            self,
            backend=backend,
            reference=build_backend(replace(options, frozen=True)) if has_reference else None,
            loss=loss,
            device=torch_device,
            dump_folder=dump_folder,
        )


def _head_counts(model_folder: Path, model: ModelChoice) -> tuple[int, int]:
    """The model's numbers of query heads and key-value heads."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_folder, trust_remote_code=model.trust_remote_code).get_text_config()
    return config.num_attention_heads, config.num_key_value_heads
