"""An output head that returns log-probabilities instead of logits, and only for trained tokens.

The head of a language model normally turns every hidden state into logits over the vocabulary, the largest
tensor of the whole step. Here it gathers the hidden states that predict a trained token, makes their logits
chunk by chunk, and returns log-probability and entropy: [1, M, 2] in place of [1, S, vocabulary]. Chunks are
recomputed in the backward pass, so only one of them is alive at a time.

It replaces `forward` of the head's instance, inside of FSDP's hooks: sharded, tied and half-precision heads work.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from atropos_exp.parts.trainer.settings import MAX_CHUNK_LOGITS

# What architectures call a bound of the logits (cap * tanh(logits / cap)), and the value that bounds nothing.
CAPS = {"final_logit_softcapping": None, "output_logit_soft_cap": None, "logits_soft_cap": 1e30}
FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier")  # what they call a factor


@dataclass(frozen=True, kw_only=True, eq=False)
class LogprobRequest:
    """What the head computes in the next forward pass."""

    positions_M: Tensor  # int64 into all hidden states, row by row: the one before each trained token
    targets_M: Tensor  # int64, the trained tokens
    temperature: float | Tensor  # one for all, or [M] float32
    with_entropy: bool


class LogprobHead:
    """Replaces the output head of `model`. While `request` is set it answers that; otherwise it returns plain logits.

    What the model would do to the logits after its head, a factor or a bound, is done here instead.
    """

    def __init__(self, model: Any) -> None:
        head: nn.Module = model.get_output_embeddings()
        self._linear: Callable[[Tensor], Tensor] = head.forward
        self._factor, self._cap = _take_over_scaling(model)
        self._chunk_size = max(64, MAX_CHUNK_LOGITS // int(model.config.get_text_config().vocab_size))
        self.request: LogprobRequest | None = None
        head.forward = self._forward

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._linear(hidden)
        if self._factor != 1.0:
            logits = logits * self._factor
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def _forward(self, hidden: Tensor) -> Tensor:
        request = self.request
        if request is None:
            return self._logits(hidden)
        hidden_MH = hidden.flatten(0, -2).index_select(0, request.positions_M)
        num_tokens = len(hidden_MH)
        if num_tokens <= self._chunk_size:
            return self._chunk(request, hidden_MH, slice(None))
        parts = [slice(start, start + self._chunk_size) for start in range(0, num_tokens, self._chunk_size)]
        chunks = [
            checkpoint(self._chunk, request, hidden_MH[part], part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
        return torch.cat(chunks, dim=1)

    def _chunk(self, request: LogprobRequest, hidden_MH: Tensor, part: slice) -> Tensor:
        """Logprobs and entropies [1, M, 2] of one part of the request."""
        targets_M, temperature = request.targets_M[part], request.temperature
        logits = self._logits(hidden_MH).float()
        if isinstance(temperature, Tensor):
            logits = logits / temperature[part, None]
        elif temperature != 1.0:
            logits = logits / temperature
        logprobs_MV = torch.log_softmax(logits, dim=-1)
        logprobs_M = logprobs_MV.gather(-1, targets_M[:, None])[:, 0]
        with torch.no_grad():
            if request.with_entropy:
                entropy_M = -(logprobs_MV.exp() * logprobs_MV).sum(-1)
            else:
                entropy_M = torch.zeros_like(logprobs_M)
        return torch.stack([logprobs_M[None], entropy_M[None]], dim=-1)  # not a view: FSDP hooks the output


def _take_over_scaling(model: Any) -> tuple[float, float | None]:
    """The factor and the bound that `model` applies to its logits after the head, which it no longer does then."""
    config = model.config
    factor, cap = 1.0, None
    for owner in (model, model.base_model, config, config.get_text_config()):
        values = vars(owner) if isinstance(owner, nn.Module) else _declared(owner)
        for name in FACTORS:
            if isinstance(value := values.get(name), int | float) and value != 1:
                factor = 1 / value if name == "logits_scaling" and config.model_type != "hyperclovax" else value
                setattr(owner, name, 1.0)
        for name, unbounded in CAPS.items():
            if values.get(name) is not None and values[name] != unbounded:
                cap = values[name]
                setattr(owner, name, unbounded)
    return factor, cap


def _declared(config: Any) -> dict[str, Any]:
    """The values of a configuration that its architecture knows: transformers keeps any other key too, unused."""
    known = inspect.signature(type(config).__init__).parameters
    return {name: value for name, value in vars(config).items() if name in known}
