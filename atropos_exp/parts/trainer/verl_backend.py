"""The training backend: verl's `FSDPEngineWithLMHead`, fed with packed micro-batches instead of nested tensors.

verl contributes the model (loading, LoRA, sharding, mixed precision, offloading), the optimizer,
the contexts for training and evaluation, and deferred gradient synchronisation. Its own batch path is not used:
without flash-attn it computes log-probabilities token by token in Python.

Import this module only after the platform is set (`platform_cpu.install`): verl reads the device at import.
"""

import io
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.utils import logging as transformers_logging

from atropos_exp.errors import UserError
from atropos_exp.parts.trainer.distributed import sum_over_ranks
from atropos_exp.parts.trainer.layouts import Layout, model_input
from atropos_exp.parts.trainer.logprob_head import LogprobHead, LogprobRequest
from atropos_exp.parts.trainer.noise import evaluation_mode, without_noise
from atropos_exp.parts.trainer.packing import MicroBatch
from atropos_exp.parts.trainer.settings import ModelChoice, TrainerSettings
from atropos_exp.parts.trainer.sharding import layer_classes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # verl and its dependencies warn of their own deprecations at import
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM
    from verl.models.transformers import monkey_patch
    from verl.trainer.config import CheckpointConfig
    from verl.utils import model as verl_model
    from verl.utils.ulysses import (
        gather_outputs_and_unpad,
        get_ulysses_sequence_parallel_group,
        set_ulysses_sequence_parallel_group,
    )
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

# Where TRL is installed, verl would patch a class of it that TRL 1 has no more. Nothing here has a value head.
monkey_patch.is_trl_available = lambda: False
logger = logging.getLogger(__name__)
PRECISION = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """What verl's four configuration objects are made of."""

    settings: TrainerSettings
    model: ModelChoice
    model_folder: Path
    compute_dtype: str  # float32 | bfloat16: of activations and gathered weights
    layout: Layout
    frozen: bool  # a reference model: no optimizer, stored in the compute dtype

    def verl_configs(self) -> tuple[Any, Any, Any, Any]:
        """The model, FSDP, optimizer and checkpoint configurations, in the order that verl's constructor takes them."""
        settings, model, precision = self.settings, self.model, PRECISION[self.compute_dtype]
        return (
            HFModelConfig(
                path=str(self.model_folder),
                load_tokenizer=False,
                trust_remote_code=model.trust_remote_code,
                enable_gradient_checkpointing=model.gradient_checkpointing and not self.frozen,
                use_remove_padding=self.layout.kind == "packed",
                override_config=self._overrides(),
                lora_rank=0 if self.frozen else model.lora.rank,
                lora_alpha=model.lora.alpha,
                target_modules=list(model.lora.target_modules),
            ),
            FSDPEngineConfig(
                strategy="fsdp2",  # verl's default is FSDP1
                model_dtype=precision if self.frozen else "fp32",
                mixed_precision={"param_dtype": precision, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
                ulysses_sequence_parallel_size=settings.sequence_parallel_size,
                param_offload=settings.offload_parameters,
                optimizer_offload=settings.offload_optimizer,
                reshard_after_forward=settings.reshard_after_forward,
                use_torch_compile=False,
            ),
            FSDPOptimizerConfig(
                lr=settings.learning_rate,
                betas=(settings.adam_beta1, settings.adam_beta2),
                weight_decay=settings.weight_decay,
                clip_grad=settings.max_grad_norm,
                override_optimizer_config={"eps": settings.adam_epsilon, "fused": True},
            ),
            CheckpointConfig(),
        )

    def _overrides(self) -> dict[str, Any]:
        """What the configuration of the model says otherwise: its attention, and that nothing is random."""
        config = AutoConfig.from_pretrained(self.model_folder, trust_remote_code=self.model.trust_remote_code)
        counts = ("num_attention_heads", "num_key_value_heads")  # verl asks for them even where it does not need them
        heads = {name: 1 for name in counts if not hasattr(config.get_text_config(), name)}
        return {**heads, **without_noise(config), "attn_implementation": self.layout.attention}


class PackedBackend(FSDPEngineWithLMHead):  # type: ignore[misc]  # verl is untyped
    """Forward passes over `MicroBatch`, and an optimizer step that never applies a non-finite gradient."""

    module: nn.Module
    head: LogprobHead

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(*options.verl_configs())
        self.options = options

    def initialize(self) -> None:
        """Build the model and its optimizer. verl's checkpoint manager is not used: `state.py` writes checkpoints."""
        transformers_logging.disable_progress_bar()  # the run has its own console
        printed = io.StringIO()
        with redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._build_model_optimizer()
        for line in printed.getvalue().splitlines():
            logger.debug("verl: %s", line)
        self.to("cpu", model=self._is_offload_param, optimizer=self._is_offload_optimizer, grad=self._is_offload_param)

    def _build_module(self) -> nn.Module:
        chosen = verl_model.get_hf_auto_model_class
        # verl goes by the name of the class, and takes GPT2LMHeadModel for a model without a head.
        verl_model.get_hf_auto_model_class = lambda hf_config: AutoModelForCausalLM
        try:
            module: nn.Module = super()._build_module()
        finally:
            verl_model.get_hf_auto_model_class = chosen
        self.head = LogprobHead(module)
        return module

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        """Shard layer by layer, whatever the architecture calls its layers and says of tied weights."""
        model: Any = module.get_base_model() if isinstance(module, PeftModel) else module
        if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
            model.config.tie_word_embeddings = True
        model._no_split_modules = layer_classes(model)
        sharded: nn.Module = super()._build_fsdp_module(module)
        return sharded

    def _build_optimizer(self, module: nn.Module) -> Any:
        if self.options.frozen:
            module.requires_grad_(False)
            return None
        return super()._build_optimizer(module)

    def _build_lr_scheduler(self, optimizer: Any) -> None:
        """The learning rate is a pure function of the step (`schedule.py`), so there is no state to keep."""

    @property
    def plain_model(self) -> Any:
        """transformers' own model, without the layers of PEFT around it."""
        return self.module.get_base_model() if isinstance(self.module, PeftModel) else self.module

    @property
    def vocab_size(self) -> int:
        """The number of rows of the model's embedding."""
        return int(self.text_config.vocab_size)

    @property
    def text_config(self) -> Any:
        """transformers' config of the language model."""
        return self.model_config.hf_config.get_text_config()

    @property
    def sp_size(self) -> int:
        """The number of ranks that share one sequence (Ulysses)."""
        return int(self.ulysses_sequence_parallel_size)

    @contextmanager
    def evaluating(self, *, adapters: bool = True) -> Iterator[None]:
        """A context without gradients and with the weights on the device. Without `adapters`, LoRA is switched off.

        Afterwards all weights are sharded again: without a backward pass FSDP2 leaves the gathered ones in place, and
        the next reader of the parameters would get those, in the compute dtype.
        """
        with torch.no_grad(), self.eval_mode(), nullcontext() if adapters else self.disable_adapter():
            try:
                yield
            finally:
                for part in self.module.modules():
                    if isinstance(part, FSDPModule):
                        part.reshard()

    @contextmanager
    def training(self) -> Iterator[None]:
        """A context for forward and backward passes, in which nothing of the policy is random."""
        with self.train_mode():
            evaluation_mode(self.module)
            yield

    @contextmanager
    def without_sequence_parallelism(self) -> Iterator[None]:
        """A context in which every rank runs whole sequences of its own."""
        group = get_ulysses_sequence_parallel_group()
        set_ulysses_sequence_parallel_group(None)
        try:
            yield
        finally:
            set_ulysses_sequence_parallel_group(group)

    def forward(self, micro: MicroBatch, *, with_entropy: bool) -> tuple[Tensor, Tensor]:
        """Logprobs [M] and entropies [M] of the trained tokens, float32 nats; inside `train_mode` or `evaluating`."""
        given = model_input(micro, self.options.layout.kind)
        arguments, positions, targets = given.arguments, given.positions_M, micro.token_ids_S[micro.trained_M]
        temperature, counts = micro.temperature, [len(positions)]
        if self.sp_size > 1:
            shard = len(micro.token_ids_S) // self.sp_size
            first = shard * self.ulysses_device_mesh["sp"].get_local_rank()
            counts = torch.bincount(positions // shard, minlength=self.sp_size).tolist()
            mine = (positions >= first) & (positions < first + shard)
            positions, targets = positions[mine] - first, targets[mine]
            temperature = temperature[mine] if isinstance(temperature, Tensor) else temperature
            for name in ("input_ids", "position_ids"):
                arguments[name] = arguments[name][:, first : first + shard]
        self.head.request = LogprobRequest(
            positions_M=positions, targets_M=targets, temperature=temperature, with_entropy=with_entropy
        )
        try:
            output = self.module(**arguments, use_cache=False).logits[0]
        finally:
            self.head.request = None
        if self.sp_size > 1:
            longest = max(counts)
            output = nn.functional.pad(output, (0, 0, 0, longest - len(output)))
            output = gather_outputs_and_unpad(output, gather_dim=0)
            output = torch.cat([output[rank * longest :][:count] for rank, count in enumerate(counts)])
        return output[:, 0], output[:, 1].detach()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; the ranks communicate only after the `last` micro-batch of an optimizer step."""
        with self._gradient_sync_context(is_last_micro_batch=last):
            loss.backward()

    def grad_norm(self) -> float:
        """L2 norm of the gradient over all ranks, from the shards: DTensor operations cost more. Collective."""
        grads = self._local_grads()
        square = sum_over_ranks(torch.stack(torch._foreach_norm(grads)).square().sum().double())
        return math.sqrt(value) if math.isfinite(value := float(square)) else value

    def step(self, *, learning_rate: float, grad_norm: float) -> None:
        """Clip the gradient to `trainer.max_grad_norm`, apply it, and clear it."""
        max_norm = self.options.settings.max_grad_norm
        if grad_norm > max_norm:
            torch._foreach_mul_(self._local_grads(), max_norm / (grad_norm + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def lora_facts(self) -> dict[str, int] | None:
        """Rank and alpha of the adapters, which together scale them; None if all weights are trained."""
        lora = self.options.model.lora
        return {"rank": lora.rank, "alpha": lora.alpha} if lora.rank else None

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Adam's moments by parameter name, for the parameters that the optimizer has updated so far."""
        state = self.optimizer.state
        return {name: state[p] for name, p in self.module.named_parameters() if state.get(p)}

    def make_optimizer_state(self, names: list[str]) -> None:
        """Allocate zero moments for exactly the parameters `names`, to be filled from a checkpoint."""
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


def build_backend(options: BackendOptions) -> PackedBackend:
    """Load and shard the model. Collective. Raises UserError if the adapters cannot be trained."""
    lora = options.model.lora
    if lora.rank and {"lm_head", "embed_tokens"} & set(lora.target_modules):
        raise UserError(
            f"model.lora.target_modules={list(lora.target_modules)}: LoRA on the embedding or the output head is not "
            "supported. Name linear layers inside the blocks."
        )
    backend = PackedBackend(options)
    backend.initialize()
    return backend
