"""verl's FSDP2 engine, fed with packed micro-batches instead of nested tensors.

From `FSDPEngineWithLMHead` come the model (loading, LoRA, sharding, mixed precision, offloading), the optimizer,
the contexts for training and evaluation, and deferred gradient synchronisation. Its own batch path is left alone:
without flash-attn it computes log-probabilities token by token in Python.

Import this module only after the platform is set (`platform_cpu.install`): verl reads the device at import.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from atropos_exp.errors import UserError
from atropos_exp.parts.trainer.logprob_head import LogprobHead, LogprobRequest
from atropos_exp.parts.trainer.packing import MicroBatch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # verl and its dependencies warn of their own deprecations at import
    from verl.trainer.config import CheckpointConfig
    from verl.utils.ulysses import (
        gather_outputs_and_unpad,
        get_ulysses_sequence_parallel_group,
        set_ulysses_sequence_parallel_group,
    )
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

logger = logging.getLogger(__name__)
PRECISION = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """All that verl's four config objects are made of."""

    model_folder: Path
    compute_dtype: str  # float32 | bfloat16: of activations and gathered weights
    attn_implementation: str
    gradient_checkpointing: bool
    trust_remote_code: bool
    lora_rank: int  # 0: all weights are trained
    lora_alpha: int
    lora_target_modules: list[str] | str
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    max_grad_norm: float
    sequence_parallel_size: int
    offload_parameters: bool
    offload_optimizer: bool
    reshard_after_forward: bool
    frozen: bool  # a reference model: no optimizer, stored in the compute dtype

    def verl_configs(self) -> tuple[Any, Any, Any, Any]:
        precision = PRECISION[self.compute_dtype]
        model = HFModelConfig(
            path=str(self.model_folder),
            load_tokenizer=False,
            trust_remote_code=self.trust_remote_code,
            enable_gradient_checkpointing=self.gradient_checkpointing and not self.frozen,
            use_remove_padding=True,
            override_config={"attn_implementation": self.attn_implementation},
            lora_rank=0 if self.frozen else self.lora_rank,
            lora_alpha=self.lora_alpha,
            target_modules=self.lora_target_modules,
        )
        engine = FSDPEngineConfig(
            strategy="fsdp2",  # verl's default is FSDP1
            model_dtype=precision if self.frozen else "fp32",
            mixed_precision={"param_dtype": precision, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            ulysses_sequence_parallel_size=self.sequence_parallel_size,
            param_offload=self.offload_parameters,
            optimizer_offload=self.offload_optimizer,
            reshard_after_forward=self.reshard_after_forward,
            use_torch_compile=False,
        )
        optimizer = FSDPOptimizerConfig(
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            clip_grad=self.max_grad_norm,
            override_optimizer_config={"eps": self.epsilon, "fused": True},
        )
        return model, engine, optimizer, CheckpointConfig()


class PackedEngine(FSDPEngineWithLMHead):  # type: ignore[misc]  # verl is untyped
    """Forward passes over `MicroBatch`, and an optimizer step that never applies a non-finite gradient."""

    module: nn.Module
    head: LogprobHead

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(*options.verl_configs())
        self.options = options

    def initialize(self) -> None:
        """Build model and optimizer. verl's checkpoint manager is left out: `state.py` writes checkpoints."""
        printed = io.StringIO()
        with redirect_stdout(printed), _no_progress_bar(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._build_model_optimizer()
        for line in printed.getvalue().splitlines():
            logger.debug("verl: %s", line)
        self.to("cpu", model=self._is_offload_param, optimizer=self._is_offload_optimizer, grad=self._is_offload_param)

    def _build_module(self) -> nn.Module:
        module: nn.Module = super()._build_module()
        self.head = LogprobHead(module)
        return module

    def _build_optimizer(self, module: nn.Module) -> Any:
        if self.options.frozen:
            module.requires_grad_(False)
            return None
        return super()._build_optimizer(module)

    def _build_lr_scheduler(self, optimizer: Any) -> None:
        """The learning rate is a pure function of the step (`schedule.py`), so there is no state to keep."""

    @property
    def vocab_size(self) -> int:
        return int(self.text_config.vocab_size)

    @property
    def text_config(self) -> Any:
        """transformers' config of the language model."""
        return self.model_config.hf_config.get_text_config()

    @property
    def sp_size(self) -> int:
        return int(self.ulysses_sequence_parallel_size)

    def evaluating(self, *, adapters: bool = True) -> AbstractContextManager[Any]:
        """No gradients, weights on the device. Without `adapters`, LoRA is switched off."""
        return _Evaluating(self, adapters)

    @contextmanager
    def without_sequence_parallelism(self) -> Iterator[None]:
        """Every rank runs whole sequences of its own."""
        group = get_ulysses_sequence_parallel_group()
        set_ulysses_sequence_parallel_group(None)
        try:
            yield
        finally:
            set_ulysses_sequence_parallel_group(group)

    def forward(self, micro: MicroBatch, *, with_entropy: bool) -> tuple[Tensor, Tensor]:
        """(logprobs [M], entropy [M]) of the trained tokens, float32 nats. Inside `train_mode` or `evaluating`."""
        token_ids, position_ids, positions = micro.token_ids_S, micro.position_ids_S, micro.trained_M - 1
        targets, temperature = token_ids[micro.trained_M], micro.temperature
        counts = [len(positions)]
        if self.sp_size > 1:
            shard = len(token_ids) // self.sp_size
            first = shard * self.ulysses_device_mesh["sp"].get_local_rank()
            counts = torch.bincount(positions // shard, minlength=self.sp_size).tolist()
            mine = (positions >= first) & (positions < first + shard)
            positions, targets = positions[mine] - first, targets[mine]
            temperature = temperature[mine] if isinstance(temperature, Tensor) else temperature
            token_ids, position_ids = token_ids[first : first + shard], position_ids[first : first + shard]
        self.head.request = LogprobRequest(
            positions_M=positions, targets_M=targets, temperature=temperature, with_entropy=with_entropy
        )
        try:
            output = self.module(
                input_ids=token_ids[None],
                position_ids=position_ids[None],
                attention_mask=None,
                use_cache=False,
                packing=micro.packing,
            ).logits[0]
        finally:
            self.head.request = None
        if self.sp_size > 1:
            longest = max(counts)
            output = nn.functional.pad(output, (0, 0, 0, longest - len(output)))
            output = gather_outputs_and_unpad(output, gather_dim=0)
            output = torch.cat([output[rank * longest :][:count] for rank, count in enumerate(counts)])
        return output[:, 0], output[:, 1].detach()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; only the last micro-batch communicates."""
        with self._gradient_sync_context(is_last_micro_batch=last):
            loss.backward()

    def grad_norm(self) -> float:
        """L2 norm of the gradient over all ranks. Works on the shards: DTensor operations cost more than they do."""
        grads = self._local_grads()
        square = torch.stack(torch._foreach_norm(grads)).square().sum().double()
        if dist.get_world_size() > 1:
            dist.all_reduce(square)
        return math.sqrt(value) if math.isfinite(value := float(square)) else value

    def step(self, *, learning_rate: float, grad_norm: float) -> None:
        """Clip to `max_grad_norm`, apply, and drop the gradients."""
        if grad_norm > self.options.max_grad_norm:
            torch._foreach_mul_(self._local_grads(), self.options.max_grad_norm / (grad_norm + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def lora_facts(self) -> dict[str, int] | None:
        """Rank and alpha of the adapters, which scale them; None without."""
        options = self.options
        return {"rank": options.lora_rank, "alpha": options.lora_alpha} if options.lora_rank else None

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Adam's moments by parameter name, of the parameters that have been stepped."""
        state = self.optimizer.state
        return {name: state[p] for name, p in self.module.named_parameters() if state.get(p)}

    def make_optimizer_state(self, names: list[str]) -> None:
        """Zero moments for exactly the parameters `names`, to be filled from a checkpoint."""
        self.optimizer.state.clear()
        parameters = dict(self.module.named_parameters())
        for name in names:
            parameter = parameters[name]
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def _local_grads(self) -> list[Tensor]:
        grads = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]


class _Evaluating:
    """`eval_mode` + no_grad (+ disabled adapters), for one `with`.

    Afterwards all weights are sharded again: without a backward pass FSDP2 leaves the gathered ones in place, and
    whoever asks for the parameters next would get those, in the compute dtype.
    """

    def __init__(self, engine: PackedEngine, adapters: bool) -> None:
        self._module = engine.module
        self._contexts: list[AbstractContextManager[Any]] = [torch.no_grad(), engine.eval_mode()]
        if not adapters:
            self._contexts.append(engine.disable_adapter())

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *exception: Any) -> None:
        for part in self._module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        for context in reversed(self._contexts):
            context.__exit__(*exception)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws one per loaded model; the run has its own console."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def build_engine(options: EngineOptions) -> PackedEngine:
    """Collective. Raises UserError where the model and the options do not fit."""
    targets = options.lora_target_modules
    if options.lora_rank and isinstance(targets, list) and {"lm_head", "embed_tokens"} & set(targets):
        raise UserError(
            f"model.lora.target_modules={targets}: LoRA on the embedding or the output head is not supported. "
            "Name linear layers inside the blocks, or use all-linear."
        )
    engine = PackedEngine(options)
    engine.initialize()
    return engine
